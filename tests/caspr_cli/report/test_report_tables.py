from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from recorded import run

from caspr_cli.report.errors import ReportError
from caspr_cli.report.model import Row, Run, Table
from caspr_cli.report.tables import tables


def table(runs: Sequence[Run], **how: Any) -> Table:
    (made,) = tables(runs, **how)
    return made


def row(made: Table, label: str) -> Row:
    (found,) = [each for each in made.rows if each.label == label]
    return found


def seeds(optim: str, values: Sequence[float | None], first: int = 0, **keys: Any) -> list[Run]:
    return [run(optim, first + k, value, **keys) for k, value in enumerate(values)]


def warned(made: Table, *words: str) -> bool:
    return any(all(word in line for word in words) for line in made.warnings)


# ---- rows and labels ---------------------------------------------------------------------------------------------


def test_one_table_for_each_task_scale_and_kind_of_data() -> None:
    made = tables(
        [run(), run(scale="long"), run(task__data="files"), run(task__name="vit"), run(task__target__metric="val/map")]
    )
    assert [(t.task, t.scale, t.data, t.metric) for t in made] == [
        ("c4_lm", "long", "sample", "val/loss"),
        ("c4_lm", "sample", "files", "val/loss"),
        ("c4_lm", "sample", "sample", "val/loss"),
        ("c4_lm", "sample", "sample", "val/map"),
        ("vit", "sample", "sample", "val/loss"),
    ]


def test_what_changes_no_number_makes_no_row() -> None:
    ignored = {"resume": "never", "output_dir": "b", "debug": "fast", "trainer__devices": 2, "task__root": "/x"}
    made = table([run(seed=0), run(seed=1, **ignored), run(seed=2, task__target__value=4.4, search__trials=9)])
    assert [(each.label, each.n) for each in made.rows] == [("adamw", 3)]


def test_labels_show_what_differs_within_an_optimizer_and_nothing_else() -> None:
    made = table(
        [
            run("caspr", optim__eps=1e-6, optim__order=2.0),
            run("caspr", optim__eps=1e-4, optim__order=2.0),
            run("caspr", optim__eps=1e-4, optim__order=float("inf"), task__layers=2),
            run("adamw", optim__eps=1e-8, optim__betas=[0.9, 0.99]),
        ]
    )
    assert {each.label for each in made.rows} == {
        "caspr task.layers=4 eps=1e-06 order=2",
        "caspr task.layers=4 eps=0.0001 order=2",
        "caspr task.layers=2 eps=0.0001 order=inf",
        "adamw",
    }


def test_a_key_that_older_records_lack_is_that_of_the_others_where_they_agree() -> None:
    old = run("caspr", 0, without=["schedule.warmup", "trial", "search.name", "trainer.precision"])
    assert [each.n for each in table([old, run("caspr", 1)]).rows] == [2]
    null = [old, run("caspr", 1, optim__root_dtype=None), run("caspr", 2, optim__root_dtype="bfloat16")]
    assert [(each.label, each.n) for each in table(null).rows] == [
        ("caspr root_dtype=bfloat16", 1),
        ("caspr root_dtype=null", 2),
    ]
    several = [old, run("caspr", 1), run("caspr", 2, schedule__warmup=0.1)]
    assert {each.label for each in table(several).rows} == {
        "caspr schedule.warmup=-",
        "caspr schedule.warmup=0.05",
        "caspr schedule.warmup=0.1",
    }


def test_tuned_keys_are_those_of_the_search_and_can_be_said() -> None:
    space = {
        "search__name": "s",
        "search__space__schedule__warmup__choice": [0.05, 0.1],
        "search__space__optim__betas__0__linear": [0.8, 0.9],
    }
    runs = [
        run("caspr", 0, 4.0, schedule__warmup=0.05, optim__betas=[0.8, 0.95], trial=0, **space),
        run("caspr", 0, 3.9, schedule__warmup=0.1, optim__betas=[0.9, 0.95], trial=1, **space),
    ]
    (only,) = table(runs).rows
    assert (only.label, len(only.trials), only.selected.index) == ("caspr", 2, 1)
    assert only.selected.values == {"optim.betas.0": 0.9, "optim.lr": 0.003, "schedule.warmup": 0.1}
    said = table(runs, tuned=["schedule.warmup"])
    assert {each.label for each in said.rows} == {"caspr betas=0.8,0.95", "caspr betas=0.9,0.95"}


