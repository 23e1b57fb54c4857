"""Which trial of a search is the best, and when a target is reached: one rule for what is run and what is reported."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TUNING_SEED = 0  # every trial of a search is run with it
AGAIN = (1001, 1002)  # seeds with which the best trials are run again (search.rerank); other seeds are held out
BESIDE = 2  # trials that every row is given in a round with other values of one key (search.refine)
LARGEST = 1e50  # of a metric: far beyond float32, and the square of its square is finite


def finite(value: float | None) -> float | None:
    """Return the value of a metric; None where it is not finite, or larger than any that a run survives."""
    return float(value) if value is not None and abs(value) <= LARGEST else None


@dataclass(frozen=True)
class Choice:
    """The best of several trials."""

    best: int | None  # its index; None if no trial has a run with a finite value
    seeds: frozenset[int]  # those that decided
    # the mean of each compared trial over the seeds that all of them have, by index; None if a value is not finite
    scores: dict[int, float | None]
    order: tuple[int, ...] = ()  # these trials by that mean, the best first
    finalists: tuple[int, ...] = ()  # those that are, or have to be, run again


def choose(trials: Sequence[Mapping[int, float | None]], *, higher_is_better: bool, rerank: int = 0) -> Choice:
    """Return the trial with the best mean over the seeds that all trials share.

    If no seed is common to all, the one that most trials have (the lowest of several) decides among those that have it.
    Of trials with the same mean, or of failed ones, the one with the most finite values is taken, then the first. With
    ``rerank`` > 1 the seeds ``AGAIN`` are for so many of the best trials: among these the mean over the seeds before
    and those of ``AGAIN`` that all of them have decides. ``trials``: for each, the metric at the end of its runs that
    have ended, by seed; None: failed, or not finite.
    """
    again = frozenset(AGAIN if rerank > 1 else ())
    before = [{seed: value for seed, value in finals.items() if seed not in again} for finals in trials]
    candidates = {k: finals for k, finals in enumerate(before) if finals}
    if not candidates:
        return Choice(None, frozenset(), {})
    seeds = frozenset.intersection(*map(frozenset, candidates.values()))
    if not seeds:
        counts = Counter(seed for finals in candidates.values() for seed in finals)
        seeds = frozenset({min(counts, key=lambda seed: (-counts[seed], seed))})
    compared = [k for k, finals in candidates.items() if seeds <= finals.keys()]
    finite = {k: sum(value is not None for value in before[k].values()) for k in compared}

    def ranked(indices: Sequence[int], seeds: frozenset[int]) -> dict[int, float | None]:
        """Return the means over these seeds, the best first."""
        scores = {k: _mean([trials[k][seed] for seed in seeds]) for k in indices}

        def rank(k: int) -> tuple[float, int, int]:
            score = scores[k]
            return math.inf if score is None else -score if higher_is_better else score, -finite[k], k

        return {k: scores[k] for k in sorted(indices, key=rank)}

    scores = ranked(compared, seeds)
    order = tuple(scores)
    finalists = tuple(k for k in order[:rerank] if scores[k] is not None) if again and len(order) > 1 else ()
    best = order[0]
    if finalists and (shared := again.intersection(*(trials[k].keys() for k in finalists))):
        seeds |= shared
        best = next(iter(ranked(finalists, seeds)))
    scores = {k: scores[k] for k in compared}
    return Choice(best if finite[best] else None, seeds, scores, order, finalists)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def reaches(value: float, target: float, *, higher_is_better: bool) -> bool:
    """Return whether a metric is at least as good as the target."""
    return value >= target if higher_is_better else value <= target
