"""Diagnostics against direct computation, and the cost model against counting."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from caspr_cli.optim import CASPR, probe
from caspr_cli.optim.cost import blocks_of, step_flops
from caspr_cli.optim.probe import LOWEST, counters, diagnose
from caspr_cli.optim.schedule import EIGH_FLOPS
from caspr_cli.optim.symmetric import packed_length


def stepped(shape: tuple[int, int], steps: int, **options: Any) -> tuple[CASPR, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    p = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    optimizer = CASPR([p], **options)
    grads = []
    for _ in range(steps):
        p.grad = torch.randn(*shape, dtype=torch.float64)
        grads.append(p.grad.clone())
        optimizer.step()
    return optimizer, p, grads


def test_against_the_dense_matrices() -> None:
    b1, b2, eps = 0.9, 0.95, 1e-3
    optimizer, _, grads = stepped((3, 5), 6, betas=(b1, b2), eps=eps, interval=1, start_step=2)
    found = diagnose(optimizer)
    weights = [b2 ** (5 - i) * (1 - b2) / (1 - b2**6) for i in range(6)]
    L = sum(w * G @ G.T for w, G in zip(weights, grads, strict=True))
    R = sum(w * G.T @ G for w, G in zip(weights, grads, strict=True))
    roots = []
    for i, S in enumerate((L, R)):
        lam, Q = torch.linalg.eigh(S)
        lam = lam.clamp(min=0)
        damped = lam + eps * lam[-1]
        assert found["condition"][i] == pytest.approx(float(damped[-1] / damped[0]), rel=1e-6)
        assert found["damping_share"][i] == pytest.approx(float(eps * lam[-1] * len(lam) / damped.sum()), rel=1e-6)
        assert found["residual"][i] < 1e-10
        roots.append(Q @ torch.diag(damped**-0.25) @ Q.T)
    m = sum((1 - b1) * b1 ** (5 - i) * G for i, G in enumerate(grads)) / (1 - b1**6)
    v = sum((1 - b2) * b2 ** (5 - i) * G**2 for i, G in enumerate(grads)) / (1 - b2**6)
    A, B = roots
    U, D = (A @ A @ m + 2 * A @ m @ B + m @ B @ B) / 4, m / (v.sqrt() + 1e-8)
    assert found["graft_ratio"].tolist() == pytest.approx([float(D.norm() / U.norm())], rel=1e-6)
    assert found["adam_cosine"].tolist() == pytest.approx([float((U * D).sum() / U.norm() / D.norm())], rel=1e-6)


def test_a_few_blocks_at_a_time_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of the statistics would take several times their memory."""
    optimizer, _, _ = stepped((24, 12), 4, interval=1, start_step=2, block_size=4)
    whole, seen, decompose = diagnose(optimizer), [], probe.eigendecomposition
    monkeypatch.setattr(probe, "AT_ONCE", 64)
    monkeypatch.setattr(probe, "eigendecomposition", lambda S: seen.append(S.numel()) or decompose(S))
    parts = diagnose(optimizer)
    assert seen == [64, 64, 64, 64, 32] * 2
    assert whole.keys() == parts.keys()
    for name, values in whole.items():
        assert torch.equal(values, parts[name]), name


def test_the_spectrum_is_of_all_blocks_over_the_largest_of_each() -> None:
    eps = 1e-3
    optimizer, _, grads = stepped((6, 4), 3, betas=(0.9, 0.95), eps=eps, interval=1, start_step=1, block_size=3)
    weights = [0.95 ** (2 - i) * 0.05 / (1 - 0.95**3) for i in range(3)]
    expected = []
    for rows in (slice(0, 3), slice(3, 6)):
        for columns in (slice(0, 2), slice(2, 4)):
            parts = [G[rows, columns].numpy() for G in grads]
            for S in (
                sum(w * G @ G.T for w, G in zip(weights, parts, strict=True)),
                sum(w * G.T @ G for w, G in zip(weights, parts, strict=True)),
            ):
                lam = np.linalg.eigvalsh(S)
                expected += np.log10((lam + eps * lam[-1]) / ((1 + eps) * lam[-1])).tolist()
    assert sorted(diagnose(optimizer)["spectrum"].tolist()) == pytest.approx(sorted(expected), abs=1e-6)


