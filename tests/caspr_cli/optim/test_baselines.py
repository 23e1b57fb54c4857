"""The optimizers of other packages follow their papers, with the options that the registry gives them."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from caspr_cli.optim import kron
from caspr_cli.optim.registry import build
from tests.references.baselines import ademamix_weights, normuon_weights, psgd_kron_weights, schedule_free_weights

STEPS = 6
KRON: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "betas": (0.9, 0.9), "eps": 1e-8}


def drawn(shape: tuple[int, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    noise = np.random.default_rng(0)
    return noise.normal(size=shape), [noise.normal(size=shape) * 10.0**-k for k in range(STEPS)]


def stepped(name: str, start: np.ndarray, gradients: list[np.ndarray], **options: Any) -> list[np.ndarray]:
    """The weights after every step, in float64."""
    p = nn.Parameter(torch.tensor(start))
    optimizer = build(name, [{"params": [p], "precondition": True}], options)
    weights = []
    for gradient in gradients:
        p.grad = torch.tensor(gradient)
        optimizer.step()
        weights.append(p.detach().numpy().copy())
    return weights


@pytest.mark.parametrize("ramp_steps", [0, 4, 100])
@pytest.mark.parametrize("shape", [(3, 4), (5,)])
def test_ademamix(shape: tuple[int, ...], ramp_steps: int) -> None:
    start, gradients = drawn(shape)
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "beta3": 0.99, "alpha": 3.0, "weight_decay": 0.3}
    options |= {"ramp_steps": ramp_steps, "eps": 1e-3}
    ours, theirs = (run(start, gradients, **options) for run in (partial(stepped, "ademamix"), ademamix_weights))
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_ademamix_names_a_decay_rate_that_its_ramp_cannot_start_from() -> None:
    options: dict[str, Any] = {"lr": 0.1, "beta3": 0.99, "alpha": 3, "ramp_steps": 4, "weight_decay": 0.0, "eps": 1e-8}
    for beta1 in (0.0, 0.999):
        with pytest.raises(ValueError, match=r"betas: the first should be above 0 and at most beta3, 0.99, but is"):
            build("ademamix", [{"params": [nn.Parameter(torch.ones(2))]}], options | {"betas": (beta1, 0.9)})


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 2, 3)])
def test_normuon(shape: tuple[int, ...]) -> None:
    """Its Newton-Schulz steps are in bfloat16: the weights are compared to a part of the length of one update."""
    start, gradients = drawn(shape)
    gradients = [g / np.linalg.norm(g) for g in gradients]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.3, "ns_steps": 5}
    flat = start.reshape(len(start), -1), [g.reshape(len(g), -1) for g in gradients]
    ours = [
        w.reshape(flat[0].shape) for w in stepped("normuon", start, gradients, betas=(0.9, 0.9), eps=1e-8, **options)
    ]
    theirs = normuon_weights(*flat, **options)
    plain = normuon_weights(*flat, **options, nesterov=False)
    update = options["lr"] * 0.2 * start.size**0.5
    apart = np.linalg.norm(np.subtract(ours, theirs), axis=(1, 2)) / update
    assert apart.max() < 0.05
    assert np.linalg.norm(plain[-1] - theirs[-1]) > 0.3 * update  # the tolerance tells one formula from another


@pytest.mark.parametrize("shape", [(3, 4), (5,)])
def test_schedule_free(shape: tuple[int, ...]) -> None:
    """The weights of training and of evaluation, under a warmup, and back: no bit is lost by a look."""
    start, gradients = drawn(shape)
    rates = [0.02, 0.04, 0.06, 0.08, 0.08, 0.08]
    options: dict[str, Any] = {"betas": (0.8, 0.95), "weight_decay": 0.3, "eps": 1e-3}
    p = nn.Parameter(torch.tensor(start))
    optimizer: Any = build("schedule_free", [{"params": [p], "precondition": True}], options | {"lr": 0.08})
    trained, averaged = schedule_free_weights(start, gradients, rates=rates, **options)
    for gradient, rate, y, x in zip(gradients, rates, trained, averaged, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        p.grad = torch.tensor(gradient)
        optimizer.step()
        before = p.detach().clone()
        np.testing.assert_allclose(before.numpy(), y, rtol=1e-12)
        for _ in range(2):  # twice is once
            optimizer.eval()
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-11)
        for _ in range(2):
            optimizer.train()
        assert torch.equal(p, before)
        assert "y" not in optimizer.param_groups[0]


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (2, 1), (3, 2, 2)])
def test_psgd_kron(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """To balance the factors, as every second step does here, leaves their product."""
    monkeypatch.setattr(kron, "BALANCE", 2)
    start, gradients = drawn(shape)
    noise = [torch.empty(shape, dtype=torch.float64) for _ in gradients]
    for step, v in enumerate(noise):
        v.normal_(generator=torch.Generator().manual_seed(kron.seed_of_step(3, 0, step)))
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}
    torch.manual_seed(3)
    ours = stepped("psgd_kron", start, gradients, betas=(0.9, 0.9), eps=1e-8, **options)
    theirs = psgd_kron_weights(start, gradients, noise=[v.numpy() for v in noise], **options)
    np.testing.assert_allclose(ours, theirs, rtol=1e-11)


def test_psgd_kron_of_a_long_axis_has_the_diagonal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the fit of the dense factor, with what is not on its diagonal left out."""
    monkeypatch.setattr(kron, "LONGEST", 3)
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
    optimizer = build("psgd_kron", [{"params": [p], "precondition": True}], KRON)
    p.grad = torch.randn(5, 3, dtype=torch.float64)
    optimizer.step()
    long, short = optimizer.state[p]["factors"]
    v = torch.empty(5, 3, dtype=torch.float64).normal_(
        generator=torch.Generator().manual_seed(kron.seed_of_step(0, 0, 0))
    )
    one, two = ((x**2).sum(1) for x in (p.grad, v))
    torch.testing.assert_close(long, 1 - 0.1 * (one - two) / (one + two).max())
    assert short.shape == (3, 3)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_psgd_kron_balances_factors_and_keeps_their_product(size: float) -> None:
    factors = [size * torch.eye(3), torch.full((1,), 2.0), torch.tensor([[1.0, -5.0], [0.0, 2.0]])]
    found = kron.balanced(factors)
    assert torch.allclose(torch.stack([Q.abs().max() for Q in found]), torch.tensor(10 * size) ** (1 / 3))
    torch.testing.assert_close(*(torch.kron(torch.kron(*each[:2]), each[2]) for each in (found, factors)))


