from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import synthetic

from caspr_cli.report import terminal
from caspr_cli.report.model import Row, Table
from caspr_cli.report.profile import cells, names, profile, rho, score, strong


def timed(task: str, steps: dict[str, float | None], target: float | None = 1.0) -> Table:
    """A table in which only the times count; a step takes two seconds."""
    rows = [
        replace(
            synthetic.row(label, [], task=task),
            steps_to_target=time,
            seconds_to_target=None if time is None else 2 * time,
        )
        for label, time in steps.items()
    ]
    return replace(synthetic.table(rows, baseline=None), task=task, target=target)


def test_scores_by_hand() -> None:
    """a: ratios 1 and 2, so rho is 1/2 on [1, 2) and 1 on [2, 4]; b: 1.5 and 1; c: 5, which is too late, and never."""
    found = profile(
        [timed("one", {"a": 100, "b": 150, "c": 500}), timed("two", {"a": 80, "b": 40, "c": None})], "steps"
    )
    assert found.ratios == {"a": (1.0, 2.0), "b": (1.5, 1.0), "c": (5.0, math.inf)}
    assert found.scores == {
        "b": pytest.approx((0.5 * 0.5 + 1 * 2.5) / 3),
        "a": pytest.approx((0.5 * 1 + 1 * 2) / 3),
        "c": 0.0,
    }
    assert list(found.scores) == ["b", "a", "c"]
    assert [score(()), score((math.inf,))] == [0.0, 0.0]
    assert profile([timed("one", {"a": 0, "b": 10})], "steps").ratios == {"a": (1.0,), "b": (math.inf,)}
    none = profile([synthetic.bare()], "steps")
    assert (none.tasks, none.scores) == ((), {})
    assert "nothing to compare" in next(terminal.profiled(none, 80))


def test_the_score_is_the_integral_of_rho() -> None:
    ratios = (1.0, 1.3, 2.9, 3.999, 4.0, 7.0, math.inf)
    taus = np.linspace(1, 4, 300_001)
    assert score(ratios) == pytest.approx(
        np.trapezoid([rho(ratios, tau) for tau in taus[::100]], taus[::100]) / 3, abs=1e-3
    )


def test_rows_are_matched_by_settings_where_one_table_has_variants() -> None:
    """caspr in one table is caspr eps=1e-06 in the other, and not its caspr eps=0.0001, and its layers are its own."""

    def row(label: str, steps: float, **settings: object) -> Row:
        return replace(synthetic.row(label, [], settings=settings), steps_to_target=steps)

    one, two = timed("one", {}), timed("two", {})
    one = replace(one, rows=(row("caspr", 100, eps=1e-6, layers=2), row("adamw", 200, eps=1e-8)))
    variants = (row("caspr eps=0.0001", 100, eps=1e-4, layers=4), row("caspr eps=1e-06", 50, eps=1e-6, layers=4))
    two = replace(two, rows=(*variants, row("adamw", 100, eps=1e-8)))
    found = profile([one, two], "steps")
    assert found.ratios == {
        "caspr eps=1e-06": (1.0, 1.0), "adamw": (2.0, 2.0), "caspr eps=0.0001": (math.inf, 2.0),
    }  # fmt: skip


def test_what_is_left_out_is_said() -> None:
    tables = [
        timed("one", {"a": 100, "b": 150}),
        timed("two", {"a": 100}),
        timed("hard", {"a": None, "b": None}),
        timed("open", {"a": None}, target=None),
    ]
    found = profile(tables, "steps")
    assert found.tasks == ("one", "two", "hard")
    assert found.ratios == {"a": (1.0, 1.0, math.inf), "b": (1.5, math.inf, math.inf)}
    said = "\n".join(found.left_out)
    assert "open has no target" in said
    assert "hard: no row reached" in said
    assert "b was not run on two" in said


def test_a_record_without_times_is_said_where_seconds_count() -> None:
    made = timed("one", {"a": 100, "b": 150})
    without = replace(made, rows=(replace(made.rows[0], seconds_to_target=None), made.rows[1]))
    assert "a reached the target of one, but has no times" in "\n".join(profile([without], "seconds").left_out)
    assert profile([without], "steps").left_out == ()
    slow = replace(made, rows=(replace(made.rows[0], seconds_to_target=900.0), made.rows[1]))
    assert profile([slow], "seconds").ratios == {"a": (3.0,), "b": (1.0,)}


def test_lines_are_aligned_and_have_all() -> None:
    lines = list(terminal.profiled(profile(synthetic.study(), "steps"), 200))
    heads, *rows = lines[1 : 2 + len(synthetic.ENDS)]
    assert {len(line) for line in rows} == {len(heads)}
    assert rows[0].split()[0] == "caspr"
    assert {"1.00x", "never"} <= set("\n".join(rows).split())
    assert any("AlgoPerf's is of wall-clock times" in line for line in lines)
    assert any("ogbg_molpcba has no target" in line for line in lines)


def test_on_a_narrow_terminal_it_fits_and_says_what_is_left_out() -> None:
    lines = list(terminal.profiled(profile(synthetic.study(), "steps"), 60))
    assert max(map(len, lines)) <= 60
    assert any(line.startswith("(no room for: ρ(") for line in lines)
    assert any(line.startswith("optimizer  score") for line in lines)


def test_the_best_of_each_column_is_bold() -> None:
    """Scores and shares are equal, and none of these is bold."""
    found = profile([timed("one", {"a": 100, "b": 150}), timed("two", {"a": 60, "b": 40})], "steps")
    assert cells(found)[0] == ["optimizer", "score", "ρ(1)", "ρ(1.5)", "ρ(2)", "ρ(4)", "one", "two"]
    assert [line[0] for line in cells(found)[1:]] == ["a", "b"]
    assert strong(found) == {(1, 6), (2, 7)}
    assert any("\x1b[1m1.00x\x1b[0m" in line for line in terminal.profiled(found, 120, bold=True))
    assert not any("\x1b" in line for line in terminal.profiled(found, 120))


def test_of_a_task_with_two_lengths_that_with_more_runs_counts() -> None:
    few, many = timed("one", {"a": 100, "b": 150}), timed("one", {"a": 100, "b": 400})
    many = replace(
        many, steps=300, rows=tuple(replace(row, records=tuple(synthetic.language().rows[0].runs)) for row in many.rows)
    )
    found = profile([replace(few, steps=1000), many], "steps")
    assert found.tasks == ("one 300 steps",)
    assert found.left_out == (
        "one 1,000 steps is left out: one 300 steps has more runs (--where max_steps=1000 takes it instead)",
    )


def test_tables_of_one_task_have_different_names() -> None:
    one = synthetic.bare()
    assert names([one]) == ["c4_lm"]
    assert names([one, replace(one, scale="paper")]) == ["c4_lm sample", "c4_lm paper"]
    assert names([one, replace(one, data="hub")]) == ["c4_lm sample", "c4_lm hub"]
    both = [replace(one, scale="long", steps=300), replace(one, steps=300), replace(one, steps=20)]
    assert names(both) == ["c4_lm long 300 steps", "c4_lm sample 300 steps", "c4_lm sample 20 steps"]
    assert names(both[::2]) == ["c4_lm long", "c4_lm sample"]
    assert len(set(names([one, one, replace(one, task="vit")]))) == 3
