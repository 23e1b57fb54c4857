import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import run
from tabled import searched, seeds, table

from caspr_cli.common.selection import AGAIN
from caspr_cli.optim.registry import OPTIMIZERS
from caspr_cli.report import render, terminal, tuning
from caspr_cli.report.model import Run
from caspr_cli.report.trials import around, edges, outcomes, width


def trial(index: int, value: float | None, seed: int = 0, state: str = "done", **keys: Any) -> Run:
    return run("caspr", seed, value, state, trial=index, search__name="joint", **keys)


def joint() -> list[Run]:
    """Six trials in two keys, of which the second in place is the best when run again; one fails, one diverges."""
    space = {"search__rerank": 2, "search__space__optim.lr__log": [1e-4, 1e-1]}
    space["search__space__optim.weight_decay__log"] = [0.01, 1.0]
    ends = [
        (0.001, 0.1, 4.3), (0.003, 0.9, 4.0), (0.01, 0.02, 4.01), (0.03, 0.3, 4.6), (0.05, 0.5, None),
        (0.1, 0.7, None),
    ]  # fmt: skip
    runs = []
    for k, (lr, decay, value) in enumerate(ends):
        keys = {"optim__lr": lr, "optim__weight_decay": decay} | space
        state = "failed" if k == 4 else "done"
        runs.append(trial(k, value, state=state, **keys))
        if k == 4:
            runs[-1].status["error"] = "RuntimeError: CUDA out of memory\nTraceback"
        if k in (1, 2):
            runs += [trial(k, 4.2 - 0.1 * k + 0.01 * j, seed, **keys) for j, seed in enumerate(AGAIN)]
    return runs


# ---- what came of trials -----------------------------------------------------------------------------------------


def test_every_trial_is_there_by_value_with_what_came_of_it() -> None:
    (only,) = table(joint()).rows
    found = outcomes(only)
    assert [(one.trial.index, one.value, one.again) for one in found] == [
        (1, 4.0, pytest.approx((4.1, 4.11))), (2, 4.01, pytest.approx((4.0, 4.01))), (0, 4.3, ()), (3, 4.6, ()),
        (4, None, ()), (5, None, ()),
    ]  # fmt: skip
    assert [one.best for one in found] == [False, True, False, False, False, False]  # the mean over three seeds is
    assert [one.state for one in found] == ["done"] * 4 + [
        "failed: RuntimeError: CUDA out of memory", "diverged: not finite at the end",
    ]  # fmt: skip
    up = {"task__target__higher_is_better": True}
    rising = table(searched("soap", [0.5, 0.6], **up))
    assert [one.value for one in outcomes(rising.rows[0])] == [0.6, 0.5]


def test_a_trial_that_goes_on_or_diverged_or_has_another_seed_says_so() -> None:
    runs = searched("caspr", [4.0, 4.1, None])
    runs += [run("caspr", 0, None, "running", optim__lr=0.5), run("caspr", 7, 3.0, optim__lr=0.7)]
    states = {one.trial.values["optim.lr"]: one.state for one in outcomes(table(runs).rows[0])}
    assert states == {
        1e-4: "done", 1e-3: "done", 1e-2: "diverged: loss is nan", 0.5: "running",
        0.7: "done, but not with the seed that selects",
    }  # fmt: skip


def test_the_table_of_trials_marks_the_selected_one_and_its_edges() -> None:
    made = table(joint())
    every = tuning.trials(made)
    assert every.heads == ["row", "trial", "val/loss", "again", "lr", "weight_decay", "state"]
    assert every.rows[0] == ("caspr", "1", "4.0000", "4.1000, 4.1100", "0.003", "0.9", "done")
    assert every.rows[1][-1] == "done, selected; at the edge of what was tried: weight_decay smallest"
    assert every.rows[-1] == ("caspr", "5", "-", "-", "0.1", "0.7", "diverged: not finite at the end")
    assert [key for key, _, _ in edges(made.rows[0])] == ["optim.weight_decay"]
    none = table(seeds("caspr", [4.0, 4.1]))
    assert not tuning.trials(none)
    assert list(terminal.trials([none], 100)) == ["trials   no row has more than one trial"]


