"""Which trial of a search is the best, and when a target is reached: one rule for what is run and what is reported."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LARGEST = 1e50  # of a metric: far beyond float32, and the square of its square is finite


def finite(value: float | None) -> float | None:
    """Return the value of a metric; None where it is not finite, or larger than any that a run survives."""
    return float(value) if value is not None and abs(value) <= LARGEST else None


@dataclass(frozen=True)
class Choice:
    """The best of several trials.

    Args:
        best: its index; None if no trial has a run with a finite value.
        seeds: those that decided.
        scores: of each trial that was compared, by index, the mean over these seeds; None if one is not finite.
    """

    best: int | None
    seeds: frozenset[int]
    scores: dict[int, float | None]


def choose(trials: Sequence[Mapping[int, float | None]], *, higher_is_better: bool) -> Choice:
    """Return the trial with the best mean over the seeds that all trials share.

    If no seed is common to all, the one that most trials have (the lowest of several) decides among those that have
    it. Of trials with the same mean, or of failed ones, the one with the most finite values is taken, then the first.

    Args:
        trials: for each, the metric at the end of its runs that have ended, by seed; None: failed, or not finite.
    """
    candidates = {k: finals for k, finals in enumerate(trials) if finals}
    if not candidates:
        return Choice(None, frozenset(), {})
    seeds = frozenset.intersection(*map(frozenset, candidates.values()))
    if not seeds:
        counts = Counter(seed for finals in candidates.values() for seed in finals)
        seeds = frozenset({min(counts, key=lambda seed: (-counts[seed], seed))})
    scores = {k: _mean([finals[seed] for seed in seeds]) for k, finals in candidates.items() if seeds <= finals.keys()}
    finite = {k: sum(value is not None for value in trials[k].values()) for k in scores}

    def rank(k: int) -> tuple[float, int, int]:
        score = scores[k]
        return math.inf if score is None else -score if higher_is_better else score, -finite[k], k

    best = min(scores, key=rank)
    return Choice(best if finite[best] else None, seeds, scores)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def reaches(value: float, target: float, *, higher_is_better: bool) -> bool:
    """Return whether a metric is at least as good as the target."""
    return value >= target if higher_is_better else value <= target
