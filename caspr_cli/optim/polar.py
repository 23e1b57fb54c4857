"""The polar factor of a block, which has the singular vectors of a matrix and all singular values near 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Newton-Schulz steps X <- a X + (b X X^T + c (X X^T)^2) X. Source of the coefficients: Jordan et al., "Muon: An
# optimizer for hidden layers in neural networks", 2024; torch.optim.Muon has the same.
STEPS = 5
A, B, C = 3.4445, -4.7750, 2.0315


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the matrix that a block is for its polar factor: its first axis and the rest, without axes of size one."""
    first, *rest = [d for d in shape if d != 1] or [1]
    return first, math.prod(rest)


def polar_factor(X: Tensor) -> Tensor:
    """Return about the polar factor Q K^T of each block Q diag(s) K^T.

    Args:
        X: ``[K, d_1, ..., d_k]``; a block of zeros stays zero.

    Cost for m x n blocks, m <= n: see :func:`flops`.
    """
    m, n = matrix_shape(tuple(X.shape[1:]))
    Y = X.reshape(-1, m, n)
    norm = torch.linalg.vector_norm(Y, dim=(1, 2), keepdim=True, dtype=torch.float64)  # float32 has no square of 1e-25
    Y = Y * torch.where(norm > 0, norm.reciprocal(), 0).to(Y.dtype)
    Y = Y if m <= n else Y.mT
    if _by_gram(min(m, n), max(m, n)) and Y.dtype.itemsize >= 4:
        Y = torch.bmm(_polynomial(torch.bmm(Y, Y.mT)), Y)
    else:
        for _ in range(STEPS):
            S = torch.bmm(Y, Y.mT)
            Y = torch.baddbmm(Y, torch.baddbmm(S, S, S, beta=B, alpha=C), Y, beta=A)
    return (Y if m <= n else Y.mT).reshape(X.shape)


def _by_gram(m: int, n: int) -> bool:
    """Whether it takes fewer products to iterate on the small S = Y Y^T than on Y itself.

    All steps multiply Y from the left by polynomials of S, so their product can be found first. It is the same in exact
    arithmetic. In float32 the relative error was at most 1e-3 for singular values down to 1e-5 of the largest, whose
    squares are lost in S (by steps of Y: 6e-6; in bfloat16, in which Muon has them: 3e-2 to 2e-1).
    """
    return n >= 2 * m


def _polynomial(S: Tensor) -> Tensor:
    """Return the product Q of all steps' polynomials for S = Y Y^T ``[K, m, m]``: the steps of Y end at Q Y."""
    Q = None
    for left in reversed(range(STEPS)):
        R = torch.baddbmm(S, S, S, beta=B, alpha=C)  # the step is P = A I + R
        if Q is None:
            Q = R.clone()
            Q.diagonal(dim1=1, dim2=2).add_(A)
        else:
            Q = torch.baddbmm(Q, R, Q, beta=A)
        if left:  # S <- P S P
            T = torch.baddbmm(S, R, S, beta=A)
            S = torch.baddbmm(T, T, R, beta=A)
    assert Q is not None
    return Q


def flops(shape: tuple[int, ...]) -> float:
    """Return the FLOPs of the polar factor of a block of this shape, m x n as a matrix.

    4 m^2 n + (4 STEPS - 3) 2 m^3 for n >= 2 m, and STEPS (4 m^2 n + 2 m^3) below.
    """
    m, n = sorted(matrix_shape(shape))
    if _by_gram(m, n):
        return 4.0 * m * m * n + (4 * STEPS - 3) * 2.0 * m**3
    return STEPS * (4.0 * m * m * n + 2.0 * m**3)
