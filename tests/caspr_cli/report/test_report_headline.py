from __future__ import annotations

from typing import Any

import pytest
from recorded import run
from tabled import searched, seeds

from caspr_cli.report import markdown, terminal
from caspr_cli.report.compare import tables
from caspr_cli.report.headline import costs, headline
from caspr_cli.report.model import Run

GPU = {"device": {"type": "cuda", "name": "H100", "processes": 1, "threads": 4}}


def timed(runs: list[Run], seconds: float | None) -> list[Run]:
    """The same with so many seconds in all, for 300 steps."""
    for one in runs:
        one.result["seconds"] = seconds
    return runs


def ends(optim: str, mean: float, seconds: float | None = 30.0, n: int = 3, **keys: Any) -> list[Run]:
    """Seeds that differ by a hundredth, each row in another order, so that differences have a spread."""
    shift = {"adamw": (0.0, 0.01, 0.02), "caspr": (0.02, 0.0, 0.01)}.get(optim, (0.01, 0.02, 0.0))
    return timed(seeds(optim, [mean + d for d in shift[:n]], **keys), seconds)


def said(runs: list[Run], **how: Any) -> str:
    return headline(tables(runs, **how))


def took(runs: list[Run]) -> str:
    return costs(tables(runs))


def test_who_wins_where_and_what_it_costs() -> None:
    up = {"task__name": "vit", "task__target__higher_is_better": True, "task__target__metric": "val/accuracy"}
    runs = ends("adamw", 4.5) + ends("caspr", 4.0, 39.0) + ends("muon", 3.9, 33.0)
    runs += ends("adamw", 0.50, **up) + ends("caspr", 0.80, 45.0, **up) + ends("muon", 0.51, 33.0, **up)
    third = {"task__name": "resnet"}
    runs += ends("adamw", 4.0, **third) + ends("caspr", 4.4, 42.0, **third) + ends("muon", 3.999, 330.0, **third)
    assert said(runs) == (
        "Best mean: muon on 2 of 3 tasks and caspr on 1; caspr is significantly better than adamw on 2 and muon on 1, "
        "and worse than muon on 2 and adamw on 1."
    )
    assert took(runs) == (
        "By the clock of these runs a step took 1.1 times as long with muon as with adamw, 1.4 times with caspr."
    )


def test_one_task() -> None:
    runs = ends("adamw", 4.5) + ends("caspr", 4.0, 39.0)
    assert said(runs) == "Best mean: caspr, which is significantly better than adamw."
    assert took(runs) == "By the clock of these runs a step took 1.3 times as long with caspr as with adamw."


def test_the_baseline_may_win() -> None:
    lost = ends("adamw", 4.0) + ends("caspr", 4.5)
    assert said(lost) == "Best mean: adamw; caspr is significantly worse than adamw."
    assert said(lost, baseline="caspr") == said(lost)


def test_with_its_baseline_the_subject_is_what_the_table_says() -> None:
    """Here: no significant difference."""
    runs = ends("adamw", 4.5) + ends("muon", 4.0) + seeds("caspr", [4.46, 4.4, 4.47])
    (table,) = tables(runs)
    kind = next(row.kind for row in table.rows if row.label == "caspr")
    assert kind == "no significant difference"
    assert said(runs) == (
        "Best mean: muon; caspr is significantly worse than muon, and not significantly different from adamw."
    )


def test_without_caspr_the_best_row_is_the_subject() -> None:
    found = said(ends("adamw", 4.5) + ends("muon", 4.0))
    assert found == "Best mean: muon, which is significantly better than adamw."


def test_one_row_has_nothing_to_win_against() -> None:
    assert said(ends("caspr", 4.0)) == "Only caspr has a value on c4_lm."
    assert said(ends("adamw", 4.0)) == "Only adamw has a value on c4_lm."
    assert said([run("caspr", 0, None, "failed")]) == "No run is done with a finite value on c4_lm."


