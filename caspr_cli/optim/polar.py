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

    Cost for m x n blocks, m <= n: 5 times 4 m^2 n + 2 m^3 FLOPs.
    """
    m, n = matrix_shape(tuple(X.shape[1:]))
    Y = X.reshape(-1, m, n)
    norm = torch.linalg.vector_norm(Y, dim=(1, 2), keepdim=True, dtype=torch.float64)  # float32 has no square of 1e-25
    Y = Y * torch.where(norm > 0, norm.reciprocal(), 0).to(Y.dtype)
    Y = Y if m <= n else Y.mT
    for _ in range(STEPS):
        S = torch.bmm(Y, Y.mT)
        Y = torch.baddbmm(Y, torch.baddbmm(S, S, S, beta=B, alpha=C), Y, beta=A)
    return (Y if m <= n else Y.mT).reshape(X.shape)


def flops(shape: tuple[int, ...]) -> float:
    """Return the FLOPs of the polar factor of a block of this shape."""
    m, n = sorted(matrix_shape(shape))
    return STEPS * (4.0 * m * m * n + 2.0 * m**3)
