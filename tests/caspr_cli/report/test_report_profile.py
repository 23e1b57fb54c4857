import math
from dataclasses import replace

import numpy as np
import pytest
import synthetic
from recorded import run
from tabled import reaching, table

from caspr_cli.report import terminal
from caspr_cli.report.profile import as_sheet, names, profile, rho, score


def test_scores_by_hand() -> None:
    """a: ratios 1 and 2, so rho is 1/2 on [1, 2) and 1 on [2, 4]; b: 1.5 and 1; c: 5, which is too late, and never."""
    found = profile(
        [reaching("one", {"a": 100, "b": 150, "c": 500}), reaching("two", {"a": 80, "b": 40, "c": None})], "steps"
    )
    assert found.ratios == {"a": (1.0, 2.0), "b": (1.5, 1.0), "c": (5.0, math.inf)}
    assert list(found.scores.items()) == [
        ("b", pytest.approx((0.5 * 0.5 + 1 * 2.5) / 3)), ("a", pytest.approx((0.5 * 1 + 1 * 2) / 3)), ("c", 0.0),
    ]  # fmt: skip
    none = profile([synthetic.bare()], "steps")
    assert (none.tasks, none.scores) == ((), {})
    assert "nothing to compare" in next(terminal.profiled(none, 80))
    assert found.left_out == ()


def test_the_score_is_the_integral_of_rho() -> None:
    ratios = (1.0, 1.3, 2.9, 3.999, 4.0, 7.0, math.inf)
    taus = np.linspace(1, 4, 3_001)
    assert score(ratios) == pytest.approx(np.trapezoid([rho(ratios, tau) for tau in taus], taus) / 3, abs=1e-3)
    assert [score(()), score((math.inf,))] == [0.0, 0.0]


def test_rows_are_matched_by_settings_where_one_table_has_variants() -> None:
    """caspr in one table is caspr eps=1e-06 in the other, and not its caspr eps=0.0001, and its layers are its own."""

    def reached(task: str, optim: str, step: int, eps: float, layers: int) -> object:
        keys = {"optim__eps": eps, "task__name": task, "task__layers": layers}
        return run(optim, 0, 4.0, curve=[(step, 1.0, 4.0)], **keys)

    one = table([reached("one", "caspr", 100, 1e-6, 2), reached("one", "adamw", 200, 1e-8, 4)])
    two = [reached("two", "caspr", 100, 1e-4, 4), reached("two", "caspr", 50, 1e-6, 4)]
    two = table([*two, reached("two", "adamw", 100, 1e-8, 4)])
    assert profile([one, two], "steps").ratios == {
        "caspr eps=1e-06": (1.0, 1.0), "adamw": (2.0, 2.0), "caspr eps=0.0001": (math.inf, 2.0),
    }  # fmt: skip


def test_what_is_left_out_is_said() -> None:
    tables = [
        reaching("one", {"a": 100, "b": 150}),
        reaching("two", {"a": 100}),
        reaching("hard", {"a": None, "b": None}),
        reaching("open", {"a": None}, target=None),
    ]
    found = profile(tables, "steps")
    assert found.ratios == {"a": (1.0, 1.0, math.inf), "b": (1.5, math.inf, math.inf)}
    assert found.left_out == (
        "open has no target and is left out", "hard: no row reached the target",
        "b was not run on two, which counts as not reached",
    )  # fmt: skip
    timeless = table([run("a", curve=[(1, None, 4.0)]), run("b", curve=[(1, 9.0, 4.0)])])
    assert profile([timeless], "seconds").ratios == {"a": (math.inf,), "b": (1.0,)}
    assert profile([timeless], "seconds").left_out == (
        "a reached the target of c4_lm, but has no times: counts as not reached",
    )
    assert profile([timeless], "steps").left_out == ()
    no_clock = table([run("a", curve=[(1, None, 4.0)])])
    assert profile([no_clock], "seconds").left_out == profile([timeless], "seconds").left_out


@pytest.mark.parametrize("width", [200, 60])
def test_lines_are_aligned_and_fit(width: int) -> None:
    lines = list(terminal.profiled(profile(synthetic.study(), "steps"), width))
    at = next(k for k, line in enumerate(lines) if line.startswith("optimizer  score"))
    rows = lines[at + 1 : at + 1 + len(synthetic.ENDS)]
    assert {len(line) for line in rows} == {len(lines[at])}
    assert max(map(len, lines)) <= width
    assert any(line.startswith("(no room for: ρ(") for line in lines) == (width == 60)
    text = " ".join(" ".join(lines).split())
    assert "AlgoPerf's is of wall-clock times" in text
    assert "ogbg_molpcba has no target" in text
    assert width == 60 or {"1.00x", "never"} <= set(text.split())


def test_the_best_of_each_column_is_bold() -> None:
    """Scores and shares are equal, and none of these is bold."""
    found = profile([reaching("one", {"a": 100, "b": 150}), reaching("two", {"a": 60, "b": 40})], "steps")
    made = as_sheet(found)
    assert made.heads == ["optimizer", "score", "ρ(1)", "ρ(1.5)", "ρ(2)", "ρ(4)", "one", "two"]
    assert [line[0] for line in made.rows] == ["a", "b"]
    assert [column.best for column in made.columns] == [set()] * 6 + [{0}, {1}]
    assert any("\x1b[1m1.00x\x1b[0m" in line for line in terminal.profiled(found, 120, bold=True))
    assert not any("\x1b" in line for line in terminal.profiled(found, 120))


def test_of_a_task_with_two_lengths_that_with_more_runs_counts() -> None:
    few, many = reaching("one", {"a": 100}), reaching("one", {"a": 100, "b": 400})
    found = profile([replace(few, steps=1000), many], "steps")
    assert found.tasks == ("one 300 steps",)
    assert found.left_out == (
        "one 1,000 steps is left out: one 300 steps has more runs (--where max_steps=1000 takes it instead)",
    )


def test_tables_of_one_task_have_different_names() -> None:
    one = replace(synthetic.bare(), steps=None)
    assert names([one]) == ["c4_lm"]
    assert names([one, replace(one, scale="paper")]) == ["c4_lm sample", "c4_lm paper"]
    assert names([one, replace(one, data="hub")]) == ["c4_lm sample", "c4_lm hub"]
    both = [replace(one, scale="long", steps=300), replace(one, steps=300), replace(one, steps=20)]
    assert names(both) == ["c4_lm long 300 steps", "c4_lm sample 300 steps", "c4_lm sample 20 steps"]
    assert names(both[::2]) == ["c4_lm long", "c4_lm sample"]
    assert names([one, one, replace(one, task="vit")]) == ["c4_lm", "c4_lm (2)", "vit"]