@pytest.mark.parametrize("width", [130, 80, 60])
def test_a_terminal_keeps_the_state_of_a_trial(width: int) -> None:
    text = list(terminal.trials([table(joint())], width))
    assert max(map(len, text)) <= max(width, 95)
    assert any(line.startswith("caspr") and line.endswith("failed: RuntimeError: CUDA out of memory") for line in text)
    assert ("no room for" in " ".join(text)) == (width < 130)


# ---- the width of the range of good rates ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "sign", "low", "high", "open_", "factor"),
    [
        # 1 % of 4 is .04. Up from .01 the line rises by .08 over a decade, so it is there half a decade up; down from
        # it by .4, a tenth of a decade down.
        ({1e-3: 4.4, 1e-2: 4.0, 1e-1: 4.08}, 1, 10**-2.1, 10**-1.5, (False, False), "×3.98"),
        ({1e-3: 4.02, 1e-2: 4.0, 1e-1: 4.01}, 1, 1e-3, 1e-1, (True, True), "×≥100"),  # to the end of what was tried
        ({1e-3: 4.0, 1e-2: 8.0, 1e-1: 4.001}, 1, 1e-3, 1e-3 * 10**0.01, (True, False), "×≥1.02"),  # beyond a bad one
        ({1e-3: -0.6, 1e-2: -1.0, 1e-1: -0.92}, -1, 10**-2.025, 10**-1.875, (False, False), "×1.41"),
        ({1e-3: -0.6, 1e-2: -1.0, 1e-1: -0.92}, 1, 10**-2.025, 10**-1.875, (False, False), "×1.41"),  # below zero
    ],
)
def test_the_width_by_hand(
    rates: dict[float, float], sign: int, low: float, high: float, open_: tuple[bool, bool], factor: str
) -> None:
    wide = around(rates, sign)
    assert (wide.low, wide.high) == pytest.approx((low, high))
    best = min(rates, key=rates.__getitem__)
    assert (wide.best, wide.open, wide.factor) == ((best, sign * rates[best]), open_, factor)
    assert wide.line == tuple((x, sign * value) for x, value in rates.items())


def test_the_width_of_a_row() -> None:
    higher = {"task__target__higher_is_better": True}
    wide = width(table(searched("caspr", [0.6, 1.0, 0.92, None], **higher)).rows[0])
    assert (wide.best, wide.low) == ((pytest.approx(1e-3), 1.0), pytest.approx(10**-3.025))
    assert width(table(searched("caspr", [4.0, None])).rows[0]) is None  # one rate has no width
    assert width(table(searched("caspr", [None, None])).rows[0]) is None


@given(st.dictionaries(st.floats(1e-6, 1e3), st.floats(0.1, 10), min_size=2, max_size=12))
def test_what_every_width_has(rates: dict[float, float]) -> None:
    wide = around(rates)
    assert wide.best[1] == min(rates.values())
    assert min(rates) <= wide.low <= wide.best[0] <= wide.high <= max(rates)
    for x, value in rates.items():
        if wide.low < x < wide.high:
            assert value <= wide.best[1] * 1.01 + 1e-12
    scaled = around({x: 2 * value for x, value in rates.items()})
    assert math.isclose(scaled.high, wide.high, rel_tol=1e-6)


def test_of_joint_trials_the_line_joins_those_that_none_farther_out_surpasses() -> None:
    ends = {1e-4: 4.5, 3e-4: 4.2, 1e-3: 4.9, 3e-3: 4.0, 1e-2: 4.6, 3e-2: 4.3, 1e-1: 4.4}
    runs = [
        run(optim__lr=lr, final=v, optim__weight_decay=0.1 * k, search__space={})
        for k, (lr, v) in enumerate(ends.items())
    ]
    found = width(table(runs, tuned=["optim.lr", "optim.weight_decay"]).rows[0])
    assert [x for x, _ in found.line] == [1e-4, 3e-4, 3e-3, 3e-2, 1e-1]


# ---- budgets -----------------------------------------------------------------------------------------------------


