"""The best trial of a search, from the records of all its trials, by the rule with which ``caspr-report`` selects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from caspr_cli.common.selection import choose, finite
from caspr_cli.common.shape import lost
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs.record import DONE, FAILED, Record, RecordDamagedError

TUNING_SEED = 0  # every trial is run with it; other seeds of the selected trial are held out


def best(trial: Callable[[int], Recipe]) -> int:
    """Return the trial with the best validation at its end, of the first ``search.trials``.

    :func:`caspr_cli.common.selection.choose` has the rule: what is run at other seeds is what a report selects.

    Args:
        trial: the recipe of each, at ``TUNING_SEED``.

    Raises:
        ConfigError: some have not ended, or all failed.
        RecordDamagedError: a record cannot be read.
    """
    first = trial(0)
    count, target = first.search.trials, first.task.target
    finals = [_finals(Record.of(trial(index)).path.parent, target.metric) for index in range(count)]
    missing = [index for index in range(count) if TUNING_SEED not in finals[index]]
    if missing:
        raise ConfigError(
            f"trial=best of search={first.search.name}: {len(missing)} of {count} trials of optim={first.optim.name} "
            f"have not ended in {first.output_dir}: first run -m trial={','.join(map(str, missing))} seed={TUNING_SEED}"
        )
    choice = choose(finals, higher_is_better=target.higher_is_better)
    if choice.best is None or all(score is None for score in choice.scores.values()):
        raise ConfigError(f"trial=best of search={first.search.name}: all {count} trials of {first.optim.name} failed")
    return choice.best


def _finals(trial: Path, metric: str) -> dict[int, float | None]:
    """Return the metric at the end of each run of a trial that has ended, by seed; None: failed, or not finite."""
    found: dict[int, float | None] = {}
    for path in trial.glob("seed*"):
        record, seed = Record(path), path.name.removeprefix("seed")
        if not seed.isdecimal():
            continue
        try:
            status, result = record.status, record.result
            if lost(status, result):
                raise RecordDamagedError(path / "result.json")
        except RecordDamagedError:
            if int(seed) == TUNING_SEED:
                raise
            continue  # a report leaves it out, too
        if status.get("state") == DONE:
            found[int(seed)] = finite(result["final"].get(metric))
        elif status.get("state") == FAILED:
            found[int(seed)] = None
    return found
