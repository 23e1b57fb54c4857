import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from recorded import run
from tabled import row, searched, seeds, table, warned

from caspr_cli.common.errors import UserError
from caspr_cli.report import tuning
from caspr_cli.report.compare import tables
from caspr_cli.report.model import Run
from caspr_cli.report.profile import names
from caspr_cli.report.selection import where, with_common_labels

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
    ignored = {"resume": "never", "output_dir": "b", "trainer__devices": 2, "task__root": "/x"}
    made = table([run(seed=0), run(seed=1, **ignored), run(seed=2, task__target__value=4.4, search__trials=9)])
    assert [(each.label, each.n) for each in made.rows] == [("adamw", 3)]


def test_a_label_has_the_option_that_a_command_set_where_another_optimizer_has_another() -> None:
    """The label has neither what a search draws, nor what all optimizers of the table share."""
    words = {"command": ["caspr-train", "optim.exponent=1", "+optim.eps=1e-4", "optim.weight_decay=0.1"]}
    common = {"optim__eps": 1e-4}
    made = table([
        run("shampoo", provenance=words, optim__exponent=1.0, optim__weight_decay=0.1, **common),
        run("caspr", optim__exponent=0.5, optim__weight_decay=0.0, **common),
        run("adamw", optim__weight_decay=0.0, **common),
    ])  # fmt: skip
    assert {each.label for each in made.rows} == {"shampoo exponent=1", "caspr exponent=0.5", "adamw"}


def test_a_label_has_the_option_that_a_command_set_where_no_other_optimizer_has_it() -> None:
    shampoo = run("shampoo", provenance={"command": ["caspr-train", "optim.exponent=1"]}, optim__exponent=1.0)
    assert {each.label for each in table([shampoo, run("adamw")]).rows} == {"shampoo exponent=1", "adamw"}
    assert [each.label for each in table([shampoo]).rows] == ["shampoo exponent=1"]


def test_a_label_has_no_option_that_was_set_to_what_the_optimizer_has_anyway() -> None:
    """As another run says, of any table, whose command did not set it."""
    command = {"command": ["caspr-train", "optim.graft=rms", "optim.exponent=0"]}
    by_hand = run("caspr", provenance=command, optim__graft="rms", optim__exponent=0.0)
    usual = run("caspr", task="vit", optim__graft="rms", optim__exponent=0.5)
    found = tables([by_hand, run("adamw"), usual])
    assert {row.label for each in found for row in each.rows} == {"caspr exponent=0", "adamw", "caspr exponent=0.5"}


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
        "caspr eps=1e-06 order=2 task.layers=4",
        "caspr eps=0.0001 order=2 task.layers=4",
        "caspr eps=0.0001 order=inf task.layers=2",
        "adamw",
    }


ONE_AT_A_TIME = {"axes": ("all", "first"), "eps": (1e-6, 1e-4), "interval": (10, 100), "nesterov": (True, False)}


def ablation(*, task: str = "c4_lm", **changed: Any) -> Run:
    """A run of ``caspr`` with these of its options changed by its command."""
    options = {key: changed.get(key, own) for key, (own, _) in ONE_AT_A_TIME.items()}
    command = ["caspr-train", *(f"optim.{key}={value}" for key, value in changed.items())]
    keys = {f"optim__{key}": value for key, value in options.items()}
    return run("caspr", task__name=task, provenance={"command": command}, **keys)


def test_labels_of_many_keys_leave_out_what_the_optimizer_has_by_itself() -> None:
    """So that a table of one option at a time can be read; and each row can be the baseline by its label."""
    runs = [ablation(), *(ablation(**{key: other}) for key, (_, other) in ONE_AT_A_TIME.items())]
    labels = {"caspr", "caspr axes=first", "caspr eps=0.0001", "caspr interval=100", "caspr nesterov=false"}
    made = table([*runs, ablation(axes="first", nesterov=False)], baseline="caspr")
    assert {each.label for each in made.rows} == labels | {"caspr axes=first nesterov=false"}
    assert made.baseline == "caspr"
    assert {each.label for each in table(runs[:3]).rows} >= {"caspr axes=all eps=1e-06"}  # two keys


