"""Inverse roots of damped statistics."""

from __future__ import annotations

import torch
from torch import Tensor


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
    eigenvalues, Q = torch.linalg.eigh(S)
    lam = damped_eigenvalues(eigenvalues / correction.unsqueeze(1), unit, eps, damping)
    values = torch.where(lam > 0, lam, 1).pow(-1 / p).to(S.dtype)
    return torch.bmm(Q * values.unsqueeze(1), Q.mT)
