from __future__ import annotations

import itertools
import math
from itertools import permutations

import numpy as np
import pytest
from scipy import special
from scipy import stats as reference

from caspr_cli.report import format, stats


def by_seed(values: object, first: int = 0) -> dict[int, float]:
    return dict(enumerate(np.asarray(values, dtype=float).tolist(), first))


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# ---- against scipy and by hand -----------------------------------------------------------------------------------


def test_mean_spread_and_interval() -> None:
    values = [3.9, 4.1, 4.3, 4.05]
    mean, sd = stats.mean_sd(values)
    assert mean == pytest.approx(4.0875)
    assert sd == pytest.approx(np.std(values, ddof=1))
    expected = reference.t.interval(0.95, 3, loc=mean, scale=reference.sem(values))
    assert stats.interval(values) == pytest.approx(expected)
    assert (stats.mean_sd([2.0]), stats.mean_sd([])) == ((2.0, None), (None, None))
    assert stats.interval([2.0]) == stats.interval([]) == (None, None)


@pytest.mark.parametrize(("n", "m", "paired"), [(5, 5, True), (2, 3, True), (4, 6, False), (10, 10, False)])
def test_tests_are_scipys_and_swapping_sides_flips_the_verdict(n: int, m: int, paired: bool) -> None:
    """Of the ten seeds a side that are not all common, two are, which do not throw the others away."""
    a, b = random(n, n), 2 * random(m + 9, m) + 0.7
    first = 0 if paired else n - 2
    common = b[:n] if paired else b
    expected = reference.ttest_rel(a, common) if paired else reference.ttest_ind(a, common, equal_var=False)
    found, turned = (stats.compare(*sides) for sides in permutations((by_seed(a), by_seed(b, first))))
    assert (found.paired, found.n, found.base) == (paired, min(n, m), pytest.approx(tuple(common)))
    assert found.p_value == turned.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert (found.value, found.low) == pytest.approx((-turned.value, -turned.high))
    error = (found.high - found.low) / 2 / reference.t.ppf(0.975, found.spread.freedom)
    for tests in (1, 5):
        bound = reference.t.ppf(1 - 0.025 / tests, found.spread.freedom) * error
        assert stats.detectable(found.spread, tests) == pytest.approx(bound)
    said = [format.verdict(each, 0.049, 1, 1.0, "", higher_is_better=True) for each in (found, turned)]
    assert said == (["better", "worse"] if found.value > 0 else ["worse", "better"])
    assert format.verdict(found, 0.05, 1, 1.0, "", higher_is_better=True).startswith(format.NOT_SIGNIFICANT)


