"""Which trial of a search ended best: read from the records of all of them."""

from __future__ import annotations

from collections.abc import Callable

from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs import shape
from caspr_cli.runs.record import DONE, FAILED, Record, RecordDamagedError

TUNING_SEED = 0  # that of the runs which choose; other seeds of the chosen trial are fresh


def best(trial: Callable[[int], Recipe]) -> int:
    """The trial with the best validation at its end, of the first ``search.trials``; of equals, the first.

    One that failed, or whose value is not finite, is not chosen.

    Args:
        trial: the recipe of each, at ``TUNING_SEED``.

    Raises:
        ConfigError: some have not ended, or all failed.
        RecordDamagedError: a record cannot be read.
    """
    first = trial(0)
    count, target = first.search.trials, first.task.target
    values: dict[int, float] = {}
    missing = []
    for index in range(count):
        record = Record.of(trial(index))
        state = record.status.get("state")
        if state not in (DONE, FAILED):
            missing.append(index)
        elif state == DONE:
            if shape.lost(record.status, result := record.result):
                raise RecordDamagedError(record.path / "result.json")
            if (value := result["final"].get(target.metric)) is not None:
                values[index] = value
    if missing:
        raise ConfigError(
            f"trial=best of search={first.search.name}: {len(missing)} of {count} trials of optim={first.optim.name} "
            f"have not ended in {first.output_dir}: first run -m trial={','.join(map(str, missing))} seed={TUNING_SEED}"
        )
    if not values:
        raise ConfigError(f"trial=best of search={first.search.name}: all {count} trials of {first.optim.name} failed")
    return max(values, key=lambda index: (values[index] if target.higher_is_better else -values[index], -index))
