"""The polar factor of U, and steps whose length is that of Muon's."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references.drive import relative_error
from references.kronecker import newton_schulz
from references.stream import random_stream
from torch import nn

from caspr_cli.optim import CASPR
from caspr_cli.optim.polar import flops, polar_factor
from caspr_cli.optim.precision import is_fast_in_bfloat16

SIZE = st.integers(1, 7)
MUON = {
    "exponent": 0, "polar": True, "graft": "rms", "nesterov": True, "weight_decay": 0.1, "lr": 0.02,
}  # fmt: skip


def blocks(K: int, m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(K, m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(K=st.integers(1, 3), m=SIZE, n=SIZE, power=st.integers(-150, 150), steps=st.integers(1, 6))
def test_steps_by_singular_values(K: int, m: int, n: int, power: int, steps: int) -> None:
    """Whatever the size of the gradient: its square need not be a number of its type."""
    G = blocks(K, m, n)
    for found, block in zip(polar_factor(10.0**power * G, steps), G, strict=True):
        assert relative_error(found, newton_schulz(block, steps)) < 1e-9


@pytest.mark.parametrize("shape", [(16, 80), (80, 16), (16, 24)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-3), (torch.bfloat16, 0.4)])
def test_small_singular_values_keep_their_direction(shape: tuple[int, int], dtype: torch.dtype, error: float) -> None:
    """Also where the steps are those of the Gram matrix, in which their squares are lost."""
    U, _, Vh = torch.linalg.svd(blocks(1, *shape), full_matrices=False)
    G = (U * torch.logspace(0, -5, 16, dtype=torch.float64) @ Vh).to(dtype)
    assert relative_error(polar_factor(G, 5)[0].double(), newton_schulz(G[0].double())) < error


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("steps", [5, 6, 7, 9, 12])
def test_any_number_of_steps_is_stable_for_gradients_of_low_rank(rank: int, steps: int) -> None:
    """Rounding makes eigenvalues of Y Y^T negative, and each step on it alone makes them twelve times as large."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(64, rank, generator=generator) @ torch.randn(rank, 256, generator=generator)
    values = torch.linalg.svdvals(polar_factor(X.unsqueeze(0), steps)[0])
    assert float(values[rank - 1]) > 0.6
    assert float(values[0]) < 1.3
    assert float(values[rank]) < 0.3  # what rounding left of the others


def test_a_block_of_zeros_stays_zero() -> None:
    G = torch.stack([torch.zeros(3, 4), torch.ones(3, 4)])
    assert polar_factor(G, 5)[0].eq(0).all()
    assert polar_factor(G, 5).isfinite().all()


def test_more_axes_are_flattened_without_those_of_size_one() -> None:
    G = blocks(2, 3, 8)
    assert polar_factor(G.view(2, 1, 3, 4, 2), 5).equal(polar_factor(G, 5).view(2, 1, 3, 4, 2))


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)])
def test_exponent_0_is_muon(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's Muon does its Newton-Schulz steps in bfloat16; here it is made to do them in float64."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    p, q = (nn.Parameter(torch.zeros(shape).double()) for _ in range(2))
    ours = CASPR([p], betas=(0.95, 0.95), **MUON)
    torchs = torch.optim.Muon([q], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for gradient in random_stream(*shape, steps=12, seed=2):
        p.grad, q.grad = gradient, gradient
        ours.step()
        torchs.step()
        assert relative_error(p.detach(), q.detach()) < 1e-9
    assert not [name for name in ours.state[p] if name.startswith(("statistics_", "root_0", "root_1", "exp_avg_sq"))]


def test_a_length_of_rms_needs_no_second_moment() -> None:
    """Where it is preconditioned; what is left to AdamW is torch's AdamW."""
    weight, bias = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4))
    other = nn.Parameter(torch.ones(4))
    ours = CASPR([weight, bias], lr=0.1, graft="rms", start_step=2)
    adamw = torch.optim.AdamW([other], lr=0.1, weight_decay=0)
    for step, gradient in enumerate(random_stream(4, 3, steps=4, seed=4), start=1):
        before = weight.detach().clone()
        weight.grad, bias.grad, other.grad = gradient.float(), gradient[:, 0].float(), gradient[:, 0].float()
        ours.step()
        adamw.step()
        moved = (weight - before).detach()
        assert moved.square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-5)
        assert bool((moved.abs() - 0.02).abs().max() < 1e-6) == (step < 2)  # signs, until there are roots
    assert bias.equal(other)
    assert "exp_avg_sq" in ours.state[bias]
    assert "exp_avg_sq" not in ours.state[weight]


def test_flops_are_those_of_the_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for shape, steps in itertools.product(((12, 5), (5, 12), (4, 3, 2), (7, 5)), (1, 2, 5)):
        with FlopCounterMode(display=False) as counter:
            polar_factor(torch.randn(3, *shape), steps)
        assert 3 * flops(shape, steps, torch.float32) == counter.get_total_flops()
    five = [flops(shape, 5, torch.float32) for shape in ((5,), (5, 1), (5, 2))]
    assert five[0] == five[1] < five[2]


def trained(shape: tuple[int, int] = (24, 40), **options: Any) -> torch.Tensor:
    p = nn.Parameter(torch.zeros(shape))
    optimizer = CASPR([p], start_step=2, interval=2, **options)
    for gradient in random_stream(*shape, steps=6, seed=5):
        p.grad = gradient.float()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("fast", [True, False])
def test_products_before_a_polar_factor_are_in_bfloat16_where_the_device_is_fast_in_it(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("caspr_cli.optim.options.is_fast_in_bfloat16", lambda device: fast)
    full, low = (trained(polar=True, graft="rms", apply_dtype=dtype) for dtype in (None, torch.bfloat16))
    assert trained(polar=True, graft="rms", apply_dtype="auto").equal(low if fast else full)
    assert 1e-4 < relative_error(low, full) < 0.05
    for other in ({}, {"polar": True, "eps": 1e-9, "factor_dtype": torch.float64}, {"polar": True, "measured": 0.5}):
        assert trained(**other, apply_dtype="auto").equal(trained(**other))


def test_which_devices_are_fast_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CPUs by what torch says of this one: Intel's AVX-512 is slower in bfloat16 than in float32."""
    is_fast_in_bfloat16.cache_clear()
    intel, amd = {"cpu_name": "Intel Xeon"}, {"cpu_name": "AMD EPYC"}
    for found, fast in (
        ({}, False),
        (intel | {"avx512_bf16": True}, False),
        (intel | {"avx512_bf16": True, "amx_bf16": True}, True),
        (amd | {"avx512_bf16": True}, True),
        (amd, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert is_fast_in_bfloat16(torch.device("cpu")) == fast
        is_fast_in_bfloat16.cache_clear()
    if not torch.cuda.is_available():
        assert is_fast_in_bfloat16(torch.device("cuda"))
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
        assert is_fast_in_bfloat16(torch.device("meta"))
    is_fast_in_bfloat16.cache_clear()
