import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from recorded import run
from tabled import row, searched, seeds, table, warned

from caspr_cli.report import format
from caspr_cli.report.model import Run


def test_rows_are_compared_with_adamw_by_default_and_corrected() -> None:
    runs = seeds("adamw", [4.5, 4.52, 4.47]) + seeds("caspr", [4.0, 4.03, 3.98]) + seeds("shampoo", [4.49, 4.5, 4.51])
    made = table(runs)
    assert (made.baseline, row(made, "adamw").difference) == ("adamw", None)
    caspr, shampoo = row(made, "caspr").difference, row(made, "shampoo").difference
    assert (caspr.paired, caspr.n, caspr.verdict) == (True, 3, "better")
    assert caspr.p_holm == pytest.approx(2 * caspr.p_value)
    assert shampoo.p_holm == shampoo.p_value
    assert shampoo.verdict == (
        "no significant difference: +0.1 % (-1.7 to +1.8); n = 3 detects 2.6 %; about 5 seeds would detect half of that"
    )
    assert format.against(caspr) == "against adamw: better, -10.97 % (-11.29 to -10.65), p (Holm) < 0.001, 3 pairs"
    two = row(table([each for each in runs if each.config["optim.name"] != "shampoo"]), "caspr").difference
    assert ", p < 0.001, 3 pairs" in format.against(two)
    other = table(runs, baseline="caspr")
    assert row(other, "adamw").difference.verdict == "worse"
    single = row(table(seeds("adamw", [4.5]) + seeds("caspr", [4.0])), "caspr").difference
    assert single.verdict == "not tested: -11 %; one seed on a side has no spread"


FIVE = [4.01, 3.98, 4.015, 4.002, 3.99]


OTHERS = [each for optim in ("muon", "sgd", "soap") for each in seeds(optim, [4.0, 4.03, 3.96, 4.01, 4.0])]


@pytest.mark.parametrize(("others", "detects", "needs"), [([], "0.56", 13), (OTHERS, "0.87", 19)])
def test_what_is_not_significant_needs_as_many_seeds_as_the_correction(
    others: list[Run], detects: str, needs: int
) -> None:
    caspr = seeds("caspr", [v - 0.0153 for v in (4.002, 3.99, 4.01, 3.98, 4.015)])
    found = row(table(seeds("adamw", FIVE) + caspr + others), "caspr").difference
    assert found.tests == 1 + len(others) // 5
    assert found.verdict == (
        f"no significant difference: -0.38 % (-0.94 to +0.18); n = 5 detects {detects} %; "
        f"if the true difference is the one observed, about {needs} seeds would find it"
    )


def test_what_only_the_correction_takes_away_says_what_would_do_too() -> None:
    runs = seeds("adamw", FIVE)
    for k, optim in enumerate(("caspr", "muon", "soap")):
        runs += seeds(optim, [v - 0.0145 + 0.01 * ((s + k) % 3 - 1) for s, v in enumerate(FIVE)])
    found = row(table(runs), "muon").difference
    assert found.p_value < 0.05 <= found.p_holm
    assert re.search(r"; p = 0.0\d* alone, p \(Holm\) = 0.0.*; n = 5 detects .* seeds would find it$", found.verdict)


def test_differences_from_a_baseline_near_zero_are_in_units_of_the_metric() -> None:
    found = row(table(seeds("adamw", [0.01, -0.02, 0.015]) + seeds("caspr", [0.02, 0.0, -0.04])), "caspr").difference
    assert "%" not in found.verdict
    assert found.verdict.startswith("no significant difference: -0.01 (-0.11 to +0.09); n = 3 detects 0.10; ")


def test_seeds_without_a_counterpart_are_left_out_of_pairs_and_said() -> None:
    adamw = [4.0, 4.02, 3.98, 4.8, 4.8, 4.8]
    made = table(seeds("adamw", adamw) + seeds("caspr", [4.05, 4.08, 4.02]) + seeds("soap", [4.06, 4.08, 4.03]))
    difference = row(made, "caspr").difference
    assert (difference.paired, difference.n) == (True, 3)
    assert difference.share_of == pytest.approx(4.0)  # of those that are compared
    assert warned(made, "adamw: seeds 3, 4 and 5 left out of the comparison with caspr and soap, which have no value")


def test_seeds_that_chose_the_trial_on_one_side_alone_decide_nothing() -> None:
    """Of equal rows, one reported over the seeds that chose among six trials would be "better" in 9 % of tables."""
    fresh = searched("adamw", [4.4, 4.2, 4.3]) + seeds("adamw", [4.2, 4.22, 4.18, 4.21], 1, optim__lr=1e-3)
    lucky = [each for k in range(3) for each in seeds("caspr", [4.0, 4.02, 3.97], optim__lr=10.0 ** (k - 4))]
    made = table(fresh + lucky + seeds("sgd", [4.6, 4.61, 4.63, 4.6], 1))
    difference = row(made, "caspr").difference
    said = "its seeds selected the trial, too, which flatters it; the difference: -4.9 % (-6.1 to -3.7)"
    assert difference.verdict == f"not tested: {said}"
    assert difference.p_value is difference.p_holm is None
    assert row(made, "sgd").difference.tests == 1
    turned = table(fresh + lucky, baseline="caspr")
    assert row(turned, "adamw").difference.verdict.startswith("not tested: the seeds of caspr selected the trial, ")
    both = [replace(each, config=each.config | {"optim.name": "soap"}) for each in lucky]
    assert row(table(lucky + both, baseline="soap"), "caspr").difference.verdict.startswith("not tested: identical")
    one = table(searched("adamw", [4.4, 4.2]) + seeds("caspr", [4.0, 4.02, 3.97], 1))
    assert "the seeds of adamw selected the trial" in row(one, "caspr").difference.verdict  # and not: n = 1


