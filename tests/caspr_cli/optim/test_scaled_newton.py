"""The iteration of inverse roots that a GPU takes: as exact as the other, in half as many steps."""

import math

import pytest
import torch
from torch import Tensor

from caspr_cli.optim.refresh import ACCEPTED
from caspr_cli.optim.roots import (
    bound,
    eigh_root,
    newton_root,
    newton_steps,
    residual,
    scaled_newton_root,
    scaled_steps,
)

EPS = 1e-6
D = 128


def spectrum(name: str) -> Tensor:
    i = torch.arange(1, D + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(D, generator=generator, dtype=torch.float64)
    return {
        "decay": torch.logspace(0, -8, D, dtype=torch.float64),
        "flat": drawn / 2 + 0.5,
        "half tiny": torch.where(i <= D / 2, 1.0, 1e-9),
        "low rank": torch.where(i <= 8, drawn + 0.1, 0.0),
        "power law": i**-2,
        "one": torch.ones(D, dtype=torch.float64),
    }[name]


def damping(largest: Tensor) -> Tensor:
    return EPS * largest


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("name", ["decay", "flat", "half tiny", "low rank", "power law", "one"])
def test_it_is_as_exact_as_the_other(name: str, p: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    Q, _ = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))
    exact_S = ((Q * spectrum(name) * scale) @ Q.T).unsqueeze(0)
    S = ((exact_S + exact_S.mT) / 2).float()
    exact = eigh_root(S.double(), damping, p)
    errors = []
    for found in (newton_root(S, damping, p, 1 + 1 / EPS), scaled_newton_root(S, damping, p, 1 + 1 / EPS)):
        assert bool(residual(S, found, p) <= bound(found.condition, S.dtype, ACCEPTED)), "it would be refused"
        errors.append(float((found.A.double() - exact.A).norm() / exact.A.norm()))
    assert errors[1] <= max(1.5 * errors[0], 1e-4)


@pytest.mark.parametrize("p", [2, 4])
def test_it_takes_half_as_many_steps(p: int) -> None:
    steps = scaled_steps(0.8 / (1 + 1 / EPS), p, 1e-6)
    assert len(steps) <= newton_steps(1 + 1 / EPS, p) / 2 + 1
    x = torch.logspace(math.log10(0.8 * EPS), 0, 1000, dtype=torch.float64)
    for a, b in steps:
        x = x * (a - b * x) ** p
        assert float(x.max()) <= 1 + 1e-9
    assert float(x.min()) >= 1 - 1e-6


def test_a_fault_stays_with_its_matrix() -> None:
    S = torch.eye(6).repeat(3, 1, 1)
    S[1], S[2, 0, 0] = 0, torch.nan
    found = scaled_newton_root(S, damping, 4, 1 + 1 / EPS)
    torch.testing.assert_close(found.A[0], torch.eye(6), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.A[1], torch.eye(6))
    assert not bool(residual(S, found, 4)[2] <= 1)
    assert residual(S, found, 4)[:2].tolist() == pytest.approx([0, 0], abs=1e-4)
