"""Statistics of the gradient along each axis, kept relative to a scale of their own.

For a block G and an axis i, S_i = sum over steps of unfold_i(G) unfold_i(G)^T, or its moving average. Squares of
float32 gradients leave the range of the type outside of 1e-19 to 1e+19, so what is stored is S_i / c^2, where c
follows the size of the gradient. Then U(cG) = U(G) holds from 1e-20 to 1e+20 with no loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from caspr_cli.optim.symmetric import add_gram

# How far the gradient may outgrow the scale before the scale follows. Its square, 2^20, is far from the end of any
# type; and following costs a pass over all statistics, so it should be rare.
HEADROOM = 1024.0
# Gradients below this many times the smallest normal number of the type count as zero.
SMALLEST = 16


def unfold(G: Tensor, axis: int) -> Tensor:
    """Return blocks ``[K, d_1, ..., d_k]`` as matrices ``[K, d_axis, rest]``, rows along ``axis`` (0-based)."""
    return G.movedim(axis + 1, 1).reshape(G.shape[0], G.shape[axis + 1], -1)


def per_block(x: Tensor, like: Tensor) -> Tensor:
    """Return ``[K]`` with trailing axes of size one, to multiply ``like`` ``[K, ...]`` block by block."""
    return x.view(-1, *(1,) * (like.ndim - 1))


def accumulate(
    S: list[Tensor],
    axes: tuple[int, ...],
    scale: Tensor,
    total: Tensor,
    G: Tensor,
    size: Tensor,
    *,
    beta: float,
    weight: float,
) -> Tensor | None:
    """Add a gradient in place: true S_i <- beta S_i + weight unfold_i(G) unfold_i(G)^T, for K blocks at once.

    Args:
        S: for each of ``axes`` the statistics divided by ``scale**2``, packed ``[K, packed_length(d_i)]``.
        axes: those of a block that have statistics.
        scale: ``[K]``, 0 before the first gradient.
        total: ``[K]``, the weights of all gradients so far, 1 - betas[1]^t after t of a moving average: what it is
            divided by to correct its bias.
        G: ``[K, d_1, ..., d_k]``, overwritten.
        size: ``[K]``, about the size of an entry of G. Where it is not finite, nothing is changed.
        beta: 1 for a sum, betas[1] for a moving average.
        weight: 1 for a sum, 1 - beta for a moving average.

    Returns:
        What the statistics were multiplied by for a new scale, ``[K]``, or None.

    Cost: 2 packed_length(d_i) numel(G) / (K d_i) FLOPs a block and axis. For m x n: 2 m n (m + n), less up to 3/8.
    """
    finite = size < math.inf
    # The scale decays as the root of the statistics does, so that S / scale^2 decays by itself: no pass over S. And
    # after a gradient of 1e20, gradients of 1 are seen again as soon as they weigh anything in the true S.
    decayed = scale * math.sqrt(beta)
    outgrown = finite & (size > HEADROOM * decayed)
    new = torch.where(outgrown, size, torch.where(finite, decayed, scale))
    new.masked_fill_(new < SMALLEST * torch.finfo(new.dtype).tiny, 0)  # its reciprocal would be infinite
    forgotten = (new == 0) & (scale > 0)  # after thousands of steps without a gradient
    keep = torch.where(outgrown & (new > 0), (decayed / new).square(), 1).masked_fill_(forgotten, 0)
    scale.copy_(new)
    total.copy_(torch.where(finite, total * beta + weight, total))
    inverse = torch.where(scale > 0, scale, 1).reciprocal()
    # 0 times what is not finite is NaN.
    torch.nan_to_num_(G.mul_(per_block(torch.where(finite, inverse, 0), G)), nan=0.0)
    # Elsewhere the question would wait for the device, which takes longer than the pass.
    unchanged = keep.device.type == "cpu" and bool((keep == 1).all())
    for axis, S_i in zip(axes, S, strict=True):
        if not unchanged:
            S_i.mul_(keep.unsqueeze(1))
        add_gram(S_i, unfold(G, axis), weight)
    return None if unchanged else keep
