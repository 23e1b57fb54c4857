"""Statistics to the power of 1 instead of 1/2, in units in which their trace is 1."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references.drive import relative_error, run
from references.kronecker import spectral_power
from references.optimizer import reference_weights
from references.stream import random_stream, statistics

from caspr_cli.optim import CASPR, Shampoo
from caspr_cli.optim.roots import eigh_root, residual
from caspr_cli.optim.symmetric import pack, trace

BARE = {"lr": 1.0, "betas": (0.0, 0.9), "graft": "none", "interval": 1, "start_step": 1, "exponent": 1.0, "eps": 1e-4}


def last_update(optimizer, gradients, **options) -> torch.Tensor:
    weights = run(optimizer, torch.zeros_like(gradients[0]), gradients, **BARE | options)
    return weights[-2] - weights[-1]


def test_shampoo_is_the_product_as_an_approximation_of_the_statistic() -> None:
    """U = (L x R / tr(L))^(-1/2) vec(G), written from that formula alone."""
    gradients = random_stream(3, 4, steps=6, seed=1)
    L, R = (S + 1e-4 * torch.linalg.eigvalsh(S)[-1] * torch.eye(len(S)) for S in statistics(gradients, "ema", 0.9))
    whole = torch.kron(L, R) / statistics(gradients, "ema", 0.9)[0].trace()
    expected = (spectral_power(whole, -0.5) @ gradients[-1].flatten()).view(3, 4)
    assert relative_error(last_update(Shampoo, gradients), expected) < 1e-9


@pytest.mark.parametrize("optimizer", [CASPR, Shampoo])
@settings(max_examples=25, deadline=None)
@given(exponent=st.floats(-12, 12), blocks=st.sampled_from([2, 1024]))
def test_the_size_of_gradients_does_not_matter(optimizer, exponent: float, blocks: int) -> None:
    """Of degree 0, each block too."""
    gradients = random_stream(3, 4, steps=4, seed=3)
    scaled = [10**exponent * g for g in gradients]
    one, two = (last_update(optimizer, each, block_size=blocks) for each in (gradients, scaled))
    assert relative_error(one, two) < 1e-9


@pytest.mark.parametrize("order", [1, 2, 3, math.inf])
def test_newton_has_the_roots(order: float) -> None:
    """Odd roots, too, and the first."""
    weight, *gradients = random_stream(6, 5, steps=13, seed=4)
    options = {"exponent": 1.0, "interval": 1, "start_step": 1, "eps": 1e-3, "graft": "none"}
    found = run(CASPR, weight, gradients, solver="newton", order=order, **options)
    expected = reference_weights(weight, gradients, "caspr", order=order, **options)
    assert relative_error(weight - found[-1], weight - expected[-1]) < 1e-3


@pytest.mark.parametrize("p", [1, 3, 4])
def test_the_residual_of_odd_roots(p: int) -> None:
    x = random_stream(8, 8, steps=1, seed=5)[0]
    S = (x @ x.mT + torch.eye(8)).unsqueeze(0)
    root = eigh_root(S, lambda largest: 1e-3 * largest, p)
    assert residual(S, root, p).item() < 1e-10
    root.A.mul_(1.1)
    assert residual(S, root, p).item() == pytest.approx(1.1**p - 1, rel=1e-6)


@pytest.mark.parametrize("d", [1, 5, 300, 513])
def test_the_trace_of_what_is_packed(d: int) -> None:
    S = torch.randn(2, d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(trace(pack(S), d), S.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-12)


@pytest.mark.parametrize("wrong", [0.3, 2, -1, math.nan])
def test_another_exponent_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"exponent should be one of 0, 0\.25, 0\.5, 1 but is"):
        CASPR([torch.nn.Parameter(torch.zeros(2, 2))], exponent=wrong)
