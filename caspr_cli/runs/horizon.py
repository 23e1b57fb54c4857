"""The shortest whole run that reaches the target: ``trainer.max_steps`` is shortened by bisection, each with a schedule
of its own. One rule for all rows; what is next follows from the records alone."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import cast

from omegaconf import DictConfig, OmegaConf

from caspr_cli.common.selection import finite, reaches
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs.record import DONE, FAILED, Record, RecordDamagedError

ROUNDS = 4  # halvings
PARTS = 1 << ROUNDS  # to one of which the length is known


def shortened(config: DictConfig, steps: int) -> DictConfig:
    """Return the config of a run of so many steps, as ``horizon`` says. Raises ConfigError if it is not shorter."""
    trainer = config.trainer
    if not 1 <= steps <= trainer.max_steps:
        raise ConfigError(f"horizon={steps}: should be from 1 to trainer.max_steps, which is {trainer.max_steps}")
    length = {"max_steps": steps, "val_every": min(trainer.val_every, steps)}
    return cast(DictConfig, OmegaConf.merge(config, {"horizon": steps, "trainer": length}))


def next_length(runs: Sequence[Recipe]) -> int | None:
    """Return how many steps to try next; None if the shortest length is known, or the whole runs miss the target.

    A length reaches the target if all its runs end with a finite value and their mean is at least as good. ``runs``: of
    one recipe, at the seeds that are reported.
    """
    if not runs or runs[0].task.target.value is None or not _reached(runs):
        return None
    longest = runs[0].trainer.max_steps
    parts = min(PARTS, longest)
    low, high = 0, parts
    while high - low > 1:
        middle = (low + high) // 2
        steps = round(longest * middle / parts)
        found = _reached([_whole(run, steps) for run in runs])
        if found is None:
            return steps
        low, high = (low, middle) if found else (middle, high)
    return None


def _whole(recipe: Recipe, steps: int) -> Recipe:
    trainer = replace(recipe.trainer, max_steps=steps, val_every=min(recipe.trainer.val_every, steps))
    return replace(recipe, horizon=steps, trainer=trainer)


def _reached(runs: Sequence[Recipe]) -> bool | None:
    """Return whether these runs reach their target in the mean; None if one has not ended, or cannot be read."""
    target, finals = runs[0].task.target, []
    for recipe in runs:
        record = Record.of(recipe)
        try:
            state, final = record.status.get("state"), (record.result or {}).get("final") or {}
        except RecordDamagedError:
            return None
        if state not in (DONE, FAILED) or record.config_is_lost:
            return None
        finals.append(finite(final.get(target.metric)) if state == DONE else None)
    known = [final for final in finals if final is not None]
    assert target.value is not None
    whole = len(known) == len(finals)
    return whole and reaches(fmean(known), target.value, higher_is_better=target.higher_is_better)