def test_no_baseline() -> None:
    apart = ends("caspr", 4.0) + ends("muon", 4.1, task__name="vit")
    assert said(apart) == "Only caspr has a value on c4_lm; only muon has a value on vit."
    found = said(ends("caspr", 4.0) + ends("muon", 4.1))
    assert found == "Best mean: caspr, which is significantly better than muon."


def test_two_lengths_of_a_task_are_two_tables() -> None:
    short = ends("adamw", 5.5, trainer__max_steps=100) + ends("caspr", 5.0, trainer__max_steps=100)
    found = said(ends("adamw", 4.5) + ends("caspr", 4.0) + short)
    assert found.startswith("Best mean: caspr on 2 of 2 tables; caspr is significantly better than adamw on 2, ")


def test_what_could_not_be_tested_is_no_difference() -> None:
    assert said(ends("adamw", 4.5, n=1) + ends("caspr", 4.0, n=1)) == "Best mean: caspr; no difference is tested."


def test_equal_means_share_the_place() -> None:
    runs = seeds("adamw", [4.5, 4.6]) + seeds("caspr", [4.0, 4.1]) + seeds("muon", [4.0, 4.1])
    assert said(runs).startswith("Best mean: caspr and muon; ")


def test_a_better_mean_of_the_seeds_that_did_not_fail_is_named() -> None:
    runs = ends("adamw", 4.5) + ends("caspr", 4.2) + seeds("muon", [3.0, None, 3.1])
    for one in runs:
        if one.final is None:
            one.status["state"] = "failed"
    assert said(runs) == (
        "Best mean: caspr (without muon, of which seeds failed); caspr is significantly better than adamw (not tested: "
        "muon)."
    )


@pytest.mark.parametrize(("seconds", "provenance"), [(None, {}), (0.0, {}), (39.0, GPU)])
def test_seconds_that_are_unknown_or_from_other_hardware_are_not_compared(
    seconds: float | None, provenance: dict[str, Any]
) -> None:
    runs = ends("adamw", 4.5) + ends("caspr", 4.0, seconds, provenance=provenance) + ends("muon", 4.1, 3000.0)
    assert took(runs) == "By the clock of these runs a step took 100 times as long with muon as with adamw."
    assert took(ends("adamw", 4.5) + ends("caspr", 4.0, seconds, provenance=provenance)) == ""


def test_trials_count_for_the_seconds_of_a_step() -> None:
    """Of five runs one was on a busy machine: it is the only one that is reported, and the median is of all."""
    adamw = timed(searched("adamw", [4.5, 4.6, 4.7]), 30.0)
    busy, *others = searched("caspr", [4.0, 4.1, 4.2, 4.3, 4.4])
    found = took([*adamw, *timed([busy], 300.0), *timed(others, 33.0)])
    assert found == "By the clock of these runs a step took 1.1 times as long with caspr as with adamw."


def test_each_optimizers_own_baseline() -> None:
    runs = ends("adamw", 4.5) + seeds("adamw", [4.21, 4.2, 4.22], optim__weight_decay=0.1)
    runs += ends("caspr", 4.0) + seeds("caspr", [4.12, 4.11, 4.1], optim__weight_decay=0.1)
    found = said(runs, baseline="weight_decay=0")
    assert found == (
        "Best mean: caspr weight_decay=0; significantly better than each optimizer's own row with weight_decay=0: "
        "adamw weight_decay=0.1; worse: caspr weight_decay=0.1."
    )


def test_an_untuned_row_that_wins_is_named_as_such() -> None:
    runs = searched("adamw", [4.5, 4.6]) + [run("adamw", k, 4.0 + 0.01 * k, trial="default") for k in (1, 2)]
    assert said(runs) == "Best mean: adamw untuned; no difference is tested."


def test_it_stands_at_the_top_of_every_report() -> None:
    made = tables(ends("adamw", 4.5) + ends("caspr", 4.0))
    first = headline(made)
    text = list(terminal.compared(made, [], [], 100))
    assert text[1].startswith("in short Best mean: caspr")
    assert " ".join(" ".join(text[1:4]).split()).startswith(f"in short {first}"[:180])
    assert markdown.compared(made, "x").startswith(f"**{first}**")
