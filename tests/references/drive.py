"""Runs any ``torch.optim.Optimizer`` class on a list of gradients. It is told the class, so it imports no library."""

import inspect

import torch
from torch import Tensor

# The update of the paper alone: fresh roots in every step, no momentum, no grafting. betas[1] is chosen beside it.
BARE = {"interval": 1, "start_step": 1, "graft": "none", "weight_decay": 0.0}


def run(optimizer_class, weight: Tensor, gradients: list[Tensor | None], *, lr=1e-3, **options) -> list[Tensor]:
    """The weights after every step; ``lr`` is a number or one number a step."""
    return run_with_turns(optimizer_class, weight, gradients, lr=lr, **options)[0]


def turns_of(optimizer, parameter: Tensor, index: int = 0) -> dict[tuple[tuple[int, int], ...], int]:
    """The step of the interval at which each block, (start, stop) on each axis, gets new roots."""
    return {
        tuple((s.start, s.stop) for s in cut): phase
        for stack in getattr(optimizer, "stacks", lambda index: [])(index)
        if parameter in stack.rows
        for cut, phase in zip(
            optimizer.layout(parameter, optimizer.param_groups[index]).blocks[stack.shape],
            stack.refresh_offset[stack.rows[parameter]],
            strict=True,
        )
    }


def run_with_turns(optimizer_class, weight: Tensor, gradients: list[Tensor | None], *, lr=1e-3, **options):
    """The weights after every step, and the turns of the blocks."""
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = optimizer_class([parameter], lr=lr[0] if isinstance(lr, list) else lr, **options)
    rates = lr if isinstance(lr, list) else [lr] * len(gradients)
    weights = []
    for rate, gradient in zip(rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()
        weights.append(parameter.detach().clone())
    return weights, turns_of(optimizer, parameter)


def bare_updates(optimizer_class, gradients: list[Tensor], *, beta: float = 0.9, **options) -> list[Tensor]:
    """U_t of every step. The weight is set to zero before each, so that W_t = -U_t has no rounding of a difference."""
    parameter = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    if "precondition_1d" in inspect.signature(optimizer_class).parameters:  # (n, 1) too
        options = {"precondition_1d": True} | options
    optimizer = optimizer_class([parameter], lr=1.0, **{**BARE, "betas": (0.0, beta), **options})
    updates = []
    for gradient in gradients:
        with torch.no_grad():
            parameter.zero_()
        parameter.grad = gradient.clone()
        optimizer.step()
        updates.append(-parameter.detach().clone())
    return updates


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected||_F / ||expected||_F in float64; NaN counts as infinitely wrong."""
    actual, expected = actual.double(), expected.double()
    length = torch.linalg.vector_norm(expected).item()
    error = torch.linalg.vector_norm(actual - expected).item()
    if error != error:
        return float("inf")
    return error / length if length > 0 else error
