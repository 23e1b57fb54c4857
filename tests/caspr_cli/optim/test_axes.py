"""One-sided and per-row preconditioning: the formulas, what holds of them, and that each is a choice like any other."""

import math
from typing import Any

import pytest
import torch
from references.drive import bare_updates
from references.stream import random_stream
from torch import Tensor, nn

from caspr_cli.optim import CASPR
from caspr_cli.optim.blocks import Layout
from caspr_cli.optim.combine import apply_roots
from caspr_cli.optim.cost import state_bytes, step_flops
from caspr_cli.optim.probe import diagnose
from caspr_cli.optim.schedule import EIGH_FLOPS
from caspr_cli.theory.work import work_of

ONE = ("first", "last", "row")


# ---- tensors of which some axes have statistics -----------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, math.inf])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [((9, 2, 3), (1, 2)), ((2, 9, 3), (0, 2)), ((2, 3, 9), (0, 1)), ((1, 4, 3), (1, 2)), ((2, 4, 3, 2), (1, 2, 3)),
     ((1, 4, 3, 2), (1, 2, 3)), ((3, 9, 2, 2), (0, 2, 3)), ((5, 1, 4), (2,))],
)  # fmt: skip
def test_axes_are_combined_where_they_are(shape: tuple[int, ...], axes: tuple[int, ...], order: float) -> None:
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    A = [torch.randn(2, shape[i], shape[i], generator=generator, dtype=torch.float64) for i in axes]
    A = [a + a.mT for a in A]
    letters = "abcd"[: len(shape)]

    def on(x: Tensor, a: Tensor, axis: int) -> Tensor:
        return torch.einsum(f"kx{letters[axis]},k{letters}->k{letters.replace(letters[axis], 'x')}", a, x)

    expected = G
    for _ in range(1 if math.isinf(order) or len(axes) == 1 else int(order)):
        if math.isinf(order):
            for a, axis in zip(A, axes, strict=True):
                expected = on(expected, a, axis)
        else:
            parts = [on(expected, a, axis) for a, axis in zip(A, axes, strict=True)]
            expected = sum(parts[1:], parts[0]) / len(parts)
    torch.testing.assert_close(apply_roots(G.clone(), A, axes, order, torch.empty_like(G)), expected)


@pytest.mark.parametrize("options", [{}, {"measured": 0.5}, {"polar": True}])
@pytest.mark.parametrize("shape", [(600, 2, 3), (2, 600, 3), (1024, 1, 4), (1024, 1, 3, 3), (3, 1024, 3, 3)])
def test_a_long_axis_among_unmerged_ones(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """A step preconditions, as it does for the same numbers with the long axis behind the others."""
    order = [i for i in range(len(shape)) if shape[i] < 500] + [i for i in range(len(shape)) if shape[i] >= 500]
    G = [torch.randn(shape, generator=torch.Generator().manual_seed(step)) for step in range(4)]
    p, q = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape).permute(order).contiguous())
    optimizers = [CASPR([x], merge="none", start_step=2, graft="none", **options) for x in (p, q)]
    for g in G:
        p.grad, q.grad = g, g.permute(order).contiguous()
        for optimizer in optimizers:
            optimizer.step()
    assert optimizers[0].layout(p, optimizers[0].param_groups[0]).long
    if "polar" not in options:  # of which the matrix is another one
        torch.testing.assert_close(p.permute(order), q, rtol=1e-3, atol=1e-5)
    assert bool(p.isfinite().all())


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
    "measured": ((3, 6, 5), 1, {"measured": 1.0}),
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
