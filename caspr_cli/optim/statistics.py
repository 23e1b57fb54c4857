"""Statistics of the gradient along each axis, kept relative to a scale of their own.

For a block G with k axes, S_i = sum over steps of unfold_i(G) unfold_i(G)^T, or its moving average. Squares of
float32 gradients leave the range of the type outside of 1e-19 to 1e+19, so what is stored is S_i / c^2, where c
follows the block's largest absolute entry. Then U(cG) = U(G) holds from 1e-20 to 1e+20 with no loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unfold(G: Tensor, axis: int) -> Tensor:
    """Blocks ``[K, d_1, ..., d_k]`` as matrices ``[K, d_axis, rest]``, rows along ``axis`` (0-based)."""
    return G.movedim(axis + 1, 1).reshape(G.shape[0], G.shape[axis + 1], -1)


def per_block(x: Tensor, like: Tensor) -> Tensor:
    """``[K]`` with trailing axes of size one, to multiply ``like`` ``[K, ...]`` block by block."""
    return x.view(-1, *(1,) * (like.ndim - 1))


def accumulate(S: list[Tensor], scale: Tensor, total: Tensor, G: Tensor, *, beta: float, weight: float) -> None:
    """In place: true S_i <- beta S_i + weight unfold_i(G) unfold_i(G)^T, for K blocks at once.

    Args:
        S: for each axis ``[K, d_i, d_i]``, the statistics divided by ``scale**2``.
        scale: ``[K]``, at least the largest absolute entry that still counts; 0 before the first gradient.
        total: ``[K]``, the weights of all gradients so far, 1 - betas[1]^t after t of a moving average: what it is
            divided by to correct its bias.
        G: ``[K, d_1, ..., d_k]``, overwritten. A block that is not finite leaves its statistics as they are.
        beta: 1 for a sum, betas[1] for a moving average.
        weight: 1 for a sum, 1 - betas[1] for a moving average.

    Cost: 2 K d_i numel(G)/K FLOPs an axis (for m x n blocks 2 K m n (m + n)).
    """
    peak = G.abs().amax(dim=tuple(range(1, G.ndim)))
    finite = torch.isfinite(peak)
    # The old scale decays as the root of its statistics does, so that S / scale^2 stays of order one: after a
    # gradient of 1e20, gradients of 1 are seen again as soon as they weigh anything in the true S.
    decayed = scale * math.sqrt(beta)
    scale.copy_(torch.where(finite, torch.maximum(decayed, peak), scale))
    total.copy_(torch.where(finite, total * beta + weight, total))
    unit = torch.where(scale > 0, scale, 1)
    keep = torch.where(finite, (decayed / unit).square(), 1)  # <= 1; beta is in it
    G.div_(per_block(unit, G)).masked_fill_(per_block(~finite, G), 0)
    for axis, S_i in enumerate(S):
        X = unfold(G, axis)
        S_i.mul_(per_block(keep, S_i)).baddbmm_(X, X.mT, alpha=weight)
