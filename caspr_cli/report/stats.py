"""The statistics of a comparison, as pure functions of numbers.

Intervals of a mean, the paired test and Welch's test are those of Student's t. They are written with scipy.special:
scipy.stats takes seconds to import, and the tests compare with it.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

LEVEL = 0.05  # two-sided
POWER = 0.8
MOST_SEEDS = 1000
NO_SPREAD = 1e-12  # relative: a smaller standard error is the rounding of equal values


@dataclass(frozen=True)
class Spread:
    """The random error of a difference."""

    error: float  # error, freedom: its standard error and degrees of freedom
    freedom: float
    sd: float  # the standard deviation of one seed (pair)
    # n seeds a side have (n - 1) times this degrees of freedom: 1 for pairs, up to 2 for Welch's test
    each: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """One row minus another, over seeds."""

    paired: bool = False  # whether it is a paired test; otherwise it is Welch's
    n: int = 0  # pairs, or the smaller of the two numbers of seeds
    # the difference of the means, in units of the metric; None if one of the two has no seed
    value: float | None = None
    base: tuple[float, ...] = ()  # the other's values that took part
    # low, high: 95 % interval, not corrected; None if n < 2, or if all seeds differ by the same
    low: float | None = None
    high: float | None = None
    # two-sided; None where `low` is, as `spread`; and where the comparison would not be fair, as more seeds failed, or
    # chose the trial, on one side
    p_value: float | None = None
    spread: Spread | None = None
    p_holm: float | None = None  # after Holm's correction for the other rows of a table
    tests: int = 1  # how many p-values this table has
    baseline: str = ""  # the label of the other row
    verdict: str = ""  # "better", "worse", or why there is none, in words
    test: Comparison | None = None  # the same comparison of the test metric

    @property
    def share_of(self) -> float | None:
        """The mean of ``base``, of which the difference is given in per cent; None where it is too near 0.

        That is below ten standard deviations, and so wherever its 95 % interval contains 0.
        """
        base = summary(self.base)
        return None if not base.mean or (base.sd is not None and abs(base.mean) < 10 * base.sd) else base.mean


@dataclass(frozen=True)
class Summary:
    """Values in five numbers."""

    n: int
    mean: float | None = None
    sd: float | None = None  # standard deviation (n - 1 in the denominator); None where there are fewer than two values
    # low, high: the 95 % interval of the mean of normal values; None for fewer than two, or equal ones
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> tuple[float, ...]:
        """The two ends of the interval; empty where there is none."""
        return () if self.low is None or self.high is None else (self.low, self.high)


def summary(values: Iterable[float]) -> Summary:
    array = np.asarray([*values], dtype=float)
    n, mean = array.size, float(array.mean()) if array.size else None
    if mean is None or n < 2:
        return Summary(n, mean)
    sd = float(array.std(ddof=1))
    if sd <= NO_SPREAD * float(np.abs(array).max()):
        return Summary(n, mean, sd)
    half = quantile(n - 1) * sd / math.sqrt(n)
    return Summary(n, mean, sd, mean - half, mean + half)


def median(times: Sequence[float | None]) -> float | None:
    """Return the median; None if it is infinite, or a time is not known."""
    known = [time for time in times if time is not None]
    middle = statistics.median(known) if known and len(known) == len(times) else math.inf
    return middle if math.isfinite(middle) else None


def quantile(freedom: float, tests: int = 1) -> float:
    """Return what the absolute value of Student's t exceeds with 5 % probability, divided by the number of tests."""
    return float(special.stdtrit(freedom, 1 - LEVEL / tests / 2))


def compare(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Comparison:
    """Return the difference of the means, ours minus theirs (values by seed), with its test.

    The test is paired where all seeds of one side are seeds of the other, two or more. Otherwise it is Welch's over
    all seeds: pairs of a few common seeds would leave out the rest.
    """
    common = sorted(ours.keys() & theirs.keys())
    paired = len(common) >= 2 and len(common) == min(len(ours), len(theirs))
    a, b = (np.array([side[s] for s in common] if paired else [*side.values()]) for side in (ours, theirs))
    n, base = min(len(a), len(b)), tuple(b.tolist())
    value = float(a.mean() - b.mean()) if n else None
    if n < 2 or value is None:
        return Comparison(paired, n, value, base)
    sd = float((a - b).std(ddof=1)) if paired else 0.0
    spread = Spread(sd / math.sqrt(n), n - 1.0, sd) if paired else _welch(a, b)
    if spread.error <= NO_SPREAD * max(np.abs(a).max(), np.abs(b).max()):  # equal values say nothing of a spread
        return Comparison(paired, n, value, base)
    half = quantile(spread.freedom) * spread.error
    p = float(2 * special.stdtr(spread.freedom, -abs(value) / spread.error))
    return Comparison(paired, n, value, base, value - half, value + half, p, spread)


def _welch(a: np.ndarray, b: np.ndarray) -> Spread:
    ours, theirs = float(a.var(ddof=1)), float(b.var(ddof=1))
    parts = (ours / len(a), theirs / len(b))
    error = sum(parts)
    if not error:
        return Spread(0.0, 1.0, 0.0)
    freedom = error**2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1))
    each = (ours + theirs) ** 2 / (ours**2 + theirs**2)
    return Spread(math.sqrt(error), freedom, math.sqrt(ours + theirs), each)


