"""One-sided and per-row preconditioning: the formulas, what holds of them, and that each is a choice like any other."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from pairs import pairs
from references.drive import bare_updates, relative_error
from references.kronecker import one_sided, row_by_row
from references.stream import random_stream, statistics
from stepping import advance
from torch import nn

from caspr_cli.optim import CASPR, Shampoo
from caspr_cli.optim.blocks import AXES, Layout
from caspr_cli.optim.cost import state_bytes, step_flops
from caspr_cli.optim.probe import diagnose
from caspr_cli.optim.schedule import EIGH_FLOPS
from caspr_cli.theory.work import work_of

ONE = ("first", "last", "row")
MERGED = [((4, 3), (4, 3)), ((2, 5), (2, 5)), ((4, 3, 2, 2), (4, 12))]


# ---- the formulas ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "optimizer", "shape", "merged", "kind"),
    [
        tuple(row.values())[:2] + row["shapes"] + (row["kind"],)
        for row in pairs({"axes": ONE, "optimizer": [CASPR, Shampoo], "shapes": MERGED, "kind": ["ema", "accumulate"]})
    ],
)
def test_each_against_its_formula(
    axes: str, optimizer: type, shape: tuple[int, ...], merged: tuple[int, ...], kind: str
) -> None:
    gradients = random_stream(*shape, steps=4, seed=1)
    updates = bare_updates(optimizer, gradients, axes=axes, eps=1e-4, statistics=kind, beta=0.9)
    seen = [g.reshape(merged) for g in gradients]
    for t, update in enumerate(updates, start=1):
        if axes == "row":
            R = [statistics([g[i] for g in seen[:t]], kind, 0.9)[0] for i in range(merged[0])]
            expected = row_by_row(seen[t - 1], R, 1e-4, "relative")
        else:
            axis = 0 if axes == "first" else 1
            expected = one_sided(seen[t - 1], statistics(seen[:t], kind, 0.9)[axis], axis, 1e-4, "relative")
        assert relative_error(update.reshape(merged), expected) < 1e-9


# ---- what holds for every gradient -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "scale", "dtype"),
    [
        ("first", 1e-20, torch.float32),
        ("last", 1e20, torch.float32),
        ("row", 1e20, torch.float32),
        ("row", 1e-20, torch.float64),
        ("first", 1e20, torch.float64),
    ],
)
def test_scale_of_the_gradients_does_not_matter(axes: str, scale: float, dtype: torch.dtype) -> None:
    gradients = random_stream(4, 3, steps=3, seed=8)
    plain = bare_updates(CASPR, [g.to(dtype) for g in gradients], axes=axes, eps=1e-3)[-1]
    scaled = bare_updates(CASPR, [(scale * g).to(dtype) for g in gradients], axes=axes, eps=1e-3)[-1]
    assert relative_error(scaled, plain) < (1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("axes", AXES)
def test_a_row_that_never_has_a_gradient_stays(axes: str) -> None:
    gradients = random_stream(4, 3, steps=3, seed=9, dtype=torch.float32)
    for gradient in gradients:
        gradient[2] = 0
    for update in bare_updates(CASPR, gradients, axes=axes):
        assert torch.equal(update[2], torch.zeros(3))
        assert torch.isfinite(update).all()


# ---- a choice like any other -------------------------------------------------------------------------------------


def test_the_state_is_of_the_axes_that_are_chosen() -> None:
    names = {"all": {0, 1}, "first": {0}, "last": {1}, "row": {1}}
    for axes, numbers in names.items():
        p = nn.Parameter(torch.ones(4, 3))
        p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        optimizer = CASPR([p], axes=axes, start_step=1)
        optimizer.step()
        found = {name for name in optimizer.state[p] if name.partition(".")[0].endswith(("_0", "_1"))}
        kinds = ("statistics", "root", "share")[: 2 if axes == "row" else 3]
        assert found == {f"{name}_{i}.0" for name in kinds for i in numbers}
    assert optimizer.state[p]["statistics_1.0"].shape == (4, 9)
    assert optimizer.state[p]["root_1.0"].shape == (4, 3, 3)


@pytest.mark.parametrize(
    ("before", "after"), [("all", "all"), ("all", "first"), ("first", "last"), ("last", "row"), ("row", "all")]
)
def test_a_state_of_other_axes_is_refused(before: str, after: str) -> None:
    """Where the group says other axes than those of the state, at once and after a load."""
    for shape in [(4, 3), (1, 3), (4, 1)]:
        p = nn.Parameter(torch.ones(shape))
        optimizer = CASPR([p], axes=before, start_step=1, interval=1, precondition_1d=True)
        advance([p], optimizer, range(2))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.param_groups[0]["axes"] = after
        if before == after or (shape[0] == 1 and {before, after} == {"last", "row"}):  # one row: the same
            advance([p], optimizer, range(2, 4))
            continue
        with pytest.raises(ValueError, match=r"\.0 of a parameter .* block_size, merge or axes were others"):
            advance([p], optimizer, range(2, 3))
        with pytest.raises(ValueError, match="axes were others"):  # and still
            advance([p], optimizer, range(2, 3))


@pytest.mark.parametrize("axes", ONE)
def test_diagnostics_are_of_these_axes(axes: str) -> None:
    eps, G = 1e-3, random_stream(4, 3, steps=1, seed=11)[0]
    p = nn.Parameter(torch.zeros(4, 3).double())
    p.grad = G.clone()
    optimizer = CASPR([p], axes=axes, start_step=1, eps=eps)
    optimizer.step()
    found = diagnose(optimizer)
    S = {"first": [G @ G.T], "last": [G.T @ G], "row": [g.outer(g) for g in G]}[axes]
    conditions = [
        float((lam[-1] * (1 + eps)) / (lam[0].clamp(min=0) + eps * lam[-1])) for lam in map(torch.linalg.eigvalsh, S)
    ]
    assert found["condition"].tolist() == pytest.approx(conditions, rel=1e-6)
    assert float(found["residual"].max()) < 1e-9
    U = bare_updates(CASPR, [G], axes=axes, eps=eps)[0]
    D = G / (G.abs() + 1e-8)
    assert float(found["graft_ratio"]) == pytest.approx(float(D.norm() / U.norm()), rel=1e-6)
    assert float(found["adam_cosine"]) == pytest.approx(float((U * D).sum() / U.norm() / D.norm()), rel=1e-6)


def test_what_it_costs() -> None:
    m, n, interval = 50, 30, 5
    sides = {"all": (1, (m, n)), "first": (1, (m,)), "last": (1, (n,)), "row": (m, (n,))}
    for axes, (blocks, d) in sides.items():
        p = nn.Parameter(torch.ones(m, n))
        p.grad = torch.ones(m, n)
        optimizer = CASPR([p], axes=axes, interval=interval, start_step=1)
        products = 2.0 * m * n * sum(d)
        expected = {
            "statistics": products,
            "apply": products * (2 if axes == "all" else 1),
            "roots": EIGH_FLOPS * blocks * sum(size**3 for size in d) / interval,
        }
        assert step_flops(optimizer) == pytest.approx(expected)
        optimizer.step()
        shares = 0 if axes == "row" else sum(d)
        factors = 2 * blocks * sum(size**2 for size in d) + shares
        assert state_bytes(optimizer.state) == 4 * (2 + 2 * m * n + factors + 5 * blocks)
        assert work_of(optimizer).factors == 4 * factors
        assert work_of(optimizer).products == pytest.approx(expected["statistics"] + expected["apply"])


def test_one_of_rows_cuts_the_first_axis_into_parts_of_one() -> None:
    layout = Layout.of((4, 6), "matrix", 4, "row")
    assert layout.axes == (1,)
    assert {shape: len(cuts) for shape, cuts in layout.blocks.items()} == {(1, 3): 8}
    assert Layout.of((2, 3, 4), "none", 100, "row").shape == (2, 12)
    assert Layout.of((2, 3, 4), "none", 100, "last").axes == (2,)
    assert Layout.of((5,), "matrix", 3, "row").blocks == Layout.of((5,), "matrix", 3).blocks


MEMBERS: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {
    "matrices": ((3, 6, 5), 1, {}),
    "shampoo": ((3, 6, 5), 1, {"order": math.inf}),
    "cubes of it": ((3, 6, 5), 1, {"order": 3}),
    "blocks": ((3, 6, 5), 1, {"block_size": 4}),
    "two axes of members": ((2, 3, 6, 5), 2, {}),
    "filters": ((2, 4, 3, 3, 3), 1, {}),
    "each axis": ((2, 4, 3, 2), 1, {"merge": "none"}),
    "each axis, shampoo": ((2, 4, 3, 2), 1, {"merge": "none", "order": math.inf}),
    "first": ((3, 6, 5), 1, {"axes": "first"}),
    "last": ((3, 6, 5), 1, {"axes": "last"}),
    "row": ((3, 6, 5), 1, {"axes": "row"}),
    "vectors": ((3, 6), 1, {"precondition_1d": True}),
    "low": ((3, 6, 5), 1, {"apply_dtype": torch.bfloat16, "pack_roots": True}),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_members_of_a_batch_move_as_if_each_was_a_parameter(case: str) -> None:
    shape, batch_axes, options = MEMBERS[case]
    options = {"lr": 0.1, "graft": "none", "start_step": 2, "interval": 1, "betas": (0.9, 0.95), **options}
    stacked = nn.Parameter(torch.ones(shape))
    alone = [nn.Parameter(member.clone()) for member in stacked.detach().flatten(0, batch_axes - 1)]
    together, apart = CASPR([stacked], batch_axes=batch_axes, **options), CASPR(alone, **options)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        scales = torch.logspace(-2, 2, len(alone)).view(-1, *[1] * (len(shape) - batch_axes))
        G = torch.randn(len(alone), *shape[batch_axes:], generator=generator) * scales
        stacked.grad = G.view(shape)
        for p, g in zip(alone, G, strict=True):
            p.grad = g.clone()
        together.step()
        apart.step()
    rounding = 5e-3 if case == "low" else 1e-5
    torch.testing.assert_close(stacked.detach().view_as(G), torch.stack(alone).detach(), rtol=2e-4, atol=rounding)
    mixed = CASPR([twin := nn.Parameter(torch.ones(shape))], **options)
    twin.grad = stacked.grad
    for _ in range(2):
        mixed.step()
    assert not torch.allclose(twin, stacked, rtol=0.1)


def test_vectors_of_a_batch_are_vectors() -> None:
    """Biases of experts are left to the graft, as those of one layer are."""
    optimizer = CASPR([p := nn.Parameter(torch.ones(3, 6))], batch_axes=1)
    assert not optimizer.preconditions(p, optimizer.param_groups[0])
    with pytest.raises(ValueError, match="batch_axes should be a positive integer or 0 but is: -1"):
        CASPR([p], batch_axes=-1)
