"""Inverse roots of damped statistics."""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 16  # roundings of the largest diagonal element, see eigendecomposition(); 2 were enough wherever it was tried


def damped_eigenvalues(eigenvalues: Tensor, unit: Tensor, eps: float, damping: str) -> Tensor:
    """Eigenvalues of S~ = S + eps lambda_max(S) I (``relative``) or S + eps I (``absolute``), in units of c^2.

    Args:
        eigenvalues: ``[K, d]`` of S / c^2, ascending. Rounding may have left negative ones; they count as zero.
        unit: ``[K]``, c.

    Returns:
        ``[K, d]`` in float64: eps / c^2 leaves the range of float32 for small gradients.
    """
    lam = eigenvalues.double().clamp(min=0)
    shift = lam[:, -1:] if damping == "relative" else unit.double().pow(-2).unsqueeze(1)
    return lam + eps * shift


def eigendecomposition(S: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[K, d]``, ascending, and eigenvectors ``[K, d, d]`` of K symmetric matrices that have no
    negative eigenvalue but by rounding.

    A multiple of the identity is added first and taken off after: MKL's divide-and-conquer (2024.2) does not converge
    where exact zeros alternate with a full block, and such is the statistic of a 3 x 3 convolution on a single pixel,
    of which one tap in nine ever sees an input. The multiple is of the size of a decomposition's own error.
    """
    shift = SHIFT * torch.finfo(S.dtype).eps * S.diagonal(dim1=-2, dim2=-1).amax(-1)  # [K]
    shifted = S.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(1))
    eigenvalues, Q = torch.linalg.eigh(shifted)
    return eigenvalues - shift.unsqueeze(1), Q


def inverse_root(S: Tensor, unit: Tensor, correction: Tensor, *, p: int, eps: float, damping: str) -> Tensor:
    """A = S~^(-1/p) for K symmetric statistics, by eigendecomposition.

    Args:
        S: ``[K, d, d]``, divided by ``unit**2``; only the lower triangle is read.
        unit: ``[K]``, > 0.
        correction: ``[K]``, what S is divided by first (the bias correction of a moving average).
        p: 2q, see :mod:`caspr_cli.optim.combine`.

    Returns:
        ``[K, d, d]``, in units of ``unit**(-2/p)``. A block whose statistics are zero under relative damping has
        no scale to be damped by; its root is the identity.
    """
    eigenvalues, Q = eigendecomposition(S)
    lam = damped_eigenvalues(eigenvalues / correction.unsqueeze(1), unit, eps, damping)
    values = torch.where(lam > 0, lam, 1).pow(-1 / p).to(S.dtype)
    return torch.bmm(Q * values.unsqueeze(1), Q.mT)