def test_labels_of_many_keys_keep_a_value_of_one_of_two_versions() -> None:
    newer = [replace(one, config=one.config | {"optim.eps": 1e-5}) for one in (ablation(), ablation(nesterov=False))]
    older = [ablation(), *(ablation(**{key: ONE_AT_A_TIME[key][1]}) for key in ("axes", "interval"))]
    assert {each.label for each in table([*older, *newer]).rows} == {
        "caspr eps=1e-06", "caspr axes=first eps=1e-06", "caspr eps=1e-06 interval=100",
        "caspr eps=1e-05", "caspr eps=1e-05 nesterov=false",
    }  # fmt: skip


def test_labels_of_many_keys_are_those_of_other_tables() -> None:
    """What one table leaves out another one does, too, where rows are named over all tables."""
    runs = [ablation(), *(ablation(**{key: other}) for key, (_, other) in ONE_AT_A_TIME.items())]
    few = [ablation(task="vit"), ablation(task="vit", axes="first")]
    one, other = with_common_labels(tables([*runs, *few]))
    assert {each.label for each in other.rows} == {"caspr", "caspr axes=first"} < {each.label for each in one.rows}


def test_a_value_with_blanks_stays_in_one_piece() -> None:
    runs = [run("my_opt", optim__mode=mode, optim__eps=eps) for mode, eps in (("a b", 1), ("c d", 2))]
    made = table(runs, baseline="my_opt mode=c d eps=2")
    assert made.baseline == "my_opt eps=2 mode=c d"
    (other,) = with_common_labels([made])
    assert {each.label for each in other.rows} == {"my_opt eps=1 mode=a b", "my_opt eps=2 mode=c d"}


def test_no_run_is_lost_where_values_are_written_alike() -> None:
    number = seeds("adamw", [4.0, 4.1], optim__weight_decay=0.0) + seeds("adamw", [4.2], 2, optim__weight_decay=0)
    assert [(each.label, each.n) for each in table(number).rows] == [("adamw", 3)]
    words = seeds("adamw", [4.0, 4.1], optim__root_dtype=None) + seeds("adamw", [4.2], optim__root_dtype="null")
    words += seeds("adamw", [4.4], optim__root_dtype=False) + seeds("adamw", [4.5], optim__root_dtype=0)
    made = table(words)
    assert [(each.label, each.n) for each in made.rows] == [
        ("adamw root_dtype=null", 2),
        ("adamw root_dtype=null (2)", 1),
        ("adamw root_dtype=false", 1),
        ("adamw root_dtype=0", 1),
    ]
    assert table(words, baseline="adamw root_dtype=null (2)").baseline == "adamw root_dtype=null (2)"


def test_runs_that_look_whether_all_works_are_left_out_and_said() -> None:
    look = run(seed=0, final=7.0, debug="fast", trainer__max_steps=20)
    made = table([*seeds("adamw", [4.0, 4.1, 4.2]), *seeds("caspr", [4.0, 4.1, 4.2]), look])
    assert (made.baseline, len(made.rows)) == ("adamw", 2)
    assert made.warnings == ("1 record with debug=fast left out",)
    other = run(seed=0, debug="fast", task__name="vit")
    assert warned(table([*seeds("adamw", [4.0]), other]), "1 record with debug=fast left out")
    with pytest.raises(UserError, match="nothing to compare: 1 record with debug=fast, which is left out"):
        tables([look])


def test_a_table_is_on_one_data_set() -> None:
    other = {"task__root": "/b", "provenance": {"data": {"hash": "ffff"}}}
    unknown = run("caspr", 3, None, "failed", provenance={"data": None})
    made = tables([*seeds("caspr", [4.0, 4.1, 4.2]), unknown, *seeds("caspr", [2.0, 2.1], **other)])
    assert [(each.data_hash, each.rows[0].n, len(each.rows[0].runs)) for each in made] == [
        ("abcd", 3, 4),
        ("ffff", 2, 2),
    ]
    assert warned(made[0], "records of c4_lm on different data: these are on abcd, those on ffff have")
    assert warned(made[1], "these are on ffff, those on abcd")


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


def test_duplicates_are_named_by_what_differs_and_chosen_by_what_is_in_them() -> None:
    code = {"code": {"commit": "9" * 40}}
    one, other = run(final=4.0), run(final=4.5, trainer__devices=2, trainer__accumulate=2, provenance=code)
    moved = replace(one, path=other.path), replace(other, path=one.path)
    both = [table(records) for records in ([one, other], [other, one], moved)]
    assert len({made.rows[0].mean for made in both}) == 1
    running = table([one, run(final=None, state="running", output_dir="b"), run(seed=1, final=4.2)])
    assert running.rows[0].mean == pytest.approx(4.1)  # of those that have come further
    assert warned(running, "adamw: 1 record of a trial and seed that another has too, with the same settings")
    assert warned(both[0], "another has too, differing in code, trainer.accumulate and trainer.devices: ")
    assert warned(both[0], "different code: ", "99999999")  # also of the one that does not count


