"""Distances of preconditioners from the full matrix: exact cases, and the sentences about the numbers."""

import math

import pandas as pd
import pytest
import torch

from caspr_cli.optim import CASPR, Shampoo
from caspr_cli.theory import approximation
from caspr_cli.theory.approximation import NOISE, STYLES, VALUES, approximations, nearness, rows_of
from caspr_cli.theory.choices import Layers
from caspr_cli.theory.gradients import kronecker_stream


def stream(steps, *shape):
    return torch.randn(steps, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def entries(values):
    """Gradients of one entry each."""
    G = torch.zeros(values.numel(), *values.shape, dtype=torch.float64)
    G.flatten(1).diagonal().copy_(values.flatten())
    return G


def test_distances_and_cosines_belong_together():
    """The relative distance after the best scaling is sqrt(1 - cos^2)."""
    G = stream(30, 3, 4)
    found, roots = nearness(G, 1e-3), approximations(G, 1e-3)
    assert list(found) == list(STYLES)
    full = roots["full"].dense()
    for name, near in found.items():
        assert list(near) == VALUES
        X = roots[name].dense()
        best = (X * full).sum() / (X * X).sum()
        assert math.sqrt(1 - near["root"] ** 2) == pytest.approx(
            float((best * X - full).norm() / full.norm()), rel=1e-6
        )
        assert near["root_distance"] == pytest.approx(float((X - full).norm() / full.norm()))
        P, inverse = torch.linalg.inv(X), torch.linalg.inv(full)
        assert near["inverse_distance"] == pytest.approx(float((P - inverse).norm() / inverse.norm()))
        U, wanted = P @ G[-1].flatten(), inverse @ G[-1].flatten()
        assert math.cos(math.radians(near["angle"])) == pytest.approx(float(U @ wanted / U.norm() / wanted.norm()))


def test_for_one_row_the_row_is_the_full_matrix():
    found = nearness(stream(9, 1, 5), 1e-3)
    for name in ("row-wise", "right", "Kronecker of F", "Kronecker of F^½"):
        assert found[name]["root"] == pytest.approx(1, abs=1e-12)
        assert found[name]["angle"] < 1e-4
    assert found["row-wise"]["root_distance"] < 1e-12


def test_entries_one_at_a_time_make_the_diagonal_exact():
    found = nearness(entries(torch.arange(1.0, 13.0).reshape(3, 4)), 1e-3)
    assert found["diagonal"]["root"] == pytest.approx(1, abs=1e-12)
    assert found["diagonal"]["inverse"] == pytest.approx(1, abs=1e-12)
    assert found["caspr"]["root"] < 0.99


@pytest.mark.parametrize(("name", "optimizer"), [("caspr, e = 1", CASPR), ("shampoo 1/2", Shampoo)])
def test_the_exponent_one_is_what_the_optimizer_does(name, optimizer):
    """X^{-1} G of the dense matrices against steps of CASPR and Shampoo."""
    G = kronecker_stream((3, 4), 6, 1)
    p = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    options = {"graft": "none", "betas": (0.0, 0.9), "interval": 1, "start_step": 1, "eps": 1e-9}
    steps = optimizer([p], lr=1.0, statistics="accumulate", damping="absolute", exponent=1.0, **options)
    for gradient in G:
        before, p.grad = p.detach().clone(), gradient
        steps.step()
    expected = approximations(G, 1e-9)[name].power(-1).apply(G[-1])
    torch.testing.assert_close(before - p.detach(), expected, rtol=1e-6, atol=1e-9)


# ---- the answer --------------------------------------------------------------------------------------------------


def made_up(*values, task="vit", step=10):
    """Cases of several seeds with these cosines; all others are 0.1."""
    rows = []
    for seed, of in enumerate(values):
        cosines = {k: of.get(k, 0.1) for k in STYLES}
        near = {k: dict(zip(VALUES, (c, 0.2, 1.0, 1.0, 50.0 - 10 * c), strict=True)) for k, c in cosines.items()}
        rows += rows_of(near, task, "up", seed, step)
    return pd.DataFrame(rows)


def test_the_finding_follows_the_numbers():
    ahead = approximation.finding(pd.concat([made_up({"caspr": 0.9}), made_up({"left": 0.9}, task=NOISE)]))
    assert ahead == "At step 10 caspr is nearest to F^½ on 1 of 1 tasks; CASPR ranks 1 to 1 of 10."
    two = pd.concat([made_up({"left": 0.9, "caspr": 0.5}), made_up({"left": 0.9, "caspr": 0.95}, task="resnet")])
    assert "CASPR ranks 1 to 2 of 10." in approximation.finding(two)


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


def test_the_answer_holds():
    found = approximation.answer(Layers(quick=True, task="vit"))
    assert all(held for _, held in found.claims)
    assert [figure.name for figure in found.figures] == ["root", "inverse", "angle"]
    rows = found.tables["root"]
    assert list(rows["preconditioner"]) == list(STYLES)
    assert all(0 < value <= 1 for value in rows["vit"])
    (case,) = (
        found.tables["cases"].query("task == 'vit' and step == 10 and preconditioner == 'caspr'").to_dict("records")
    )
    assert case["root"] == pytest.approx(rows.set_index("preconditioner").loc["caspr", "vit"])
    assert len(found.counterexamples) == 1
