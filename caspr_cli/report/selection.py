"""Which trial of a row is reported, with which of its seeds: validation at the end chooses, fresh seeds report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from caspr_cli.report.model import Run, Trial
from caspr_cli.report.rows import ended

FRESH = 2  # seeds that selected nothing, from which on they alone are reported


@dataclass(frozen=True)
class Selection:
    """What was chosen among the trials of a row.

    Args:
        trial: None if no trial has a run that is done.
        seeds: those by which it was chosen; empty if there was one trial, and nothing to choose.
        scores: of each trial that can be compared, its mean over these seeds; None if one failed or is not finite.
        left_out: how many trials that ended have no run with these seeds.
    """

    trial: Trial | None
    seeds: frozenset[int]
    scores: tuple[float | None, ...]
    left_out: int = 0


def select(trials: Sequence[Trial], *, higher_is_better: bool) -> Selection:
    """The trial with the best mean final validation over the seeds that all trials share.

    If no seed is common to all, the one that most trials have (the lowest of several) decides, among these trials.
    """
    candidates = [trial for trial in trials if any(map(ended, trial.runs))]
    if not candidates:
        return Selection(None, frozenset(), ())
    seeds = _deciding([{run.seed for run in trial.runs if ended(run)} for trial in candidates])
    compared = [trial for trial in candidates if seeds <= {run.seed for run in trial.runs if ended(run)}]
    scores = [score(trial, seeds) for trial in compared]
    sign = -1 if higher_is_better else 1

    def worth(k: int) -> tuple[float, int]:
        finite = sum(run.final is not None for run in compared[k].runs)
        return math.inf if (value := scores[k]) is None else sign * value, -finite

    best = compared[min(range(len(compared)), key=worth)]
    return Selection(
        best if any(run.final is not None for run in best.runs) else None,
        seeds if len(candidates) > 1 else frozenset(),
        tuple(scores),
        len(candidates) - len(compared),
    )


def _deciding(seeds: Sequence[set[int]]) -> frozenset[int]:
    if common := frozenset.intersection(*map(frozenset, seeds)):
        return common
    counts = Counter(seed for each in seeds for seed in each)
    return frozenset({min(counts, key=lambda seed: (-counts[seed], seed))})


def score(trial: Trial, seeds: frozenset[int]) -> float | None:
    """The mean of the final validations with these seeds; None if one failed or is not finite."""
    values = [run.final for run in trial.runs if run.seed in seeds]
    finite = [value for value in values if value is not None]
    return sum(finite) / len(finite) if finite and len(finite) == len(values) else None


def reported(selection: Selection) -> tuple[tuple[Run, ...], bool]:
    """The runs of the selected trial that have ended, and whether they are fresh: they selected nothing."""
    if selection.trial is None:
        return (), False
    runs = tuple(run for run in selection.trial.runs if ended(run))
    fresh = tuple(run for run in runs if run.seed not in selection.seeds)
    if not selection.seeds or len(fresh) >= FRESH:
        return fresh, True
    return runs, False