def detectable(spread: Spread, tests: int = 1) -> float:
    """Return the smallest observed difference that would be significant with these seeds.

    The 5 % are shared among the ``tests`` of a table (Bonferroni), as Holm's correction does in its first step.
    """
    return quantile(spread.freedom, tests) * spread.error


def seeds_to_detect(difference: float, spread: Spread, tests: int = 1) -> int | None:
    """Return the smallest n with which such an observed difference is significant; None above ``MOST_SEEDS``."""
    return _fewest(lambda n: quantile((n - 1) * spread.each, tests) * spread.sd <= abs(difference) * math.sqrt(n))


def seeds_needed(difference: float, spread: Spread, tests: int = 1) -> int | None:
    """Return the smallest n whose t-test finds such a true difference with 80 % power; None above ``MOST_SEEDS``.

    The power is that of the noncentral t distribution (J. Cohen, Statistical Power Analysis, 1988, chapter 2).
    """

    def found(n: int) -> bool:
        freedom = (n - 1) * spread.each
        bound, shift = quantile(freedom, tests), abs(difference) / spread.sd * math.sqrt(n)
        missed = float(special.nctdtr(freedom, shift, bound))
        if math.isnan(missed):  # above a shift of 35 the normal part of t is negligible; chi squared remains
            missed = float(special.chdtrc(freedom, freedom * (shift / bound) ** 2))
        return missed <= 1 - POWER

    return _fewest(found)


def _fewest(enough: Callable[[int], bool]) -> int | None:
    """Return the smallest n from 2 on that is enough, as all above it are."""
    numbers = range(2, MOST_SEEDS + 1)
    place = bisect_left(numbers, True, key=enough)
    return numbers[place] if place < len(numbers) else None


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the p-values after Holm's correction (S. Holm, 1979); None, where there was no test, does not count."""
    tested = sorted((p, k) for k, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, k) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        corrected[k] = highest
    return corrected


def best_of(values: Sequence[float | None], *, higher_is_better: bool) -> tuple[float, ...]:
    """Return the expected best of k trials drawn without replacement, for k = 1, 2, ..., all; exact.

    The best is the i-th of N with probability C(N - i, k - 1) / C(N, k) (order statistics; J. Dodge et al., Show Your
    Work, 2019, draw with replacement). ``values``: of the trials; None, one that failed, counts as the worst of the
    others. Empty if all failed.
    """
    ranked = _ranked(values, higher_is_better=higher_is_better)
    return tuple(_expected_best(ranked, k) for k in range(1, len(ranked) + 1))


def _ranked(values: Sequence[float | None], *, higher_is_better: bool) -> list[float]:
    """Return the values, the best first, with failed ones as the worst; none if all failed."""
    finite = [value for value in values if value is not None]
    worst = (min if higher_is_better else max)(finite, default=0.0)
    return sorted((worst if value is None else value for value in values), reverse=higher_is_better) if finite else []


def _expected_best(ranked: Sequence[float], k: int) -> float:
    probability = k / len(ranked)  # that the first is drawn; then, that it is the best of those that are drawn
    total = 0.0
    for left in range(len(ranked), k - 1, -1):
        total += probability * ranked[len(ranked) - left]
        probability *= (left - k) / max(left - 1, 1)
    return total


def range_of_best(values: Sequence[float | None], k: int, *, higher_is_better: bool) -> tuple[float, float]:
    """Return between which values the best of k trials lies with 95 % probability, the lower first; exact.

    The trials are drawn with replacement from those that were run, as a bootstrap of the search draws them: the best is
    none of the first i of N with probability (1 - i / N)^k. ``values``: of the trials, one of them finite; None counts
    as the worst of the others.
    """
    ranked = _ranked(values, higher_is_better=higher_is_better)
    n = len(ranked)

    def place(probability: float) -> int:
        """Return the first place at which the best stands with at least this probability, or before it."""
        return next(i for i in range(n) if 1 - (1 - (i + 1) / n) ** k >= probability)

    edges = ranked[place(LEVEL / 2)], ranked[place(1 - LEVEL / 2)]
    return min(edges), max(edges)
