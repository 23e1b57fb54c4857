"""Diagonal methods: they lend their step length to a preconditioned direction, and stand in where there is none."""

from __future__ import annotations

import torch
from torch import Tensor

GRAFTS = ("adam", "rmsprop", "sgd", "none")


def needs_second_moment(graft: str) -> bool:
    return graft in ("adam", "rmsprop")


def update_second_moment(exp_avg_sq: list[Tensor], grads: list[Tensor], beta2: float) -> None:
    """v <- beta2 v + (1 - beta2) g^2."""
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, value=1 - beta2)


def direction(
    graft: str, momenta: list[Tensor], exp_avg_sq: list[Tensor], steps: list[int], beta2: float, eps: float
) -> list[Tensor]:
    """The step that the diagonal method would take, divided by the learning rate.

    Args:
        momenta: bias-corrected momentum, or the gradient where momentum comes later.
        exp_avg_sq: moving average of the squared gradient, for ``adam`` (which corrects its bias) and
            ``rmsprop`` (which does not); unused otherwise.
        steps: number of updates in ``exp_avg_sq``, for each tensor.

    ``sgd`` and ``none`` are the momentum itself.
    """
    if not needs_second_moment(graft):
        return momenta
    denominators = torch._foreach_sqrt(exp_avg_sq)
    if graft == "adam":
        torch._foreach_div_(denominators, [(1 - beta2**t) ** 0.5 for t in steps])
    torch._foreach_add_(denominators, eps)
    return list(torch._foreach_div(momenta, denominators))


def transfer_length(updates: list[Tensor], lengths_of: list[Tensor]) -> None:
    """In place: each update gets the Frobenius norm of its counterpart. A zero update stays zero.

    Norms are taken in float64: the square of a float32 entry of 1e20 is not a float32.
    """
    have = torch._foreach_norm(updates, dtype=torch.float64)
    want = torch._foreach_norm(lengths_of, dtype=torch.float64)
    for U, a, b in zip(updates, have, want, strict=True):
        U.mul_(torch.where(a > 0, b / a, 0))
