import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import special
from scipy import stats as reference

from caspr_cli.report import format, stats

VALUES = st.lists(st.floats(-100, 100).map(lambda x: round(x, 6)), min_size=2, max_size=8)


def by_seed(values: object) -> dict[int, float]:
    return dict(enumerate(np.asarray(values, dtype=float).tolist()))


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# ---- against scipy and by hand -----------------------------------------------------------------------------------


def test_a_summary_is_scipys() -> None:
    values = [3.9, 4.1, 4.3, 4.05]
    found = stats.summary(values)
    assert (found.n, found.mean, found.sd) == (4, pytest.approx(4.0875), pytest.approx(np.std(values, ddof=1)))
    expected = reference.t.interval(0.95, 3, loc=found.mean, scale=reference.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)


def test_of_one_value_and_of_equal_ones_there_is_no_interval() -> None:
    assert stats.summary([2.0]) == stats.Summary(1, 2.0)
    assert stats.summary([]) == stats.Summary(0)
    for equal in ([4.0, 4.0], [0.0, 0.0], [0.1 + 0.2, 0.3, 0.3]):  # the last but for rounding
        assert stats.summary(equal).low is stats.summary(equal).high is None
    assert stats.summary([4.0, 4.0 + 1e-9]).low is not None


def test_medians_of_times() -> None:
    assert [stats.median(times) for times in ([1, 9, 3], [1, math.inf], [1, 2, math.inf], [1, None, 2], [])] == [
        3, None, 2, None, None,
    ]  # fmt: skip


def test_paired_is_scipys() -> None:
    a, b = random(1, 5), random(2, 5) + 0.7
    expected = reference.ttest_rel(a, b)
    found = stats.compare(by_seed(a), by_seed(b))
    assert (found.paired, found.n) == (True, 5)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    error = np.std(a - b, ddof=1) / math.sqrt(5)
    assert found.base == pytest.approx(b)
    assert stats.detectable(found.spread) == pytest.approx(reference.t.ppf(0.975, 4) * error)
    assert stats.detectable(found.spread, 5) == pytest.approx(reference.t.ppf(0.995, 4) * error)


def test_welch_is_scipys_where_seeds_are_not_common() -> None:
    a, b = random(1, 4), 3 * random(2, 6) + 0.7
    expected = reference.ttest_ind(a, b, equal_var=False)
    found = stats.compare(by_seed(a), {100 + k: v for k, v in by_seed(b).items()})
    assert (found.paired, found.n) == (False, 4)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_pairs_need_all_seeds_of_one_side_and_two_of_them() -> None:
    ours, theirs = {0: 1.0, 1: 2.0, 2: 3.5}, {2: 1.0, 1: 1.0, 0: 1.0, 9: -50.0}
    found = stats.compare(ours, theirs)
    assert (found.paired, found.n) == (True, 3)
    assert found.value == pytest.approx(np.mean([0.0, 1.0, 2.5]))
    assert found.base == (1.0, 1.0, 1.0)
    assert not stats.compare({0: 1.0, 1: 2.0}, {1: 1.0, 2: 5.0}).paired
    assert not stats.compare({0: 1.0}, {0: 1.0, 1: 5.0}).paired


def test_a_few_common_seeds_do_not_throw_the_others_away() -> None:
    """Ten seeds a side, two of them common, two standard deviations apart: pairs of these two find nothing."""
    ours, theirs = by_seed(random(7, 10)), {8 + k: value + 2 for k, value in by_seed(random(8, 10)).items()}
    found = stats.compare(ours, theirs)
    assert (found.paired, found.n) == (False, 10)
    assert found.p_value == pytest.approx(reference.ttest_ind([*ours.values()], [*theirs.values()], equal_var=False)[1])
    assert found.value == pytest.approx(np.mean([*ours.values()]) - np.mean([*theirs.values()]))


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

    def power(n: int) -> float:
        """By the definition of t: a normal variable over the root of a mean of squares."""
        bound, shift = reference.t.ppf(1 - 0.025 / tests, n - 1), difference * math.sqrt(n)
        below = np.linspace(0, 1, 20_001)[1:-1]
        scale = np.sqrt(reference.chi2.ppf(below, n - 1) / (n - 1))
        return float(np.mean(reference.norm.sf(bound * scale - shift)))

    assert power(n) >= 0.8
    assert n == 2 or power(n - 1) < 0.8


def test_seeds_needed_by_the_textbook() -> None:
    assert stats.seeds_needed(0.5, one_seed()) == 34  # Cohen (1988): d = 0.5, paired, two-sided 5 %, 80 %
    assert stats.seeds_needed(0.5, one_seed(math.sqrt(2), each=2.0)) == 64  # two groups of equal spread
    assert stats.seeds_needed(0.01, one_seed()) is stats.seeds_needed(0.0, one_seed()) is None
    assert stats.seeds_needed(1000.0, one_seed()) == 2
    assert stats.seeds_needed(1000.0, one_seed(), 1000) == 3  # two: a bound of 12,732 at one degree of freedom