def test_pairs_need_all_seeds_of_one_side_and_two_of_them() -> None:
    ours, theirs = {0: 1.0, 1: 2.0, 2: 3.5}, {2: 1.0, 1: 1.0, 0: 1.0, 9: -50.0}
    found = stats.compare(ours, theirs)
    assert (found.paired, found.n) == (True, 3)
    assert found.value == pytest.approx(np.mean([0.0, 1.0, 2.5]))
    assert found.base == (1.0, 1.0, 1.0)
    assert not stats.compare({0: 1.0, 1: 2.0}, {1: 1.0, 2: 5.0}).paired
    assert not stats.compare({0: 1.0}, {0: 1.0, 1: 5.0}).paired


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert stats.holm([0.6, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []


def one_seed(sd: float = 1.0, each: float = 1.0) -> stats.Spread:
    return stats.Spread(math.nan, math.nan, sd, each)


@pytest.mark.parametrize("tests", [1, 5])
@pytest.mark.parametrize("difference", [0.15, 0.5, 1.0, 3.0, 9.57 / 2**0.5, 40.0])
def test_seeds_needed_have_the_power_and_one_fewer_has_not(difference: float, tests: int) -> None:
    n = stats.seeds_needed(difference, one_seed(), tests)
    assert n is not None

    def power(n: int) -> float:
        """By the definition of t: a normal variable over the root of a mean of squares."""
        bound, shift = reference.t.ppf(1 - 0.025 / tests, n - 1), difference * math.sqrt(n)
        below = np.linspace(0, 1, 20_001)[1:-1]
        scale = np.sqrt(reference.chi2.ppf(below, n - 1) / (n - 1))
        return float(np.mean(reference.norm.sf(bound * scale - shift)))

    assert power(n) >= 0.8
    assert n == 2 or power(n - 1) < 0.8


def test_seeds_needed_by_the_textbook_and_by_simulation() -> None:
    assert stats.seeds_needed(0.5, one_seed()) == 34  # Cohen (1988): d = 0.5, paired, two-sided 5 %, 80 %
    assert stats.seeds_needed(0.5, one_seed(math.sqrt(2), each=2.0)) == 64  # two groups of equal spread
    assert stats.seeds_needed(0.01, one_seed()) is stats.seeds_needed(0.0, one_seed()) is None
    assert stats.seeds_needed(1000.0, one_seed()) == 2
    assert stats.seeds_needed(1000.0, one_seed(), 1000) == 3  # two: a bound of 12,732 at one degree of freedom


def test_seeds_needed_where_scipy_has_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As older versions have none for a large shift of t."""
    expected = [stats.seeds_needed(40.0, one_seed(), tests) for tests in (1, 5, 100)]
    monkeypatch.setattr(special, "nctdtr", lambda *_: math.nan)
    assert [stats.seeds_needed(40.0, one_seed(), tests) for tests in (1, 5, 100)] == expected == [2, 3, 3]


@pytest.mark.parametrize("tests", [1, 5])
def test_seeds_that_separate_half_as_much(tests: int) -> None:
    of = {n: stats.detectable(stats.Spread(1 / math.sqrt(n), n - 1, 1.0), tests) for n in range(2, 20)}
    for now in (2, 3, 4):
        n = stats.seeds_to_detect(of[now] / 2, one_seed(), tests)
        assert of[n] <= of[now] / 2 < of[n - 1]


def test_shares_are_of_what_is_not_near_zero() -> None:
    assert stats.unit_of_shares([4.0, 4.1]) == pytest.approx(4.05)
    assert stats.unit_of_shares([-4.0, -4.1]) == pytest.approx(-4.05)
    assert stats.unit_of_shares([4.0]) == 4.0
    assert stats.unit_of_shares([0.02, 0.03, 0.01]) is stats.unit_of_shares([0.0]) is stats.unit_of_shares([]) is None


@pytest.mark.parametrize("higher", [True, False])
def test_expected_best_against_all_subsets(higher: bool) -> None:
    values = [0.3, 0.9, None, 0.5, 0.5, 0.1]
    best = max if higher else min
    worst = 0.1 if higher else 0.9
    filled = [worst if v is None else v for v in values]
    expected = [
        np.mean([best(chosen) for chosen in itertools.combinations(filled, k)]) for k in range(1, len(values) + 1)
    ]
    assert stats.best_of(values, higher_is_better=higher) == pytest.approx(expected)


def test_expected_best_of_many_trials_is_exact_and_monotone() -> None:
    values = random(4, 300).tolist()
    found = stats.best_of(values, higher_is_better=False)
    assert found[0] == pytest.approx(np.mean(values))
    assert found[-1] == pytest.approx(min(values))
    assert all(a >= b for a, b in itertools.pairwise(found))
    assert stats.best_of([None, None], higher_is_better=True) == ()


# ---- equal values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}),
        ({0: 0.1 + 0.2, 1: 0.3 + 1e-16}, {0: 0.1, 1: 0.1}),  # equal but for rounding
        ({0: 2.0, 1: 2.0}, {5: 1.0, 6: 1.0}),
    ],
)
def test_no_spread_is_no_test(ours: dict[int, float], theirs: dict[int, float]) -> None:
    found = stats.compare(ours, theirs)
    assert found.value is not None
    assert found.p_value is found.low is found.spread is None
    said = format.verdict(found, None, 0, 1.0, "", higher_is_better=False)
    if found.value:
        assert said.startswith("not tested: +")
        assert "all equal" in said
    else:
        assert said == "not tested: identical with each of 2 seeds"


def test_equal_values_have_no_interval() -> None:
    assert stats.interval([4.0, 4.0]) == stats.interval([0.0, 0.0]) == (None, None)
    assert stats.interval([0.1 + 0.2, 0.3, 0.3]) == (None, None)  # equal but for rounding
    assert stats.interval([4.0, 4.0 + 1e-9])[0] is not None