def test_rows_by_budget_from_the_untuned_one_on() -> None:
    runs = searched("caspr", [4.0, 4.1, 4.2, 4.3, 4.4, 4.5]) + searched("adamw", [4.6, 4.7])
    runs += [run("caspr", k, 5.0 + 0.01 * k, trial="default", search__name=None, optim__lr=0.7) for k in (1, 2, 3)]
    made = tuning.by_budget(table(runs))
    caspr, adamw = made.rows
    assert made.heads == ["row", "0 trials", "2 trials", "4 trials", "6 trials"]
    assert caspr[:2] == ("caspr", "5.020 (4.995 to 5.045)")
    assert caspr[3].startswith("4.0400 (4.0000 to ")  # of 15 draws of four 10 have 4.0, four 4.1, one 4.2
    assert caspr[4].startswith("4.0000 (4.0000 to ")
    assert adamw == ("adamw", "-", "4.6000 (4.6000 to 4.7000)", "-", "-")
    assert not tuning.by_budget(table(seeds("caspr", [4.0])))
    assert not tuning.by_budget(table(searched("caspr", [None, None])))


def test_the_untuned_row_is_that_of_the_same_variant() -> None:
    runs = []
    for eps, value in ((1e-6, 4.0), (1e-4, 4.5)):
        runs += searched("caspr", [value, value + 0.1], optim__eps=eps)
        runs += [run("caspr", k, value + 1, trial="default", optim__eps=eps) for k in (1, 2)]
    lines = {line[0]: line[1][:3] for line in tuning.by_budget(table(runs)).rows}
    assert lines == {"caspr eps=1e-06": "5.0", "caspr eps=0.0001": "5.5"}
    others = searched("caspr", [4.0, 4.1], task__layers=2) + searched("caspr", [4.2, 4.3], task__layers=3)
    others += [run("caspr", k, 5.0, trial="default", task__layers=layers) for k in (1, 2) for layers in (4, 5)]
    assert [line[1] for line in tuning.by_budget(table(others)).rows] == ["-", "-"]  # not known which


# ---- settings ----------------------------------------------------------------------------------------------------


def test_what_each_row_ran_with() -> None:
    runs = searched("caspr", [4.0, 4.1], optim__nesterov=False, optim__exponent=0.5, trainer__clip_norm=None)
    runs += seeds("muon", [4.5, 4.6], optim__momentum=0.95, trainer__clip_norm=1.0)
    made = tuning.ran_with(table(runs))
    names = "row lr betas momentum nesterov weight_decay warmup exponent clip_norm max_steps"
    assert made.heads == names.split()
    assert made.rows == [
        ("caspr", "0.0001", "0.9,0.95", "-", "false", "0", "0.05", "0.5", "null", "300"),
        ("muon", "0.003", "0.9,0.95", "0.95", "true", "0", "0.05", "-", "1", "300"),
    ]


def test_those_that_always_have_nesterov_have_no_key_for_it() -> None:
    assert set(tuning.ALWAYS_NESTEROV) <= set(OPTIMIZERS)
    with_key = {name for name, entry in OPTIMIZERS.items() if hasattr(entry.keys, "nesterov")}
    assert not with_key.intersection(tuning.ALWAYS_NESTEROV)
    said = {name for name, entry in OPTIMIZERS.items() if "Nesterov" in entry.about}
    assert said - with_key <= set(tuning.ALWAYS_NESTEROV)


def test_the_short_tables_beside_the_results() -> None:
    made = tuning.beside(table(joint()))
    assert [sheet.caption for sheet in made] == [tuning.BY_BUDGET, tuning.WIDTHS, tuning.RAN_WITH]
    assert all(render.markdown(sheet).count("\n") == len(sheet) + 1 for sheet in made)
    assert [sheet.heads[:2] for sheet in tuning.beside(table(seeds("caspr", [4.0])))] == [["row", "lr"]]
    logs = [replace(each, config={k: v for k, v in each.config.items() if k not in tuning.SHARED})
            for each in seeds("caspr", [4.0])]  # fmt: skip
    assert tuning.beside(table(logs)) == []