def test_seeds_needed_where_scipy_has_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions of SciPy give NaN for a large shift of t."""
    expected = [stats.seeds_needed(40.0, one_seed(), tests) for tests in (1, 5, 100)]
    monkeypatch.setattr(special, "nctdtr", lambda *_: math.nan)
    assert [stats.seeds_needed(40.0, one_seed(), tests) for tests in (1, 5, 100)] == expected == [2, 3, 3]


@pytest.mark.parametrize("tests", [1, 5])
def test_seeds_that_separate_half_as_much(tests: int) -> None:
    of = {n: stats.detectable(stats.Spread(1 / math.sqrt(n), n - 1, 1.0), tests) for n in range(2, 20)}
    for now in (2, 3, 4):
        n = stats.seeds_to_detect(of[now] / 2, one_seed(), tests)
        assert of[n] <= of[now] / 2 < of[n - 1]


@pytest.mark.parametrize(
    ("base", "share_of"),
    [([4.0, 4.1], 4.05), ([-4.0, -4.1], -4.05), ([4.0], 4.0), ([0.02, 0.03, 0.01], None), ([0.0], None), ([], None)],
)
def test_shares_are_of_what_is_not_near_zero(base: list[float], share_of: float | None) -> None:
    assert stats.Comparison(base=tuple(base)).share_of == pytest.approx(share_of)


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


@pytest.mark.parametrize("higher", [False, True])
@given(st.lists(st.one_of(st.none(), st.integers(0, 9).map(float)), min_size=1, max_size=5), st.integers(1, 4))
@settings(max_examples=40)
def test_the_range_of_the_best_is_that_of_all_draws_with_replacement(
    higher: bool, values: list[float | None], k: int
) -> None:
    finite = [value for value in values if value is not None]
    assume(finite)
    worst, best = (min(finite), max) if higher else (max(finite), min)
    filled = [worst if value is None else value for value in values]
    found = [best(drawn) for drawn in itertools.product(filled, repeat=k)]
    ranked = sorted(found, reverse=higher)  # the best first
    edges = [ranked[math.ceil(p * len(ranked) - 1e-9) - 1] for p in (0.025, 0.975)]
    assert stats.range_of_best(values, k, higher_is_better=higher) == (min(edges), max(edges))


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
    assert found.p_value is found.low is found.spread is None
    said = format.verdict(found, None, 0, higher_is_better=False)
    if found.value:
        assert said.startswith("not tested: +")
        assert "all equal" in said
    else:
        assert said == "not tested: identical with each of 2 seeds"


# ---- properties --------------------------------------------------------------------------------------------------


def pairs(ours: list[float], theirs: list[float]) -> tuple[dict[int, float], dict[int, float]]:
    n = min(len(ours), len(theirs))
    found = stats.compare(by_seed(ours[:n]), by_seed(theirs[:n]))
    assume(found.p_value is not None and found.high - found.low > 1e-4)
    return by_seed(ours[:n]), by_seed(theirs[:n])


@settings(max_examples=60, deadline=None)
@given(VALUES, VALUES, st.booleans())
def test_swapping_sides_flips_the_verdict(ours: list[float], theirs: list[float], higher: bool) -> None:
    a, b = pairs(ours, theirs)
    one, other = stats.compare(a, b), stats.compare(b, a)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    flipped = {"better": "worse", "worse": "better"}
    first, second = (format.verdict(c, c.p_value, 1, higher_is_better=higher) for c in (one, other))
    assert flipped.get(first, format.NOT_SIGNIFICANT) == second.partition(":")[0]


# ---- by simulation -----------------------------------------------------------------------------------------------

DRAWS = 10_000


@pytest.mark.parametrize("paired", [True, False])
def test_no_more_than_one_table_in_twenty_claims_a_difference_that_is_not_there(paired: bool) -> None:
    """Five rows of three seeds without a difference: how often does any row get a verdict?"""
    tables, first = random(5, DRAWS // 5, 5, 3), 10 * (not paired)  # other seeds: Welch
    claimed = uncorrected = 0
    for base, *rows in tables:
        theirs = {first + seed: value for seed, value in by_seed(base).items()}
        found = [stats.compare(by_seed(row), theirs) for row in rows]
        raw = [one.p_value for one in found]
        said = [
            format.verdict(one, p, len(rows), higher_is_better=True)
            for one, p in zip(found, stats.holm(raw), strict=True)
        ]
        claimed += any(words in ("better", "worse") for words in said)
        uncorrected += min(raw) < 0.05
    assert 0.01 * len(tables) < claimed <= 0.06 * len(tables)  # 0.05 and two standard errors
    assert uncorrected > 0.08 * len(tables)  # without the correction it would not hold
