from typing import Any

import pytest
from recorded import run
from tabled import searched, seeds

from caspr_cli.report import export, terminal
from caspr_cli.report.compare import tables
from caspr_cli.report.headline import costs, headline
from caspr_cli.report.model import Run

GPU = {"device": {"type": "cuda", "name": "H100", "processes": 1, "threads": 4}}
UP = {"task__name": "vit", "task__target__higher_is_better": True, "task__target__metric": "val/accuracy"}
CLOCK = "By the clock of these runs a step took"


def timed(runs: list[Run], seconds: float | None) -> list[Run]:
    """The same with so many seconds in all, for 300 steps."""
    for one in runs:
        one.result["seconds"] = seconds
    return runs


def ends(optim: str, mean: float, seconds: float | None = 30.0, n: int = 3, **keys: Any) -> list[Run]:
    """Seeds that differ by a hundredth, each row in another order, so that differences have a spread."""
    shift = {"adamw": (0.0, 0.01, 0.02), "caspr": (0.02, 0.0, 0.01)}.get(optim, (0.01, 0.02, 0.0))
    return timed(seeds(optim, [mean + d for d in shift[:n]], **keys), seconds)


def decayed(optim: str, mean: float, other: float) -> list[Run]:
    return ends(optim, mean) + seeds(optim, [other + 0.02, other + 0.01, other], optim__weight_decay=0.1)


def test_who_wins_where_and_what_it_costs() -> None:
    runs = ends("adamw", 4.5) + ends("caspr", 4.0, 39.0) + ends("muon", 3.9, 33.0)
    runs += ends("adamw", 0.50, **UP) + ends("caspr", 0.80, 45.0, **UP) + ends("muon", 0.51, 33.0, **UP)
    third = {"task__name": "resnet"}
    runs += ends("adamw", 4.0, **third) + ends("caspr", 4.4, 42.0, **third) + ends("muon", 3.999, 330.0, **third)
    made = tables(runs)
    assert headline(made) == (
        "Best mean: muon on 2 of 3 tasks and caspr on 1; caspr is significantly better than adamw on 2 and muon on 1, "
        "and worse than muon on 2 and adamw on 1."
    )
    assert costs(made) == f"{CLOCK} 1.1 times as long with muon as with adamw, 1.4 times with caspr."
    text = " ".join(" ".join(terminal.compared(made, [], [], 100)).split())
    assert f"in short {headline(made)} clock {costs(made)} 27 runs trained for" in text
    assert export.as_markdown(made, "x").startswith(f"**{headline(made)}**")


@pytest.mark.parametrize(
    ("runs", "how", "said"),
    [
        (ends("adamw", 4.5) + ends("caspr", 4.0), {},
         "Best mean: caspr, which is significantly better than adamw."),
        (ends("adamw", 4.0) + ends("caspr", 4.5), {},
         "Best mean: adamw; caspr is significantly worse than adamw."),
        (ends("adamw", 4.0) + ends("caspr", 4.5), {"baseline": "caspr"},
         "Best mean: adamw; caspr is significantly worse than adamw."),
        (ends("adamw", 4.5) + ends("muon", 4.0) + seeds("caspr", [4.46, 4.4, 4.47]), {},
         "Best mean: muon; caspr is significantly worse than muon, and not significantly different from adamw."),
        (ends("adamw", 4.5) + ends("muon", 4.0), {},  # without caspr the best row is the subject
         "Best mean: muon, which is significantly better than adamw."),
        (ends("caspr", 4.0) + ends("muon", 4.1), {},  # without a baseline, too
         "Best mean: caspr, which is significantly better than muon."),
        (ends("caspr", 4.0), {}, "Only caspr has a value on c4_lm."),
        (ends("caspr", 4.0) + ends("muon", 4.1, task__name="vit"), {},
         "Only caspr has a value on c4_lm; only muon has a value on vit."),
        ([run("caspr", 0, None, "failed")], {}, "No run is done with a finite value on c4_lm."),
        (ends("adamw", 4.5, n=1) + ends("caspr", 4.0, n=1), {}, "Best mean: caspr; no difference is tested."),
        (ends("adamw", 4.5) + ends("caspr", 4.0) + ends("muon", 4.0)[::-1], {},
         "Best mean: caspr and muon; caspr is significantly better than adamw, and not significantly different from "
         "muon."),
        (ends("adamw", 4.5) + ends("caspr", 4.2) + seeds("muon", [3.0, None, 3.1]), {},
         "Best mean: caspr (without muon, of which seeds failed); caspr is significantly better than adamw (not "
         "tested: muon)."),
        (ends("adamw", 4.5) + ends("caspr", 4.0) + ends("adamw", 5.5, trainer__max_steps=100)
         + ends("caspr", 5.0, trainer__max_steps=100), {},
         "Best mean: caspr on 2 of 2 tables; caspr is significantly better than adamw on 2, and worse than none."),
        (seeds("adamw", [4.5, 4.6]) + seeds("caspr", [4.5, 4.61]) + seeds("adamw", [5.5, 5.6], trainer__max_steps=100)
         + seeds("caspr", [5.5, 5.61], trainer__max_steps=100), {},
         "Best mean: adamw on 2 of 2 tables; caspr is not significantly different from adamw on 2."),
        (decayed("adamw", 4.5, 4.2) + decayed("caspr", 4.0, 4.1), {"baseline": "weight_decay=0"},
         "Best mean: caspr weight_decay=0; significantly better than each optimizer's own row with weight_decay=0: "
         "adamw weight_decay=0.1; worse: caspr weight_decay=0.1."),
        (searched("adamw", [4.5, 4.6]) + [run("adamw", k, 4.0 + 0.01 * k, trial="default") for k in (1, 2)], {},
         "Best mean: adamw untuned; no difference is tested."),
    ],
)  # fmt: skip
def test_one_sentence(runs: list[Run], how: dict[str, Any], said: str) -> None:
    assert headline(tables(runs, **how)) == said


@pytest.mark.parametrize(("seconds", "provenance"), [(None, {}), (0.0, {}), (39.0, GPU)])
def test_seconds_that_are_unknown_or_from_other_hardware_are_not_compared(
    seconds: float | None, provenance: dict[str, Any]
) -> None:
    runs = ends("adamw", 4.5) + ends("caspr", 4.0, seconds, provenance=provenance)
    assert costs(tables(runs)) == ""
    assert costs(tables(runs + ends("muon", 4.1, 3000.0))) == f"{CLOCK} 100 times as long with muon as with adamw."


def test_trials_count_for_the_seconds_of_a_step() -> None:
    """Of five runs one was on a busy machine: it is the only one that is reported, and the median is of all."""
    adamw = timed(searched("adamw", [4.5, 4.6, 4.7]), 30.0)
    busy, *others = searched("caspr", [4.0, 4.1, 4.2, 4.3, 4.4])
    found = costs(tables([*adamw, *timed([busy], 300.0), *timed(others, 33.0)]))
    assert found == f"{CLOCK} 1.1 times as long with caspr as with adamw."