def test_a_record_that_is_there_twice_counts_once_and_the_one_that_has_come_further() -> None:
    made = table(
        [run(seed=0, final=4.0), run(seed=0, final=None, state="running", output_dir="b"), run(seed=1, final=4.2)]
    )
    assert made.rows[0].mean == pytest.approx(4.1)
    assert warned(made, "adamw: 1 record of a trial and seed that another has too")


# ---- selection ---------------------------------------------------------------------------------------------------


def searched(optim: str, values: Sequence[float | None], seed: int = 0, **keys: Any) -> list[Run]:
    """A trial for each value, at learning rates that grow; None: failed."""
    return [
        run(optim, seed, v, "failed" if v is None else "done", optim__lr=10.0 ** (k - 4), **keys)
        for k, v in enumerate(values)
    ]


def test_validation_selects_and_fresh_seeds_report() -> None:
    runs = searched("caspr", [4.2, 3.9, 4.1]) + seeds("caspr", [4.0, 4.05], 1, optim__lr=1e-3)
    found = table(runs).rows[0]
    assert found.selected.values == {"optim.lr": 1e-3}
    assert ([each.seed for each in found.runs], found.fresh, found.n) == ([1, 2], True, 2)
    assert found.mean == pytest.approx(4.025)
    assert found.best_of == pytest.approx([np.mean([4.2, 3.9, 4.1]), (4.1 + 2 * 3.9) / 3, 3.9])
    assert found.budget == {"done": 3}
    assert not warned(table(runs), "flatters")


def test_one_fresh_seed_is_too_few_so_all_are_reported_with_a_warning() -> None:
    made = table(searched("caspr", [4.2, 3.9]) + seeds("caspr", [4.0], 1, optim__lr=1e-3))
    assert ([each.seed for each in made.rows[0].runs], made.rows[0].fresh) == ([0, 1], False)
    assert warned(made, "seeds that chose the trial are among those reported", "caspr")


def test_without_a_choice_every_seed_is_fresh() -> None:
    made = table(seeds("caspr", [4.0, 4.1, 4.2]))
    assert (made.rows[0].fresh, made.rows[0].n) == (True, 3)
    assert made.warnings == ()


def test_the_mean_over_common_seeds_selects_and_a_lucky_seed_does_not() -> None:
    low = seeds("caspr", [3.0, 4.9], 0, optim__lr=1e-3)
    high = seeds("caspr", [3.5, 3.6, 9.0], 0, optim__lr=1e-2)  # seed 2 is not common
    assert table(low + high).rows[0].selected.values == {"optim.lr": 1e-2}


def test_a_failed_trial_is_worst_and_a_failed_seed_makes_it_so() -> None:
    runs = searched("caspr", [None, 4.1]) + seeds("caspr", [4.0, 4.05], 1, optim__lr=1e-4)
    found = table(runs).rows[0]
    assert found.selected.values == {"optim.lr": 1e-3}
    assert found.budget == {"failed": 1, "done": 1}
    assert found.best_of == pytest.approx([4.1, 4.1])
    not_finite = table([*searched("caspr", [4.1]), run("caspr", 0, None, optim__lr=1.0)]).rows[0]
    assert (not_finite.selected.values, not_finite.budget) == ({"optim.lr": 1e-4}, {"done": 1, "failed": 1})


def test_where_no_seed_is_common_the_commonest_decides() -> None:
    runs = searched("caspr", [4.2, 4.1]) + seeds("caspr", [1.0, 1.0], 5, optim__lr=1.0)
    made = table(runs)
    assert made.rows[0].selected.values == {"optim.lr": 1e-3}
    assert warned(made, "caspr: 1 trial without seed 0, which chooses, left out")


def test_rows_do_not_lend_each_other_trials() -> None:
    runs = searched("caspr", [4.2, 4.0], optim__eps=1e-4) + searched("caspr", [3.0, 4.4], optim__eps=1e-6)
    found = {each.label: each.selected.values["optim.lr"] for each in table(runs).rows}
    assert found == {"caspr eps=0.0001": 1e-3, "caspr eps=1e-06": 1e-4}