def test_the_spectrum_ends_where_numbers_do_and_leaves_zeros_out() -> None:
    optimizer, *_ = stepped((8, 2), 1, start_step=1)  # of rank 2: six eigenvalues are damping alone
    optimizer.param_groups[0]["eps"] = 1e-30
    spectrum = diagnose(optimizer)["spectrum"]
    assert len(spectrum) == 10
    assert (float(spectrum.min()), float(spectrum.max())) == (LOWEST, 0)
    (stack,) = optimizer.stacks(0)
    stack.S[0].zero_()
    assert len(diagnose(optimizer)["spectrum"]) == 2


def test_a_stale_root_has_a_residual() -> None:
    optimizer, *_ = stepped((4, 4), 4, interval=3, start_step=1)
    fresh = float(diagnose(optimizer)["residual"].max())
    optimizer, *_ = stepped((4, 4), 6, interval=3, start_step=1)
    stale = float(diagnose(optimizer)["residual"].max())
    assert fresh < 1e-9 < 1e-2 < stale


def test_nothing_before_the_first_root() -> None:
    optimizer, *_ = stepped((4, 4), 2, start_step=5)
    assert diagnose(optimizer) == {}


def test_diagnosing_changes_nothing() -> None:
    optimizer, p, _ = stepped((4, 6), 5, start_step=2, interval=2, precondition="gradient", block_size=3)
    before = {k: v.clone() for k, v in optimizer.state[p].items()}
    assert set(diagnose(optimizer)) >= {"condition", "damping_share", "residual"}
    for name, value in optimizer.state[p].items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize(("order", "passes"), [(1, 1), (2, 2), (3, 3), (math.inf, 1)])
def test_flops_of_blocks(order: float, passes: int) -> None:
    p = torch.zeros(100, 60, requires_grad=True)
    optimizer = CASPR([p], order=order, block_size=60, interval=5)
    m, n = 50, 60
    assert [(shape, count) for *_, shape, count in blocks_of(optimizer)] == [((m, n), 2)]
    assert step_flops(optimizer) == {
        "statistics": 2 * 2 * m * n * (m + n),
        "apply": passes * 2 * 2 * m * n * (m + n),
        "roots": EIGH_FLOPS * 2 * (m**3 + n**3) / 5,
    }


@pytest.mark.parametrize(
    ("options", "cost"),
    [({}, 72), ({"order": 1}, 60), ({"solver": "eigh"}, EIGH_FLOPS), ({"damping": "absolute"}, 800)],
)
def test_flops_of_roots_on_a_gpu_are_those_of_newton(options: dict[str, Any], cost: int) -> None:
    """Where the condition is not known, of all steps that it may take."""
    optimizer = CASPR([torch.zeros(100, 60, requires_grad=True)], interval=5, **options)
    found = step_flops(optimizer, torch.device("cuda"))
    assert found["roots"] == cost * (100**3 + 60**3) / 5
    assert found["statistics"] == step_flops(optimizer)["statistics"]


def test_flops_where_a_second_moment_is_measured() -> None:
    optimizer, *_ = stepped((12, 5), 2, start_step=1, interval=4, measured=0.5)
    products, cubes = 2 * 12 * 5 * (12 + 5), 12**3 + 5**3
    half = sum(2 * 12 * 5 * packed_length(d) / d for d in (12, 5))
    expected = {
        "statistics": half + products,  # the gradient goes to the eigenbases
        "apply": 2 * products,  # the momentum goes there and back
        "roots": (EIGH_FLOPS * cubes + products + 2 * cubes) / 4,
    }
    assert step_flops(optimizer) == expected


def test_what_was_refused_is_counted() -> None:
    optimizer, p, _ = stepped((4, 6), 3, start_step=1, interval=1)
    assert counters(optimizer) == {"rejected_roots": 0, "skipped_gradients": 0}
    p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert counters(optimizer) == {"rejected_roots": 0, "skipped_gradients": 1}
    (stack,) = optimizer.stacks(0)
    stack.S[0].fill_(torch.nan)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert counters(optimizer) == {"rejected_roots": 1, "skipped_gradients": 1}


def test_a_tensor_that_has_no_roots_yet_is_left_out() -> None:
    early, late = (torch.ones(3, 4, requires_grad=True) for _ in range(2))
    optimizer = CASPR([early, late], start_step=3)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        early.grad = torch.randn(3, 4, generator=generator)
        late.grad = torch.randn(3, 4, generator=generator) if step > 3 else None
        optimizer.step()
    found = diagnose(optimizer)
    assert len(found["graft_ratio"]) == len(found["adam_cosine"]) == 1
    assert math.isfinite(found["graft_ratio"].item())
