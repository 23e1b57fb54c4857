"""The polar factor of a block, which has the singular vectors of a matrix and all singular values near 1.

A block that has no roots yet takes that of its momentum, as Muon does. The sign of the momentum, which ``graft="rms"``
has otherwise, would have a spectral norm up to sqrt(min(m, n)) times as large at the same length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A Newton-Schulz step X <- a X + (b X X^T + c (X X^T)^2) X. Source of the coefficients: Jordan et al., "Muon: An
# optimizer for hidden layers in neural networks", 2024; torch.optim.Muon has the same, and five steps.
A, B, C = 3.4445, -4.7750, 2.0315
MOST_BY_GRAM = 6  # steps; see _by_gram()


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the matrix that a block is for its polar factor: its first axis and the rest, without axes of size one."""
    first, *rest = [d for d in shape if d != 1] or [1]
    return first, math.prod(rest)


def polar_factor(X: Tensor, steps: int) -> Tensor:
    """Return about the polar factor Q K^T of each block Q diag(s) K^T.

    Args:
        X: ``[K, d_1, ..., d_k]``; a block of zeros stays zero.
        steps: of the iteration, 1 or more.

    Cost: see :func:`products`.
    """
    m, n = matrix_shape(tuple(X.shape[1:]))
    Y = X.reshape(-1, m, n)
    norm = torch.linalg.vector_norm(Y, dim=(1, 2), keepdim=True, dtype=torch.float64)  # float32 has no square of 1e-25
    Y = Y * norm.clamp(min=torch.finfo(Y.dtype).tiny).reciprocal().to(Y.dtype)
    Y = Y if m <= n else Y.mT
    if _by_gram(min(m, n), max(m, n), steps, Y.dtype):
        Y = torch.bmm(_polynomial(torch.bmm(Y, Y.mT), steps), Y)
    else:
        for _ in range(steps):
            S = torch.bmm(Y, Y.mT)
            Y = torch.baddbmm(Y, torch.baddbmm(S, S, S, beta=B, alpha=C), Y, beta=A)
    return (Y if m <= n else Y.mT).reshape(X.shape)


def _by_gram(m: int, n: int, steps: int, dtype: torch.dtype) -> bool:
    """Whether it takes fewer products to iterate on the small S = Y Y^T than on Y itself, for m <= n.

    All steps multiply Y from the left by polynomials of S, so their product can be found first. It is the same in exact
    arithmetic. In float32 the relative error was at most 1e-3 for singular values down to 1e-5 of the largest, whose
    squares are lost in S (by steps of Y: 6e-6; in bfloat16, in which Muon has them: 3e-2 to 2e-1). Rounding also makes
    eigenvalues of S negative where Y has a low rank, and a step makes them ``A**2`` times as large: nine steps diverge.
    """
    return 1 < steps <= MOST_BY_GRAM and n >= 2 * m and dtype.itemsize >= 4


def _polynomial(S: Tensor, steps: int) -> Tensor:
    """Return the product Q of all steps' polynomials for S = Y Y^T ``[K, m, m]``: the steps of Y end at Q Y."""
    R = torch.baddbmm(S, S, S, beta=B, alpha=C)  # a step is P = A I + R
    Q = R.clone()
    Q.diagonal(dim1=1, dim2=2).add_(A)
    for _ in range(steps - 1):
        T = torch.baddbmm(S, R, S, beta=A)
        S = torch.baddbmm(T, T, R, beta=A)  # P S P
        R = torch.baddbmm(S, S, S, beta=B, alpha=C)
        Q = torch.baddbmm(Q, R, Q, beta=A)
    return Q


def products(shape: tuple[int, ...], steps: int, dtype: torch.dtype) -> list[tuple[tuple[int, int, int], bool, int]]:
    """Return the products of the polar factor of a block of this shape and type; none for 0 ``steps``.

    Each is (rows, inner, columns), whether it is a matrix times its own transpose, and how often. For m x n blocks,
    m <= n, that is 2 m^2 n FLOPs twice a step and 2 m^3 once; for n >= 2 m and few steps it is 2 m^2 n twice in all and
    2 m^3 4 ``steps`` - 3 times, but in bfloat16.
    """
    m, n = sorted(matrix_shape(shape))
    if _by_gram(m, n, steps, dtype):
        small = [((m, m, m), True, steps), ((m, m, m), False, 3 * steps - 3)]
        return [((m, n, m), True, 1), *small, ((m, m, n), False, 1)]
    return [((m, n, m), True, steps), ((m, m, m), True, steps), ((m, m, n), False, steps)] if steps else []


def flops(shape: tuple[int, ...], steps: int, dtype: torch.dtype) -> float:
    """Return the FLOPs of the polar factor of a block of this shape and type, 2 per multiply-add."""
    return sum(2.0 * math.prod(sizes) * repeats for sizes, _, repeats in products(shape, steps, dtype))