def test_higher_is_better_selects_the_highest_and_sorts_so() -> None:
    up = {"task__target__metric": "val/map", "task__target__higher_is_better": True, "task__target__value": 0.5}
    made = table(searched("caspr", [0.2, 0.7, 0.5], **up) + seeds("adamw", [0.8], **up))
    assert [each.label for each in made.rows] == ["adamw", "caspr"]
    assert made.rows[1].selected.values == {"optim.lr": 1e-3}


# ---- seeds that failed, or have not finished ---------------------------------------------------------------------


def test_failed_seeds_are_counted_and_said() -> None:
    runs = [*seeds("caspr", [4.0, 4.2, None, 4.1]), run("caspr", 4, None, "failed"), run("caspr", 5, None, "running")]
    made = table(runs)
    found = made.rows[0]
    assert (found.n, len(found.runs)) == (3, 5)
    assert found.mean == pytest.approx(4.1)
    assert warned(made, "caspr: 3 of 5 seeds count", "2 (not finite)", "4 (failed: loss is nan)")
    assert warned(made, "caspr: not finished: seed 5 (running)")


def test_a_row_of_which_nothing_is_done_is_there_without_numbers() -> None:
    made = table([run("caspr", 0, None, "failed"), *seeds("adamw", [4.0, 4.1])])
    found = row(made, "caspr")
    assert (found.n, found.mean, found.selected, found.runs, found.best_of) == (0, None, None, (), ())
    assert made.rows[-1] is found
    assert warned(made, "caspr: no run is done with a finite value (trials: 1 failed)")
    assert found.difference.verdict == "cannot tell: no seed is done on one side"


# ---- targets -----------------------------------------------------------------------------------------------------


def test_times_to_the_target_are_medians_in_which_a_miss_is_infinite() -> None:
    slow = [(100, 10.0, 6.0), (200, 20.0, 5.0), (300, 30.0, 4.0)]
    never = [(300, 30.0, 6.0)]
    three = [run("caspr", 0, 4.0), run("caspr", 1, 4.0, curve=slow), run("caspr", 2, 6.0, curve=never)]
    found = table(three).rows[0]
    assert (found.steps_to_target, found.seconds_to_target, found.reached) == (300, 30.0, 2)
    two = table(three[1:]).rows[0]
    assert (two.steps_to_target, two.seconds_to_target, two.reached) == (None, None, 1)


def test_another_target_is_read_from_the_curves() -> None:
    fast = [(100, None, 4.0), (200, 20.0, 3.9)]
    made = table([run("caspr", 0, 4.0), run("adamw", 0, 3.9, curve=fast)], wanted={"c4_lm": 4.3})
    assert made.target == 4.3
    assert [(each.steps_to_target, each.seconds_to_target) for each in made.rows] == [(100, None), (200, 20.0)]


def test_a_run_that_failed_after_it_has_reached_it() -> None:
    failed = run("caspr", 0, 4.0, "failed")
    found = table([failed, run("caspr", 1, 4.0)]).rows[0]
    assert (found.reached, found.steps_to_target) == (2, 200)


def test_where_targets_differ_the_commonest_holds_for_all_and_is_said() -> None:
    runs = [*seeds("caspr", [4.0, 4.0]), run("adamw", 0, 4.0, task__target__value=4.9), run("adamw", 1, 4.0)]
    made = table(runs)
    assert made.target == 4.5
    assert row(made, "adamw").reached == 2
    assert warned(made, "targets of the runs differ (4.5, 4.9)", "4.5")


def test_without_a_target_nothing_is_reached() -> None:
    found = table([run(task__target__value=None)]).rows[0]
    assert (found.reached, found.steps_to_target, found.seconds_to_target) == (None, None, None)


# ---- against the baseline ----------------------------------------------------------------------------------------


