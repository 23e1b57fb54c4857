"""The optimizers of other packages follow their papers, with the options that the registry gives them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from caspr_cli.optim.registry import build
from tests.references.baselines import ademamix_weights, normuon_weights, schedule_free_weights

STEPS = 6


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
    options: dict[str, Any] = {
        "lr": 0.1,
        "beta3": 0.99,
        "alpha": 3.0,
        "ramp_steps": 4,
        "weight_decay": 0.0,
        "eps": 1e-8,
    }
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