def test_as_large_a_share_of_failed_seeds_on_both_sides_takes_no_verdict_away() -> None:
    adamw = seeds("adamw", [4.0, 4.02, 4.01, 3.99, None])
    ten = seeds("caspr", [None, 3.7, 3.71, 3.72, 3.69, 3.7, 3.71, 3.7, None, 3.7])
    assert row(table(adamw + ten), "caspr").difference.verdict == "better"
    verdict = row(table(adamw + ten[:9]), "caspr").difference.verdict
    assert verdict.startswith("not tested: 2 of 9 seeds failed; the others: ")


def test_the_test_metric_has_its_own_difference() -> None:
    def with_tests(of: Callable[[float], float]) -> list[Run]:
        runs = seeds("adamw", [4.5, 4.52, 4.47]) + seeds("caspr", [4.0, 4.03, 3.98])
        return [replace(one, result=one.result | {"test": {"test/loss": of(one.final or 0.0)}}) for one in runs]

    for sign in (1, -1):
        found = row(table(with_tests(lambda value, sign=sign: 9 + sign * value)), "caspr").difference
        edges = sorted([sign * found.low, sign * found.high])
        assert [found.test.value, found.test.low, found.test.high] == pytest.approx([sign * found.value, *edges])
        assert found.verdict == "better"
    runs = with_tests(lambda value: value)
    runs[0].result["test"] = {}
    one_less = row(table(runs), "adamw")
    assert (one_less.n, one_less.test.n) == (3, 2)


OWN = {"optim__statistics": "ema"}


def test_settings_alone_mean_each_optimizers_own_row() -> None:
    runs = []
    for optim, value in (("caspr", 4.0), ("shampoo", 5.0)):
        runs += seeds(optim, [value, value + 0.01, value - 0.01], **OWN)
        runs += seeds(optim, [value + 0.5, value + 0.52, value + 0.49], optim__statistics="accumulate")
    made = table(runs, baseline="statistics=ema")
    assert made.baseline == "statistics=ema"
    against = {
        each.label: each.difference and (each.difference.baseline, each.difference.verdict) for each in made.rows
    }
    assert against == {
        "caspr statistics=ema": None,
        "caspr statistics=accumulate": ("caspr statistics=ema", "worse"),
        "shampoo statistics=ema": None,
        "shampoo statistics=accumulate": ("shampoo statistics=ema", "worse"),
    }
    assert [each.label for each in made.rows if each.is_baseline] == ["caspr statistics=ema", "shampoo statistics=ema"]
    assert row(made, "caspr statistics=accumulate").difference.tests == 2
    lonely = table([*runs, *seeds("adamw", [4.0, 4.1, 4.2])], baseline="optim.statistics=ema")
    assert warned(lonely, "no baseline for adamw: no row with optim.statistics=ema")
    assert row(lonely, "shampoo statistics=accumulate").difference.verdict == "worse"


def test_a_baseline_that_is_not_there() -> None:
    made = table([run("caspr"), run("soap")])
    assert made.baseline is None
    assert warned(made, "no baseline: there is no adamw; choose a row with --baseline")
    two = table([run(optim__eps=1e-8), run(optim__eps=1e-7)])
    assert warned(two, "no baseline: 2 rows are adamw; ", "'adamw eps=1e-07'")


@pytest.mark.parametrize(
    ("wanted", "meant"),
    [
        ("caspr order=2 eps=1e-06", "caspr eps=1e-06 order=2"),
        ("caspr optim.order=2.0 eps=1.0e-6", "caspr eps=1e-06 order=2"),
        ("caspr order=inf", "caspr eps=1e-06 order=inf"),  # the only one of that order
        ("caspr order=2", None),
        ("adamw", "adamw"),
        ("adamw task.layers=4", "adamw"),  # which the label has no need to show
        *(
            (f"caspr {word}", "caspr betas=0.9,0.999 eps=1e-06 order=2")  # as YAML, the table and the command line do
            for word in ("betas=[0.9,0.999]", "betas=0.9,0.999", "optim.betas=[0.9,0.999]")
        ),
    ],
)
def test_a_baseline_may_be_called_by_its_settings_in_any_notation(wanted: str, meant: str | None) -> None:
    runs = [run("caspr", optim__eps=eps, optim__order=2.0) for eps in (1e-6, 1e-4)]
    runs += [run("caspr", optim__eps=1e-6, optim__order=float("inf")), run("adamw")]
    if "betas" in wanted:
        runs.append(run("caspr", optim__eps=1e-6, optim__order=2.0, optim__betas=[0.9, 0.999]))
    assert table(runs, baseline=wanted).baseline == meant
