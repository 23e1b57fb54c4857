"""The one thing in which the family differs: how the axes' roots are combined.

Kronecker sum of order q   U = [ (1/k) sum_i A_i on axis i ]^q G,   A_i = S~_i^(-e/q)   (CASPR: q = 2)
Kronecker product          U = (A_1 x ... x A_k) G,                 A_i = S~_i^(-e/k)   (Shampoo: q = inf)

with the exponent e = 1/2 of Adagrad. Or e = 1, the product's as a Kronecker approximation of Adagrad's statistic
(arXiv:2406.17748), of statistics in units in which their trace is 1 (see Stack.unit): U is then still of degree 0.

Only axes that have statistics count: k is their number, and others are left as they are. For one axis both are
S~^(-e) on it: with e = 1/2 full-matrix Adagrad of a vector, and one-sided preconditioning of a matrix. For none, as
with e = 0, U = G.

Or, with the option ``measured``, weights in the eigenbasis between these and what is measured there, as in SOAP
(:func:`weights`, :mod:`caspr_cli.optim.eigenbasis`).

After it, U may be replaced by its polar factor (:mod:`caspr_cli.optim.polar`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from caspr_cli.optim.eigenbasis import along, on_axes, on_axis
from caspr_cli.optim.graft import RMS
from caspr_cli.optim.options import Group, apply_dtype
from caspr_cli.optim.polar import matrix_shape, polar_factor
from caspr_cli.optim.stacks import Stack
from caspr_cli.optim.statistics import per_block


def root_exponent(order: float, axes: int, exponent: float) -> int:
    """p in A = S~^(-1/p): q / exponent for the sum, k / exponent for the product, of k >= 1 axes."""
    roots = 1 if axes == 1 else axes if math.isinf(order) else int(order)
    return round(roots / exponent)


def precondition(X: Tensor, out: Tensor, stack: Stack, rows: slice, group: Group, *, early: bool = False) -> Tensor:
    """Return U of what is in X ``[k, d_1, ..., d_k]`` in units of the input's scale; X and ``out`` are overwritten.

    Args:
        early: whether blocks may have no roots yet (all zeros). The polar factor takes X of these as it is.
    """
    dtype = apply_dtype(X.dtype, X.device, group)
    A = [stack.root(place, rows, dtype) for place in range(len(stack.axes))]
    low = X.to(dtype)
    out = out if low is X else torch.empty_like(low)
    plain = low.clone() if early and A else None
    if stack.V is None:
        U = apply_roots(low, A, stack.axes, group["order"], out)
    else:
        U = on_axes(low, [Q.mT for Q in A], stack.axes, out)
        U = on_axes(U.mul_(weights(stack, rows, group)), A, stack.axes, out)
        for place, axis in enumerate(stack.axes):  # eigenvectors mix rows that never had a gradient, by rounding
            U.mul_(along(stack.has_gradients(place, rows).to(U.dtype), axis, U))
    if plain is not None:
        U = torch.where(per_block((A[0] == 0).flatten(1).all(1), U), plain, U)
    if group["polar"]:
        U = polar_factor(U, int(group["polar_steps"]))
        if group["graft"] == "rms":  # what U has if no singular value is zero: no norm is needed
            U = U * (RMS * max(matrix_shape(stack.shape)) ** 0.5)
    return U if low is X else X.copy_(U)


def weights(stack: Stack, rows: slice, group: Group) -> Tensor:
    """Return what multiplies a block's entries in the eigenbasis, ``[k, d_1, ..., d_k]`` in units of the input's scale.

    With V the measured second moment, damped, and c the family's closed form, (x V + (1 - x) mean(c^2 V) / c^2)^(-1/2)
    for ``measured=x``: the closed form is a second moment that is right on average. Near x = 0 the direction of U is
    that of CASPR or Shampoo.
    """
    assert stack.V is not None
    x, scale = group["measured"], stack.input_scale(group)[rows]
    V = stack.V[rows] * per_block((stack.corrected(group)[rows] / scale).square(), stack.V[rows])
    largest = V.flatten(1).amax(1)
    shift = group["eps"] * (largest if group["damping"] == "relative" else scale.square().reciprocal())
    V.add_(per_block(torch.where(largest > 0, shift, 1), V))  # 1: of a block without a gradient
    if x < 1:
        p, k = root_exponent(group["order"], len(stack.axes), group["exponent"]), len(stack.axes)
        c, *others = (along(v[rows].pow(-1 / p), axis, V) for v, axis in zip(stack.values, stack.axes, strict=True))
        product = k == 1 or math.isinf(group["order"])
        for a in others:
            c = c * a if product else c + a
        c = c if product else (c / k) ** int(group["order"])
        c2 = c.square()
        V = torch.lerp(per_block((c2 * V).flatten(1).mean(1), V) / c2, V, x)
    return V.rsqrt_()


def apply_roots(G: Tensor, A: list[Tensor], axes: tuple[int, ...], order: float, out: Tensor) -> Tensor:
    """Return U for K blocks.

    Args:
        G: ``[K, d_1, ..., d_k]``, overwritten.
        A: for each of ``axes`` ``[K, d_i, d_i]``, symmetric, of the type of G.
        axes: those of a block that have statistics, in ascending order.
        order: q, or ``math.inf`` for the product.
        out: memory of the size of G. For matrices the result is in G or here, and nothing is allocated.

    Cost for m x n blocks: 2 m n (m + n) FLOPs a pass, q passes (one for the product); 2 m n d for one axis of size d.
    """
    k = len(A)
    if k == 0:
        return G
    if axes == (1, 2) and G.ndim == 4 and G.shape[1] == 1:  # a matrix that is one member of a batch
        return apply_roots(G.squeeze(1), A, (0, 1), order, out.squeeze(1)).unsqueeze(1)
    if k == 1:
        if G.ndim != 3:
            return on_axis(G, A[0], axes[0])
        return torch.bmm(A[0], G, out=out) if axes[0] == 0 else torch.bmm(G, A[0], out=out)
    if math.isinf(order):
        if G.ndim == 3:
            return torch.bmm(torch.bmm(A[0], G, out=out), A[1], out=G)
        return on_axes(G, A, axes)
    for _ in range(int(order)):
        if G.ndim == 3:  # (A G + G B)/2 with the addition inside the product
            G, out = torch.bmm(A[0], G, out=out).baddbmm_(G, A[1], beta=0.5, alpha=0.5), G
        else:
            G = torch.stack([on_axis(G, A_i, axis) for axis, A_i in zip(axes, A, strict=True)]).mean(0)
    return G