# ---- selection ---------------------------------------------------------------------------------------------------


def chosen(runs: Sequence[Run]) -> dict[str, float]:
    """The selected learning rate of each row."""
    return {each.label: each.selected.values["optim.lr"] for each in table(runs).rows if each.selected}


def test_validation_selects_and_held_out_seeds_report() -> None:
    runs = searched("caspr", [4.2, 3.9, 4.1]) + seeds("caspr", [4.0, 4.05], 1, optim__lr=1e-3)
    found = table(runs).rows[0]
    assert ([each.seed for each in found.runs], found.held_out, found.n) == ([1, 2], True, 2)
    assert (found.selected.values, found.mean) == ({"optim.lr": 1e-3}, pytest.approx(4.025))
    assert found.best_of == pytest.approx([np.mean([4.2, 3.9, 4.1]), (4.1 + 2 * 3.9) / 3, 3.9])
    assert found.budget == {"done": 3}
    assert not warned(table(runs), "flatters")
    up = {"task__target__metric": "val/map", "task__target__higher_is_better": True, "task__target__value": 0.5}
    made = table(searched("caspr", [0.2, 0.7, 0.5], **up) + seeds("adamw", [0.8], **up))
    assert [each.label for each in made.rows] == ["adamw", "caspr"]
    assert made.rows[1].selected.values == {"optim.lr": 1e-3}
    assert made.rows[0].held_out  # nothing was chosen


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        # No row lends another its trials.
        (searched("caspr", [4.2, 4.0], optim__eps=1e-4) + searched("caspr", [3.0, 4.4], optim__eps=1e-6),
         {"caspr eps=0.0001": 1e-3, "caspr eps=1e-06": 1e-4}),
        # The mean over common seeds selects: seed 2 is not common, and a lucky seed does not decide.
        (seeds("caspr", [3.0, 4.9], 0, optim__lr=1e-3) + seeds("caspr", [3.5, 3.6, 9.0], 0, optim__lr=1e-2),
         {"caspr": 1e-2}),
        # A failed trial is the worst, and so is one whose loss is not finite.
        (searched("caspr", [None, 4.1]), {"caspr": 1e-3}),
        ([*searched("caspr", [4.1]), run("caspr", 0, None, optim__lr=1.0)], {"caspr": 1e-4}),
        # Where no seed is common the commonest decides.
        (searched("caspr", [4.2, 4.1]) + seeds("caspr", [1.0, 1.0], 5, optim__lr=1.0), {"caspr": 1e-3}),
    ],
)  # fmt: skip
def test_which_trial_is_selected(runs: list[Run], expected: dict[str, float]) -> None:
    assert chosen(runs) == pytest.approx(expected)


def test_trials_that_were_added_at_an_edge_say_nothing_of_smaller_budgets() -> None:
    """They are drawn around the best of the others, so they are no draws of the search."""
    extended = {"search__extend": True, "search__trials": 3}
    runs = [
        run("caspr", 0, value, optim__lr=10.0**-k, trial=k, **extended)
        for k, value in enumerate([4.2, 3.9, 4.1, 3.5, 3.4])
    ]
    found = table(runs).rows[0]
    assert found.selected.index == 4
    assert found.best_of == pytest.approx([np.mean([4.2, 3.9, 4.1]), (4.1 + 2 * 3.9) / 3, 3.9])
    made = tuning.by_budget(table(runs))
    assert made.caption == tuning.BY_BUDGET + tuning.FURTHER
    assert made.heads == ["row", "0 trials", "3 trials"]
    assert made.rows[0][2] == "3.9000 (3.9000 to 4.2000)"
    only_added = [run("caspr", 0, None, optim__lr=1.0, trial=0, **extended), *runs[3:]]
    assert table(only_added).rows[0].best_of == ()
    assert not warned(table(only_added), "nothing selected")


