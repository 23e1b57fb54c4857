"""The second moment of the gradient in the eigenbases of the statistics: what is measured there, beside closed forms.

With G' the gradient of a block in the bases Q_i of its axes V <- b2 V + (1 - b2) G'^2, in the units of S.

When the bases turn, V becomes what a covariance that was diagonal in the old basis has on its diagonal in the new one:
V' = T V with T = (T_1 o T_1) x ... x (T_k o T_k), T_i = Q_i'^T Q_i. So it does not matter in which order and with which
signs a decomposition gives its vectors, and the sum of V stays. V begins with the first bases, as the product of the
axes' eigenvalues over their trace: it has the sums over rows and columns that V would have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from caspr_cli.optim.options import Group
from caspr_cli.optim.stacks import RowIndex, Stack
from caspr_cli.optim.statistics import per_block


def on_axis(G: Tensor, A: Tensor, axis: int) -> Tensor:
    """Return A ``[K, d, d]`` applied to axis ``axis`` (0-based) of each block of G ``[K, d_1, ..., d_k]``."""
    moved = G.movedim(axis + 1, 1)  # [K, d, *rest]
    return torch.bmm(A, moved.flatten(2) if G.ndim > 2 else moved.unsqueeze(2)).view(moved.shape).movedim(1, axis + 1)


def on_axes(G: Tensor, B: list[Tensor], axes: tuple[int, ...], out: Tensor | None = None) -> Tensor:
    """Return B_i ``[K, d_i, d_i]``, which need not be symmetric, on ``axes`` of each block of G ``[K, d_1, ..., d_k]``.

    Args:
        out: memory of the size of G. Where it is given the result of matrices is in G, and nothing is allocated.
    """
    if axes == (1, 2) and G.ndim == 4 and G.shape[1] == 1:  # a matrix that is one member of a batch
        return on_axes(G.squeeze(1), B, (0, 1), None if out is None else out.squeeze(1)).unsqueeze(1)
    if len(axes) == 2 and G.ndim == 3:
        return torch.bmm(torch.bmm(B[0], G, out=out), B[1].mT, out=None if out is None else G)
    for axis, B_i in zip(axes, B, strict=True):
        G = on_axis(G, B_i, axis)
    return G


def along(values: Tensor, axis: int, like: Tensor) -> Tensor:
    """Return numbers ``[K, d]`` of an axis as ``[K, 1, ..., d, ..., 1]``, to multiply ``like`` ``[K, ..., d, ...]``."""
    ones = [1] * (like.ndim - 1)
    return values.view(-1, *ones[:axis], values.shape[1], *ones[axis + 1 :])


def measure(
    stack: Stack, rows: slice, X: Tensor, out: Tensor, keep: Tensor | None, weight: float, group: Group
) -> None:
    """Add to V the gradient that :func:`caspr_cli.optim.statistics.accumulate` has left in X, which is overwritten.

    Args:
        keep: what that has returned.

    Cost for m x n blocks: 2 m n (m + n) FLOPs.
    """
    assert stack.V is not None
    V, Q = stack.V[rows], [stack.root(place, rows, X.dtype) for place in range(len(stack.axes))]
    if keep is not None:
        V.mul_(per_block(keep, V))
    G = on_axes(X, [Q_i.mT for Q_i in Q], stack.axes, out)
    V.addcmul_(G, G, value=weight)
    pool(stack, rows, group)


def pool(stack: Stack, at: RowIndex, group: Group) -> None:
    """Give directions of one axis whose eigenvalue is below the damping the mean of their V.

    There, as in the null space of the statistics, rounding alone chooses the basis: U must not depend on that choice.
    """
    assert stack.V is not None
    V = before = stack.V[at]
    for values, axis in zip((v[at] for v in stack.values), stack.axes, strict=True):
        size = values.amax(1) if group["damping"] == "relative" else stack.root_scale[at].square().reciprocal()
        low = (values < 2 * group["eps"] * size.unsqueeze(1)).to(V.dtype)
        if low.device.type == "cpu" and not bool(low.any()):  # elsewhere the question would wait for the device
            continue
        here = along(low, axis, V)
        mean = (V * here).sum(axis + 1, keepdim=True) / per_block(low.sum(1).clamp(min=1), V)
        V = V + here * (mean - V)
    if V is not before:
        stack.V[at] = V


def turn(stack: Stack, at: RowIndex, before: list[Tensor], group: Group) -> None:
    """Turn V of these rows from the bases ``before`` (zeros: none yet) to those that the stack has now."""
    assert stack.V is not None
    now = [stack.root(place, at, stack.V.dtype) for place in range(len(stack.axes))]
    T = [torch.bmm(Q.mT, old).square() for Q, old in zip(now, before, strict=True)]
    free = math.prod(d for axis, d in enumerate(stack.shape) if axis not in stack.axes)
    begun = per_block(stack.trace()[at] / free, stack.V[at]).expand_as(stack.V[at])
    for values, axis in zip((v[at] for v in stack.values), stack.axes, strict=True):
        begun = begun * along(values / values.sum(1, keepdim=True), axis, begun)
    first = (before[0] == 0).flatten(1).all(1)
    stack.V[at] = torch.where(per_block(first, begun), begun, on_axes(stack.V[at], T, stack.axes))
    pool(stack, at, group)