def test_psgd_kron_fits_less_often_in_time() -> None:
    """At each of the first 500 steps and about every 33rd in the end; so e^-1 of them at 1,500."""
    assert [kron.fitted_share(step) for step in (0, 500)] == [1, 1]
    assert kron.fitted_share(1500) == pytest.approx(math.exp(-1))
    assert kron.fitted_share(10**6) == 0.03


def test_psgd_kron_takes_nothing_from_the_global_generators() -> None:
    """Its noise is that of its seed whatever was drawn in between, as dropout is on one rank and not on another."""
    start, gradients = drawn((3, 4))
    moved = []
    for draws in (0, 5):
        torch.manual_seed(3)
        p = nn.Parameter(torch.tensor(start))
        optimizer = build("psgd_kron", [{"params": [p], "precondition": True}], KRON)
        for gradient in gradients:
            torch.randn(draws)
            before = torch.get_rng_state()
            p.grad = torch.tensor(gradient)
            optimizer.step()
            assert torch.equal(torch.get_rng_state(), before)
        moved.append(p.detach().numpy())
    np.testing.assert_array_equal(*moved)


@pytest.mark.parametrize("older", [False, True])
def test_psgd_kron_corrects_the_bias_of_a_tensor_by_its_own_gradients(older: bool, monkeypatch) -> None:
    """One that has its first gradient late; a state of an older version counts by the steps of the group."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(kron, "fitted", lambda factors, M, noise: seen.append(M) or factors)
    p, q = (nn.Parameter(torch.zeros(3, 4)) for _ in range(2))
    optimizer = build("psgd_kron", [{"params": [p, q], "precondition": True}], KRON)
    for _ in range(5):
        p.grad = torch.randn(3, 4)
        optimizer.step()
    q.grad = torch.randn(3, 4)
    optimizer.step()
    torch.testing.assert_close(seen[-1], q.grad)
    if older:
        for state in optimizer.state.values():
            del state["step"]
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    torch.testing.assert_close(seen[-1], q.grad * (0.19 / (1 - 0.9**7) if older else 1))


@pytest.mark.parametrize("name", ["psgd_kron", "caspr_author"])
def test_an_empty_matrix_is_among_the_rest(name: str) -> None:
    p = nn.Parameter(torch.zeros(0, 3))
    options = KRON if name == "psgd_kron" else {"lr": 0.1, "adamw_lr_scale": 0.5}
    optimizer = build(name, [{"params": [p], "precondition": True}], options)
    assert optimizer.param_groups[0]["lr"] == options["lr"] * options.get("adamw_lr_scale", 1)
    p.grad = torch.zeros(0, 3)
    optimizer.step()