def test_budgets_count_trials_by_the_seeds_that_select() -> None:
    failed = table(searched("caspr", [None, 4.1]) + seeds("caspr", [4.0, 4.05], 1, optim__lr=1e-4)).rows[0]
    assert (failed.budget, failed.best_of) == ({"failed": 1, "done": 1}, pytest.approx((4.1, 4.1)))
    not_finite = table([*searched("caspr", [4.1]), run("caspr", 0, None, optim__lr=1.0)]).rows[0]
    assert not_finite.budget == {"done": 1, "failed": 1}


def test_what_is_odd_about_a_selection_is_said() -> None:
    one = table(searched("caspr", [4.2, 3.9]) + seeds("caspr", [4.0], 1, optim__lr=1e-3))  # too few to report alone
    assert ([each.seed for each in one.rows[0].runs], one.rows[0].held_out) == ([0, 1], False)
    assert warned(one, "the reported seeds selected the trial, too", "caspr")
    other = table(searched("caspr", [4.2, 4.1]) + seeds("caspr", [1.0, 1.0], 5, optim__lr=1.0))
    assert warned(other, "caspr: 1 trial without seed 0, which selects, left out")
    none = searched("caspr", [None, None]) + seeds("caspr", [4.0, 4.05], 1, optim__lr=1e-3)
    assert chosen(none) == {"caspr": 1e-3}
    assert warned(table(none), "caspr: every trial failed with seed 0, which selects: nothing selected lr=0.001")
    assert not warned(table([*none, run("caspr", 0, 4.0, optim__lr=1e-2)]), "nothing selected")
    # Seed 0 chose the first, which was run at held-out seeds; with seed 1 the second is selected, and has none.
    runs = searched("caspr", [4.0, 4.1]) + seeds("caspr", [4.0, 4.1, 4.0], 2, optim__lr=1e-4)
    assert not warned(table(runs), "held-out seeds, but")
    moved = table([*runs, run("caspr", 1, 4.6, optim__lr=1e-4), run("caspr", 1, 4.1, optim__lr=1e-3)])
    assert [each.seed for each in moved.rows[0].runs] == [0, 1]
    assert warned(moved, "caspr: lr=0.0001 has 3 held-out seeds, but seed 0 and 1 selects lr=0.001: run held")


# ---- seeds that failed, or have not finished ---------------------------------------------------------------------


def test_failed_seeds_are_counted_and_said() -> None:
    runs = [*seeds("caspr", [4.0, 4.2, None, 4.1]), run("caspr", 4, None, "failed"), run("caspr", 5, None, "running")]
    made = table(runs)
    found = made.rows[0]
    assert (found.n, len(found.runs)) == (3, 5)
    assert found.mean == pytest.approx(4.1)
    assert warned(made, "caspr: 3 of 5 seeds count", "2 (diverged: not finite at the end)", "4 (diverged: loss is nan)")
    assert warned(made, "caspr: not finished: seed 5 (running)")


def test_those_that_are_left_of_a_row_do_not_win() -> None:
    runs = seeds("adamw", [4.0, 4.02, 3.99, 4.01, 4.0]) + seeds("caspr", [3.7, 3.71, None, None, None])
    made = table(runs + seeds("soap", [4.6, 4.61, 4.62, 4.6, 4.6]))
    assert [each.label for each in made.rows] == ["adamw", "soap", "caspr"]
    difference = row(made, "caspr").difference
    assert difference.verdict.startswith("not tested: 3 of 5 seeds failed; the others: -7.6 % (-9.2 to -6.0)")
    assert difference.p_value is difference.p_holm is None
    assert row(made, "soap").difference.tests == 1
    turned = row(table(runs, baseline="caspr"), "adamw").difference
    assert turned.verdict.startswith("not tested: 3 of 5 seeds of caspr failed; the others: +")


def test_a_row_of_which_nothing_is_done_is_there_without_numbers() -> None:
    made = table([run("caspr", 0, None, "failed"), *seeds("adamw", [4.0, 4.1])])
    found = row(made, "caspr")
    assert (found.n, found.mean, found.selected, found.runs, found.best_of) == (0, None, None, (), ())
    assert made.rows[-1] is found
    assert warned(made, "caspr: no run is done with a finite value (trials: 1 failed)")
    assert found.difference.verdict == "not tested: no seed is done on one side"


# ---- targets -----------------------------------------------------------------------------------------------------