def test_rows_are_compared_with_adamw_by_default_and_corrected() -> None:
    runs = seeds("adamw", [4.5, 4.52, 4.47]) + seeds("caspr", [4.0, 4.03, 3.98]) + seeds("shampoo", [4.49, 4.5, 4.51])
    made = table(runs)
    assert (made.baseline, row(made, "adamw").difference) == ("adamw", None)
    caspr, shampoo = row(made, "caspr").difference, row(made, "shampoo").difference
    assert (caspr.paired, caspr.n, caspr.verdict) == (True, 3, "better")
    assert caspr.p_holm == pytest.approx(2 * caspr.p_value)
    assert shampoo.p_holm == shampoo.p_value
    assert shampoo.verdict.startswith("cannot tell: n = 3 separates 1.8 %, the difference is 0.074 %; ")
    other = table(runs, baseline="caspr")
    assert row(other, "adamw").difference.verdict == "worse"


def test_one_seed_has_no_spread() -> None:
    made = table(seeds("adamw", [4.5]) + seeds("caspr", [4.0]))
    assert row(made, "caspr").difference.verdict == "cannot tell: n = 1 has no spread; the difference is 11.1 %"


def test_a_baseline_that_is_not_there() -> None:
    with pytest.raises(ReportError, match=r"--baseline adamv: no row is called so. Did you mean adamw\?"):
        tables([run()], baseline="adamv")
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
    ],
)
def test_a_baseline_may_be_called_by_its_settings_in_any_notation(wanted: str, meant: str | None) -> None:
    runs = [run("caspr", optim__eps=eps, optim__order=2.0) for eps in (1e-6, 1e-4)]
    runs += [run("caspr", optim__eps=1e-6, optim__order=float("inf")), run("adamw")]
    assert table(runs, baseline=wanted).baseline == meant


def test_keys_and_tasks_that_are_not_there() -> None:
    with pytest.raises(ReportError, match=r"--tuned optim.rl: no record has this key. Did you mean optim.lr\?"):
        tables([run()], tuned=["optim.rl"])
    with pytest.raises(ReportError, match=r"--target c4lm: no record is of this task. Did you mean c4_lm\?"):
        tables([run()], wanted={"c4lm": 1.0})


# ---- warnings ----------------------------------------------------------------------------------------------------


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
    search = {"search__name": "s", "search__trials": 5, "search__space__optim__lr__log": [1e-4, 1e-1]}
    part = [*searched("caspr", [4.2, None], **search), run("caspr", 0, None, "running", optim__lr=9.0, **search)]
    assert warned(table(part), "caspr: 2 of 5 trials ended, 1 running")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"provenance": {"data": {"hash": "ffff"}}}, ["different data: abcd (caspr, 3 runs); ffff (adamw, 3 runs)"]),
        (
            {"provenance": {"code": {"commit": "9" * 40, "diff_sha256": "e3b0c44298fc1c14"}}},
            ["different code: 01234567 with changes feedfeed (caspr, 3 runs); 99999999 (adamw, 3 runs)"],
        ),
        ({"provenance": {"packages": {"torch": "2.8"}}}, ["different torch: 2.8 (adamw, 3 runs); 2.9.0 (caspr"]),
        (
            {"provenance": {"device": {"type": "cuda", "name": "H100", "processes": 2, "threads": 1}}},
            ["different hardware: A CPU, 1 process, 1 thread, 32-true (caspr, 3 runs); H100, 2 processes"],
        ),
        ({"trainer__precision": "bf16-mixed"}, ["different hardware: ", "bf16-mixed (adamw"]),
        ({"trainer__max_steps": 400}, ["different trainer.max_steps: 300 (caspr, 3 runs); 400 (adamw"]),
        ({"task__batch_size": 64}, ["different task.batch_size: 32 (caspr, 3 runs); 64 (adamw"]),
    ],
)
def test_what_should_be_the_same_in_all_runs(other: dict[str, Any], said: list[str]) -> None:
    made = table(seeds("caspr", [4.0, 4.1, 4.2]) + seeds("adamw", [4.5, 4.6, 4.7], **other))
    assert len(made.warnings) == 1
    assert warned(made, *said)


def test_fewer_than_three_seeds() -> None:
    made = table(seeds("caspr", [4.0, 4.1]) + seeds("adamw", [4.5, 4.6, 4.7]))
    assert made.warnings == ("fewer than 3 seeds: caspr (n = 2)",)
