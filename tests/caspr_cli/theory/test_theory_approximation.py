"""How near preconditioners come to the full matrix: exact cases, and what is said of the numbers."""

import math

import pandas as pd
import pytest
import torch

from caspr_cli.optim import CASPR, Shampoo
from caspr_cli.theory import approximation
from caspr_cli.theory.approximation import (
    FAMILY,
    NEAREST,
    NOISE,
    PRODUCTS,
    STYLES,
    Near,
    approximations,
    nearness,
    rows_of,
)
from caspr_cli.theory.chain import ridge
from caspr_cli.theory.gradients import Choice, kronecker_stream


def streams():
    return torch.randn(30, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_all_preconditioners_are_there():
    assert list(nearness(streams(), 1e-3)) == list(STYLES)


def test_distances_and_cosines_belong_together():
    """The relative distance after the best scaling is sqrt(1 - cos^2)."""
    G = streams()
    found = nearness(G, 1e-3)
    roots = approximations(G, 1e-3)
    full = roots["full"].dense()
    for name, near in found.items():
        X = roots[name].dense()
        best = (X * full).sum() / (X * X).sum()
        least = float((best * X - full).norm() / full.norm())
        assert math.sqrt(1 - near.root**2) == pytest.approx(least, rel=1e-6)
        assert near.root_distance == pytest.approx(float((X - full).norm() / full.norm()))
        P, inverse = torch.linalg.inv(X), torch.linalg.inv(full)
        assert near.inverse_distance == pytest.approx(float((P - inverse).norm() / inverse.norm()))


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
    assert all(found[NEAREST].root >= found[name].root - 1e-9 for name in PRODUCTS)


def test_false_that_nearness_to_the_root_is_nearness_of_the_update():
    """The nearest product to F^(1/2) gives an update that is farther from full-matrix Adagrad's than CASPR's."""
    G = kronecker_stream((4, 4), 6, 0)
    found = nearness(G, ridge(G))
    assert found[NEAREST].root > found["caspr"].root
    assert found[NEAREST].angle > found["caspr"].angle


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


def made_up(*values, task="vit", step=10):
    """Cases of several seeds with these cosines; all others are 0.1."""
    rows = []
    for seed, of in enumerate(values):
        near = {k: Near(of.get(k, 0.1), 0.2, 1.0, 1.0, 50.0 - 10 * of.get(k, 0.1)) for k in STYLES}
        rows += rows_of(near, task, "up", seed, step)
    return pd.DataFrame(rows)


def test_the_finding_follows_the_numbers():
    ahead = approximation.finding(pd.concat([made_up({"caspr": 0.9}), made_up({"left": 0.9}, task=NOISE)]))
    assert ahead == "At step 10 caspr is nearest to F^½ on 1 of 1 tasks; CASPR takes places 1 to 1 of 10."
    two = pd.concat([made_up({"left": 0.9, "caspr": 0.5}), made_up({"left": 0.9, "caspr": 0.95}, task="resnet")])
    assert "CASPR takes places 1 to 2 of 10." in approximation.finding(two)
    assert len(ahead.split()) <= 30


def test_who_is_nearer_is_counted_after_the_first_step():
    cases = pd.concat([made_up({"caspr": 0.5, "left": 0.9}, {"diagonal": 0.9}), made_up({"diagonal": 1.0}, step=1)])
    rows = approximation.nearer(cases).set_index("other")
    assert rows.loc["diagonal", ["cases", "root", "angle"]].tolist() == [2, 1, 1]
    assert rows.loc["order 1", ["cases", "root", "angle"]].tolist() == [2, 1, 1]


def test_summaries_are_of_the_last_step_and_a_single_case_has_no_spread():
    cases = pd.concat(
        [made_up({"caspr": 0.5}), made_up({"caspr": 0.9}, step=3), made_up({}, {"caspr": 0.3}, task=NOISE)]
    )
    row = approximation.summary(cases, "root").set_index("preconditioner").loc["caspr"]
    assert math.isnan(row["vit sd"])
    assert [row["vit"], row[NOISE], row["tasks"]] == pytest.approx([0.5, 0.2, 0.5])
    assert row[f"{NOISE} sd"] == pytest.approx(0.2 / math.sqrt(2))


@pytest.fixture(scope="module")
def found():
    return approximation.answer(Choice(quick=True, task="vit"))


def test_the_answer_holds(found):
    assert all(held for _, held in found.claims)
    assert [figure.name for figure in found.figures] == ["root", "inverse", "angle"]
    rows = found.tables["root"]
    assert list(rows["preconditioner"]) == list(STYLES)
    assert all(0 < value <= 1 for value in rows["vit"])
    assert len(found.counterexamples) == 1