def test_times_to_the_target_are_medians_in_which_a_miss_is_infinite() -> None:
    slow = [(100, 10.0, 6.0), (200, 20.0, 5.0), (300, 30.0, 4.0)]
    never = [(300, 30.0, 6.0)]
    three = [run("caspr", 0, 4.0), run("caspr", 1, 4.0, curve=slow), run("caspr", 2, 6.0, curve=never)]
    found = table(three).rows[0]
    assert (found.steps_to_target, found.seconds_to_target, found.reached) == (300, 30.0, 2)
    two = table(three[1:]).rows[0]
    assert (two.steps_to_target, two.seconds_to_target, two.reached) == (None, None, 1)
    failed = table([run("caspr", 0, 4.0, "failed"), run("caspr", 1, 4.0)]).rows[0]
    assert (failed.reached, failed.steps_to_target) == (2, 200)
    without = table([run(task__target__value=None)]).rows[0]
    assert (without.reached, without.steps_to_target, without.seconds_to_target) == (None, None, None)


def test_another_target_is_read_from_the_curves() -> None:
    fast = [(100, None, 4.0), (200, 20.0, 3.9)]
    made = table([run("caspr", 0, 4.0), run("adamw", 0, 3.9, curve=fast)], wanted={"c4_lm": 4.3})
    assert made.target == 4.3
    assert [(each.steps_to_target, each.seconds_to_target) for each in made.rows] == [(100, None), (200, 20.0)]


def test_where_targets_differ_the_commonest_holds_for_all_and_is_said() -> None:
    runs = [*seeds("caspr", [4.0, 4.0]), run("adamw", 0, 4.0, task__target__value=4.9), run("adamw", 1, 4.0)]
    made = table(runs)
    assert made.target == 4.5
    assert row(made, "adamw").reached == 2
    assert warned(made, "targets of the runs differ (4.5, 4.9)", "4.5")


# ---- like with like ----------------------------------------------------------------------------------------------


def test_runs_of_another_length_have_a_table_of_their_own() -> None:
    short = seeds("caspr", [5.0, 5.1], trainer__max_steps=100) + seeds("adamw", [5.5, 5.6], trainer__max_steps=100)
    long, brief = tables(short + seeds("caspr", [4.0, 4.1]) + seeds("adamw", [4.5, 4.6]))
    assert [(each.steps, [row.label for row in each.rows]) for each in (long, brief)] == [
        (300, ["caspr", "adamw"]),
        (100, ["caspr", "adamw"]),
    ]
    assert long.rows[0].mean == pytest.approx(4.05)
    assert warned(long, "runs of c4_lm for 100 steps have a table of their own")
    assert warned(brief, "runs of c4_lm for 300 steps have a table of their own")
    assert names([long, brief]) == ["c4_lm 300 steps", "c4_lm 100 steps"]
    (together,) = tables(short, tuned=["trainer.max_steps"])  # asked for
    assert together.steps is None


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        ([], [0, 1, 2, 3]),
        (["optim=caspr,muon"], [0, 1, 3]),
        (["optim=caspr", "lr=1e-2"], [0]),
        (["optim.lr=0.01,0.003"], [0, 1, 2, 3]),
        (["state=failed"], [1]),
        (["state=done,running"], [0, 2, 3]),
        (["betas=[0.9,0.99]"], [3]),
        (["betas=0.9,0.99"], [3]),
        (["task=vit"], [3]),
        (["max_steps=300", "task.name=c4_lm", "seed=1,2"], [1, 2]),
        (["optm=caspr"], "--where optm=caspr: no record has this key. Did you mean optim?"),
        (["optim=caspr,soap"], "no record has optim=soap (optim is adamw, caspr and muon)"),
        (["optim=soap"], "--where optim=soap: no record has optim=soap (optim is adamw, caspr and muon)"),
        (["optim=caspr", "seed=2"], "--where seed=2: no record has seed=2 (seed is 0 and 1)"),
    ],
)
def test_where_keeps_the_runs_that_meet_every_condition(conditions: list[str], kept: list[int] | str) -> None:
    runs = [run("caspr", 0, optim__lr=0.01), run("caspr", 1, state="failed"), run("adamw", 2, optim__lr=0.010)]
    runs += [run("muon", 3, optim__betas=[0.9, 0.99], task__name="vit")]
    if isinstance(kept, str):
        with pytest.raises(UserError, match=re.escape(kept)):
            where(runs, conditions)
    else:
        assert [each.seed for each in where(runs, conditions)] == kept
