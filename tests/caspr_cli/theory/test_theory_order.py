"""The order of preconditioners, and one counterexample of each statement that looks like it and is false."""

import math

import pytest
import torch

from caspr_cli.recipe.errors import ConfigError
from caspr_cli.theory import chain, order, order_shown
from caspr_cli.theory.chain import FAILS, HOLDS, check, ridge
from caspr_cli.theory.gradients import low_rank_stream
from caspr_cli.theory.order_cases import DRAWN, REAL, Case

STREAMS = [((3, 4), 1), ((4, 3), 2), ((4, 4), 4), ((5, 2), 2), ((1, 4), 1), ((4, 1), 1)]


def checked(gradients, rank, steps=None):
    return check(gradients[:steps], ridge(gradients), rank)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("shape", "rank"), STREAMS)
def test_all_that_should_hold_does(shape, rank, seed):
    G = low_rank_stream(shape, rank, 6, seed)
    for step in (1, 2, 6):
        found = checked(G, rank, step)
        assert found.tolerance < 1e-6
        for key in HOLDS:
            if key in found.margins:
                assert found.margins[key] >= -found.tolerance, HOLDS[key]


def test_every_statement_is_looked_at():
    found = checked(low_rank_stream((3, 4), 2, 3, 0), 2)
    assert found.margins.keys() == HOLDS.keys() | FAILS.keys()


def test_it_is_strict_where_gradients_are_general():
    """Nothing that is compared is just equal: margins are above rounding by far."""
    G = torch.randn(40, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = checked(G, 3)
    order = ("gap_1", "gap_2", "gap_3", "gap_shampoo", "inverses", "traces", "distances", "products", "grows")
    for key in (*order, "bare_traces", "bare_distances"):
        assert found.margins[key] > 1e3 * found.tolerance, HOLDS[key]


def test_a_tight_case():
    """One gradient of rank r with equal singular values: F~ touches L~ x I."""
    G = torch.eye(3, dtype=torch.float64)[None]
    found = checked(G, 3)
    assert found.margins["lemma_left"] == pytest.approx(0, abs=1e-12)
    assert checked(G, 2).margins["lemma_left"] < -0.1  # a smaller r is too small


def test_a_single_axis_is_one_matrix():
    """For a vector, all that looks at its own axis alone is full-matrix Adagrad; the chain still stands above it."""
    found = checked(low_rank_stream((1, 4), 1, 5, 0), 1)
    assert found.traces[0] == 1
    assert found.traces[4] > found.traces[1] > 1


# One fixed counterexample each.


@pytest.mark.parametrize(
    ("key", "shape", "rank", "least"),
    [
        ("no_rank_1", (4, 4), 4, -0.1),
        ("no_rank", (4, 4), 4, -0.1),
        ("stale", (3, 4), 1, -0.1),
        ("whole", (2, 4), 1, -1e-3),
        ("average_grows", (3, 4), 2, -1e-3),
    ],
)
def test_false(key, shape, rank, least):
    assert checked(low_rank_stream(shape, rank, 6, 1), rank).margins[key] < least, FAILS[key]


def test_false_that_half_the_rank_is_enough():
    G = torch.eye(4, dtype=torch.float64)[None]
    assert checked(G, 2).margins["gap_1"] < -0.1
    assert checked(G, 4).margins["gap_1"] > -1e-12


def test_false_that_the_full_matrix_without_the_rank_has_the_larger_inner_product():
    """<G, U> of full-matrix Adagrad (no 1/r) can be below that of CASPR: the order of traces is not one of matrices."""
    G = torch.eye(3, dtype=torch.float64)[None]
    eps = ridge(G)
    full, _, second, *_ = chain.chain(G, eps, 1)
    U, V = (root.power(-1).apply(G[0]) for root in (second, full))
    assert (G[0] * U).sum() > 1.5 * (G[0] * V).sum()


# ---- the answer --------------------------------------------------------------------------------------------------


def made_up(margin, source=REAL, step=10):
    margins = dict.fromkeys((*HOLDS, *FAILS), 0.1) | {"gap_2": margin}
    found = chain.Checked(margins, (1.0, 2.0, 3.0, 3.5, 4.0), (0.0, 1, 2, 3, 4), (1.0, 0.9, 0.8, 0.7, 0.6), 1e-9)
    return Case(source, "vit", "up", "3 x 4", 3, 0, step, found)


def test_words_follow_the_numbers():
    good = list(order.words([made_up(0.0), made_up(0.0, DRAWN)]))
    assert good[0].startswith("Yes: ")
    assert "25.0 % below Shampoo's" in good[1]
    assert "Not seen to be false in this run: " in good[2]
    bad = list(order.words([made_up(-1e-3), made_up(0.0, DRAWN)]))
    assert bad[0].startswith("Not everywhere.")
    assert HOLDS["gap_2"] in bad[0]
    assert "Yes" not in bad[0]


def test_rounding_is_no_failure():
    rows = {row["statement"]: row for row in order_shown.statements([made_up(-1e-10), made_up(0.2)]).rows}
    assert rows[HOLDS["gap_2"]]["failed"] == 0
    rows = {row["statement"]: row for row in order_shown.statements([made_up(-1e-6), made_up(0.2)]).rows}
    assert rows[HOLDS["gap_2"]]["failed"] == 1


@pytest.mark.slow
def test_quick_answer():
    first, second = (order.answer(quick=True, task="vit") for _ in range(2))
    assert first == second
    assert all(held for _, held in first.holds)
    assert len(first.holds) == len(HOLDS)
    assert len(first.fails) == len(FAILS)
    assert [figure.name for figure in first.figures] == ["traces", "eigenvalues"]
    cases = next(sheet for sheet in first.sheets if sheet.name == "cases").rows
    assert {row["source"] for row in cases} == {REAL, DRAWN}
    assert all(math.isfinite(row["gap_1"]) for row in cases)


def test_an_unknown_task_is_said_before_anything_is_read():
    with pytest.raises(ConfigError, match=r"--task vot: no such task. Did you mean vit\?"):
        order.answer(task="vot")
