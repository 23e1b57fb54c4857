from typing import Any

import pytest
from recorded import run
from tabled import searched, seeds, table, warned

from caspr_cli.report.model import Run


def test_a_clean_study_has_no_warnings() -> None:
    runs = []
    for optim in ("caspr", "adamw"):
        runs += searched(optim, [4.2, 4.0, 4.1]) + seeds(optim, [4.0, 4.1, 4.05], 1, optim__lr=1e-3)
    assert table(runs).warnings == ()


def test_a_value_at_the_edge_of_what_was_tried() -> None:
    made = table(searched("caspr", [4.2, 4.1, 4.0]))
    assert warned(made, "caspr: lr=0.01 is the largest of 3 tried (0.0001 to 0.01)")
    assert warned(table(searched("caspr", [4.0, 4.1, 4.2])), "lr=0.0001 is the smallest of 3 tried")
    assert not warned(table(searched("caspr", [4.2, 4.1])), "tried")


def test_budgets_that_are_unequal_or_not_spent() -> None:
    made = table(searched("caspr", [4.2, 4.0, 4.1]) + searched("adamw", [4.0]))
    assert warned(made, "unequal tuning", "caspr 3", "adamw 1")
    thrice = [each for k in range(3) for each in seeds("adamw", [4.2, 4.1, 4.2], optim__lr=10.0 ** (k - 4))]
    chosen = table(searched("caspr", [4.2, 4.0, 4.1]) + thrice + seeds("sgd", [5.0, 5.1, 5.0]))
    assert warned(chosen, "unequal tuning, seeds that select: ", "caspr 1", "adamw 3")
    assert not warned(made, "seeds that select: ")
    search = {"search__name": "s", "search__trials": 5, "search__space__optim__lr__log": [1e-4, 1e-1]}
    part = [*searched("caspr", [4.2, None], **search), run("caspr", 0, None, "running", optim__lr=9.0, **search)]
    assert warned(table(part), "caspr: 2 of 5 trials ended, 1 running")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"provenance": {"code": {"commit": "9" * 40, "diff_sha256": "e3b0c44298fc1c14"}}},
            ["different code: 01234567 with changes feedfeed (caspr, 3 runs); 99999999 (adamw, 3 runs)"],
        ),
        ({"provenance": {"packages": {"torch": "2.8"}}}, ["different torch: 2.8 (adamw, 3 runs); 2.9.0 (caspr"]),
        (
            {"provenance": {"device": {"type": "cuda", "name": "H100", "processes": 2, "threads": 1}}},
            ["different hardware: A CPU, 1 process, 1 thread (caspr, 3 runs); H100, 2 processes"],
        ),
        (
            {"trainer__precision": "bf16-mixed"},
            ["different trainer.precision: 32-true (caspr, 3 runs); bf16-mixed (adamw, 3 runs)"],
        ),
        ({"trainer__val_every": 50}, ["different trainer.val_every: 100 (caspr, 3 runs); 50 (adamw, 3 runs)"]),
        ({"task__layers": 8}, ["different task.layers: 4 (caspr, 3 runs); 8 (adamw, 3 runs)"]),
        ({"schedule__warmup": 0.2}, ["different schedule.warmup: 0.05 (caspr, 3 runs); 0.2 (adamw, 3 runs)"]),
        ({"task__batch_size": 64}, ["different task.batch_size: 32 (caspr, 3 runs); 64 (adamw"]),
    ],
)
def test_what_should_be_the_same_in_all_runs(other: dict[str, Any], said: list[str]) -> None:
    made = table(seeds("caspr", [4.0, 4.1, 4.2]) + seeds("adamw", [4.5, 4.6, 4.7], **other))
    assert len(made.warnings) == 1
    assert warned(made, *said)


def test_settings_of_which_all_optimizers_have_the_same_are_variants_and_no_warning() -> None:
    layers = [(optim, n) for optim in ("caspr", "adamw") for n in (4, 8)]
    runs = [each for optim, n in layers for each in seeds(optim, [4.0, 4.1, 4.2], task__layers=n)]
    assert table(runs, baseline="task.layers=4").warnings == ()
    less = [each for each in runs if each.config["optim.name"] == "caspr" or each.config["task.layers"] == 4]
    assert warned(
        table(less), "different task.layers: 4 (adamw and caspr task.layers=4, 6 runs); 8 (caspr task.layers=8"
    )


def test_a_setting_that_is_tuned_or_that_older_records_lack_is_no_difference() -> None:
    space = {"search__name": "s", "search__trials": 2, "search__space__schedule__warmup__choice": [0.05, 0.1]}
    tuned = [each for w in (0.05, 0.1) for each in seeds("caspr", [4.0, 4.1, 4.2], schedule__warmup=w, **space)]
    assert not warned(table(tuned + seeds("adamw", [4.0, 4.1, 4.2], schedule__warmup=0.2)), "different")
    old = seeds("adamw", [4.0, 4.1, 4.2], without=["schedule.warmup"])
    assert not warned(table(old + seeds("caspr", [4.0, 4.1, 4.2])), "different")


def test_ranges_of_a_search_that_are_not_the_same() -> None:
    def ranged(optim: str, high: float) -> list[Run]:
        search = {"search__name": "lr", "search__trials": 3, "search__space__optim__lr__log": [1e-4, high]}
        return searched(optim, [4.2, 4.0, 4.1], **search)

    made = table(ranged("caspr", 1e-1) + ranged("adamw", 1e-3))
    assert warned(made, "different search.space.optim.lr: log 0.0001,0.001 (adamw, 3 runs); log 0.0001,0.1 (caspr, 3")
    assert not warned(table(ranged("caspr", 1e-1) + ranged("adamw", 1e-1)), "search.space")


def test_an_interval_beyond_what_a_metric_can_be() -> None:
    accuracy = {"task__target__metric": "val/accuracy", "task__target__higher_is_better": True}
    near = table(seeds("caspr", [1.0, 0.999, 0.996], **accuracy) + seeds("adamw", [0.8, 0.81, 0.82], **accuracy))
    assert warned(near, "intervals beyond what the metric can be, ", "caspr (0.9932 to 1.0035)")
    assert not warned(near, "adamw (0")
    assert not warned(table(seeds("caspr", [1.0, 0.999, 0.996])), "beyond")  # a loss


def test_fewer_than_three_seeds() -> None:
    made = table(seeds("caspr", [4.0, 4.1]) + seeds("adamw", [4.5, 4.6, 4.7], 5))
    assert made.warnings == ("fewer than 3 seeds: caspr (n = 2)",)
