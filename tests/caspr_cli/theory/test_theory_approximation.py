"""How near preconditioners come to the full matrix: exact cases, and what is said of the numbers."""

import math

import pytest
import torch

from caspr_cli.optim import CASPR, Shampoo
from caspr_cli.theory import approximation, approximation_shown
from caspr_cli.theory.approximation import NOISE
from caspr_cli.theory.approximation_shown import STYLES
from caspr_cli.theory.chain import ridge
from caspr_cli.theory.gradients import kronecker_stream
from caspr_cli.theory.nearness import FAMILY, ORACLES, PRODUCTS, Case, Near, approximations, nearness


def streams():
    return torch.randn(30, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_all_preconditioners_are_there():
    assert list(nearness(streams(), 1e-3)) == list(STYLES)


def test_distances_and_cosines_belong_together():
    """The relative distance after the best scaling is sqrt(1 - cos^2), and no distance is below it."""
    G = streams()
    found = nearness(G, 1e-3)
    roots = approximations(G, 1e-3)
    full = roots["full"].dense()
    for name, near in found.items():
        X = roots[name].dense()
        best = (X * full).sum() / (X * X).sum()
        least = float((best * X - full).norm() / full.norm())
        assert math.sqrt(1 - near.root**2) == pytest.approx(least, rel=1e-6)
        assert near.root_distance >= least - 1e-12


def test_for_one_row_the_row_is_the_full_matrix():
    G = torch.randn(9, 1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = nearness(G, 1e-3)
    for name in ("row-wise", "right", "Kronecker of F", "Kronecker of F^½"):
        assert found[name].root == pytest.approx(1, abs=1e-12)
        assert found[name].angle < 1e-4
    assert found["row-wise"].root_distance < 1e-12


def test_entries_one_at_a_time_make_the_diagonal_exact():
    G = torch.zeros(12, 3, 4, dtype=torch.float64)
    for t in range(12):
        G[t, t // 4, t % 4] = 1 + t
    found = nearness(G, 1e-3)
    assert found["diagonal"].root == pytest.approx(1, abs=1e-12)
    assert found["diagonal"].inverse == pytest.approx(1, abs=1e-12)
    assert found["caspr"].root < 0.99


@pytest.mark.parametrize("seed", range(5))
def test_no_product_has_a_larger_cosine_than_the_nearest(seed):
    G = kronecker_stream((4, 3), 3 + 5 * seed, seed)
    found = nearness(G, ridge(G))
    assert all(found[ORACLES[1]].root >= found[name].root - 1e-9 for name in PRODUCTS)


def test_false_that_nearness_to_the_root_is_nearness_of_the_update():
    """The nearest product to F^(1/2) gives an update that is farther from full-matrix Adagrad's than CASPR's."""
    G = kronecker_stream((4, 4), 6, 0)
    found = nearness(G, ridge(G))
    assert found[ORACLES[1]].root > found["caspr"].root
    assert found[ORACLES[1]].angle > found["caspr"].angle


def test_false_that_caspr_is_the_best_approximation():
    """Exactly Kronecker-structured noise: Shampoo at 1/2 is nearer, and order 1 too; Shampoo at 1/4 is not."""
    G = kronecker_stream((5, 6), 3000, 0)
    found = nearness(G, ridge(G[:100]))
    cosines = [found[name].root for name in ("shampoo 1/2", "order 1", "caspr", "order 3", "shampoo 1/4")]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[0] > 0.99
    assert cosines[2] < 0.97


def test_the_exponent_one_is_what_the_optimizer_does():
    """X^{-1} G of the dense matrices against steps of CASPR and Shampoo."""
    G = kronecker_stream((3, 4), 6, 1)
    found = approximations(G, 1e-9)
    for name, optimizer in (("caspr, e = 1", CASPR), ("shampoo 1/2", Shampoo)):
        p = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
        options = {"graft": "none", "betas": (0.0, 0.9), "interval": 1, "start_step": 1, "eps": 1e-9}
        steps = optimizer([p], lr=1.0, statistics="accumulate", damping="absolute", exponent=1.0, **options)
        for gradient in G:
            before, p.grad = p.detach().clone(), gradient
            steps.step()
        torch.testing.assert_close(before - p.detach(), found[name].power(-1).apply(G[-1]), rtol=1e-6, atol=1e-9)


def test_false_that_cosines_fall_with_the_order():
    """Gradients of single entries: F is diagonal, and Shampoo's cosine is the largest of the family."""
    S = torch.tensor([[4.2, 0.0], [4.0, 0.55], [0.0, 4.0], [2.2, 0.0]]).double()
    G = torch.zeros(8, 4, 2, dtype=torch.float64)
    for t in range(8):
        G[t, t // 2, t % 2] = S[t // 2, t % 2]
    found = nearness(G, 1e-9)
    assert found["order 1"].root < found["caspr"].root < found["order 3"].root < found["shampoo 1/4"].root - 5e-4
    distances = [found[name].root_distance for name in FAMILY]
    assert distances == sorted(distances)  # which does not hinder the distances


def made_up(values, task="vit", step=10):
    near = {name: Near(values.get(name, 0.1), 0.2, 1.0, 1.0, 50.0 - 10 * values.get(name, 0.1)) for name in STYLES}
    return Case(task, "up", 0, step, near)


def test_words_follow_the_numbers():
    ahead = [made_up({"caspr": 0.9}), made_up({"caspr": 0.9}, NOISE)]
    text = " ".join(approximation.words(ahead))
    assert "the nearest to F^½ is caspr on vit (0.900)" in text
    assert "None is nearer than CASPR in this run." in text
    assert "not the best" not in text
    behind = [made_up({"shampoo 1/2": 0.9, "caspr": 0.5}), made_up({"left": 0.8, "caspr": 0.5}, NOISE)]
    text = " ".join(approximation.words(behind))
    assert "shampoo 1/2 on vit (0.900, CASPR 0.500 in place 2)" in text
    assert "CASPR is not the best approximation there; nearer: left." in text
    assert "shampoo 1/2 in 0 of 1" in text


def test_a_single_case_has_no_spread():
    sheet = next(approximation_shown.summaries([made_up({}), made_up({}, NOISE)]))
    assert sheet.rows[0]["vit sd"] is None


@pytest.mark.slow
def test_quick_answer():
    found = approximation.answer(quick=True, task="vit")
    assert all(held for _, held in found.holds)
    assert [figure.name for figure in found.figures] == ["root", "inverse", "angle"]
    rows = next(sheet for sheet in found.sheets if sheet.name == "root").rows
    assert [row["preconditioner"] for row in rows] == list(STYLES)
    assert all(0 < row["vit"] <= 1 for row in rows)
