"""The statistics of a comparison, as pure functions of numbers.

Student's t throughout: intervals of a mean, the paired test, Welch's test. scipy.special has the distribution; the
tests hold these against scipy.stats, which takes a second to import.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

LEVEL = 0.05  # two-sided
POWER = 0.8
MOST_SEEDS = 1000
NO_SPREAD = 1e-12  # relative: below, a standard error is the rounding of equal values


@dataclass(frozen=True)
class Spread:
    """How large chance is in a comparison.

    Args:
        error, freedom: standard error of the difference, and its degrees of freedom.
        sd: of the difference of one seed (pair).
        each: n seeds a side have (n - 1) times this degrees of freedom: 1 for pairs, up to 2 for Welch's test.
    """

    error: float
    freedom: float
    sd: float
    each: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """One row minus another, over seeds.

    Args:
        n: pairs, or the smaller of the two numbers of seeds.
        value: None if one of the two has no seed.
        base: the other's values that took part, of which shares may be said.
        low, high: 95 % interval; None if n < 2, or if no difference between seeds shows how large chance is.
        p_value: two-sided; None where ``low`` is, as ``spread``.
    """

    paired: bool
    n: int
    value: float | None
    base: tuple[float, ...] = ()
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    spread: Spread | None = None


def mean_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (n - 1 in the denominator); None where there are too few."""
    array = np.asarray(values, dtype=float)
    mean = float(array.mean()) if array.size else None
    return mean, float(array.std(ddof=1)) if array.size > 1 else None


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % interval of the mean, for values that are about normal; None for fewer than two, or equal ones."""
    mean, sd = mean_sd(values)
    if mean is None or sd is None or sd <= NO_SPREAD * max(map(abs, values)):
        return None, None
    half = quantile(len(values) - 1) * sd / math.sqrt(len(values))
    return mean - half, mean + half


def quantile(freedom: float, tests: int = 1) -> float:
    """Of Student's t: what its absolute value exceeds with a probability of 5 %, shared among so many tests."""
    return float(special.stdtrit(freedom, 1 - LEVEL / tests / 2))


def compare(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Comparison:
    """The difference of the means, ours minus theirs.

    Paired where all seeds of the one are seeds of the other, two or more. Otherwise Welch's over all: a few common
    seeds would throw the rest away.

    Args:
        ours, theirs: values by seed.
    """
    common = sorted(ours.keys() & theirs.keys())
    if len(common) >= 2 and len(common) == min(len(ours), len(theirs)):
        return _paired(np.array([ours[s] for s in common]), np.array([theirs[s] for s in common]))
    return _welch(np.array([*ours.values()]), np.array([*theirs.values()]))


def _paired(a: np.ndarray, b: np.ndarray) -> Comparison:
    n, sd = len(a), float((a - b).std(ddof=1))
    return _tested(a, b, Spread(sd / math.sqrt(n), n - 1.0, sd), paired=True)


def _welch(a: np.ndarray, b: np.ndarray) -> Comparison:
    n = min(len(a), len(b))
    if n < 2:
        return Comparison(False, n, float(a.mean() - b.mean()) if n else None, tuple(b.tolist()))
    ours, theirs = float(a.var(ddof=1)), float(b.var(ddof=1))
    parts = (ours / len(a), theirs / len(b))
    error = sum(parts)
    freedom = error**2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1)) if error else 1.0
    each = (ours + theirs) ** 2 / (ours**2 + theirs**2) if error else 1.0
    return _tested(a, b, Spread(math.sqrt(error), freedom, math.sqrt(ours + theirs), each), paired=False)


def _tested(a: np.ndarray, b: np.ndarray, spread: Spread, *, paired: bool) -> Comparison:
    n, value, scale = min(len(a), len(b)), float(a.mean() - b.mean()), float(max(np.abs(a).max(), np.abs(b).max()))
    base = tuple(b.tolist())
    if spread.error <= NO_SPREAD * scale:  # p would be 0, or 0 / 0: equal values are no sample of a spread
        return Comparison(paired, n, value, base)
    half = quantile(spread.freedom) * spread.error
    p = float(2 * special.stdtr(spread.freedom, -abs(value) / spread.error))
    return Comparison(paired, n, value, base, value - half, value + half, p, spread)


def separable(spread: Spread, tests: int = 1) -> float:
    """The smallest difference that the seeds that there are tell from zero.

    Args:
        tests: of the table. The 5 % are shared among them (Bonferroni), as Holm's correction does in its first step.
    """
    return quantile(spread.freedom, tests) * spread.error


def seeds_to_separate(difference: float, spread: Spread, tests: int = 1) -> int | None:
    """The smallest n that tells such an observed difference from zero; None above ``MOST_SEEDS``."""
    return _fewest(lambda n: quantile((n - 1) * spread.each, tests) * spread.sd <= abs(difference) * math.sqrt(n))


def seeds_needed(difference: float, spread: Spread, tests: int = 1) -> int | None:
    """The smallest n whose two-sided t-test finds such a true difference with 80 % power; None above ``MOST_SEEDS``.

    The power is that of the noncentral t distribution (J. Cohen, Statistical Power Analysis, 1988, chapter 2).

    Args:
        tests: as of :func:`separable`.
    """

    def found(n: int) -> bool:
        freedom = (n - 1) * spread.each
        bound, shift = quantile(freedom, tests), abs(difference) / spread.sd * math.sqrt(n)
        missed = float(special.nctdtr(freedom, shift, bound))
        if math.isnan(missed):  # a shift above 35, beside which the normal part of t is nothing: chi squared is left
            missed = float(special.chdtrc(freedom, freedom * (shift / bound) ** 2))
        return missed <= 1 - POWER

    return _fewest(found)


def _fewest(enough: Callable[[int], bool]) -> int | None:
    """The smallest n from 2 on that is enough, as all above it are."""
    numbers = range(2, MOST_SEEDS + 1)
    place = bisect_left(numbers, True, key=enough)
    return numbers[place] if place < len(numbers) else None


def unit_of_shares(base: Sequence[float]) -> float | None:
    """What a difference is given in per cent of: the mean; None where that is too near 0 to divide by.

    That is below ten standard deviations, and so wherever its 95 % interval contains 0.
    """
    mean, sd = mean_sd(base)
    return None if not mean or (sd is not None and abs(mean) < 10 * sd) else mean


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Corrected for there being several (S. Holm, 1979); None, where there was no test, stays and does not count."""
    tested = sorted((p, k) for k, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, k) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        corrected[k] = highest
    return corrected


def best_of(values: Sequence[float | None], *, higher_is_better: bool) -> tuple[float, ...]:
    """The expected best of k trials drawn without replacement from these, for k = 1, 2, ..., all; exact.

    The best is the i-th of N with probability C(N - i, k - 1) / C(N, k) (order statistics; J. Dodge et al., Show Your
    Work, 2019, draw with replacement).

    Args:
        values: of the trials; None, one that failed, counts as the worst of the others. Empty if all failed.
    """
    finite = [value for value in values if value is not None]
    if not finite:
        return ()
    worst = min(finite) if higher_is_better else max(finite)
    ranked = sorted((worst if value is None else value for value in values), reverse=higher_is_better)
    return tuple(_expected_best(ranked, k) for k in range(1, len(ranked) + 1))


def _expected_best(ranked: Sequence[float], k: int) -> float:
    total, left = 0.0, len(ranked)
    probability = k / left  # that the first is drawn
    for value in ranked:
        total += probability * value
        if left == k:
            break  # the best cannot be worse than this one
        probability *= (left - k) / (left - 1)
        left -= 1
    return total
