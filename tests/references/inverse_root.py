"""Inverse roots by numpy's decomposition of the damped matrix, and matrices whose spectrum is known.

In float64 no method knows the smallest eigenvalue better than to ``condition * 1e-16`` of itself: S is rounded before
anyone looks at it. Whoever compares allows that to both sides.
"""

import math

import numpy as np
import torch
from torch import Tensor

from references.stream import random_stream

SPECTRA = ("logarithmic", "linear", "half", "third", "one", "equal")


def spectrum(name: str, d: int, condition: float) -> Tensor:
    """``[d]``, descending from 1 to 1 / condition (``equal``: ones). ``half``, ``third`` and ``one`` tell how many
    eigenvalues are 1 where all others are 1 / condition."""
    if d == 1 or name == "equal":
        return torch.ones(d, dtype=torch.float64)
    if name == "logarithmic":
        return torch.logspace(0, -math.log10(condition), d, dtype=torch.float64)
    if name == "linear":
        return torch.linspace(1, 1 / condition, d, dtype=torch.float64)
    ones = {"half": d // 2, "third": max(1, d // 3), "one": 1}[name]
    return torch.where(torch.arange(d) < ones, 1.0, 1 / condition).double()


def orthogonal(d: int, seed: int) -> Tensor:
    """``[d, d]``."""
    return torch.linalg.qr(random_stream(d, d, steps=1, seed=seed)[0]).Q


def with_spectrum(values: Tensor, seed: int) -> Tensor:
    """``[d, d]``, symmetric to the last bit, with these eigenvalues but for rounding."""
    Q = orthogonal(len(values), seed)
    S = (Q * values) @ Q.mT
    return (S + S.mT) / 2


def shift_of(S: Tensor, eps: float, damping: str) -> float:
    """What damping adds to the diagonal."""
    return eps * float(np.linalg.eigvalsh(S.double().numpy())[-1]) if damping == "relative" else eps


def inverse_root(S: Tensor, shift: float, p: int) -> Tensor:
    """(S + shift I)^(-1/p), ``[d, d]`` in float64 (NaN if it is not definite)."""
    values, vectors = np.linalg.eigh(S.double().numpy() + shift * np.eye(len(S)))
    return torch.from_numpy((vectors * values ** (-1 / p)) @ vectors.T)


def dense_residual(S: Tensor, A: Tensor, shift: float, p: int) -> float:
    """||A^(p/2) (S + shift I) A^(p/2) - I||_F / sqrt(d), each product in full."""
    eye = torch.eye(len(S), dtype=torch.float64)
    half = torch.linalg.matrix_power(A.double(), p // 2)
    return float(torch.linalg.matrix_norm(half @ (S.double() + shift * eye) @ half - eye)) / math.sqrt(len(S))


def moved(S: Tensor, size: float, seed: int) -> Tensor:
    """``[d, d]``: S^(1/2) (I + size X) S^(1/2), with X symmetric, random, ||X||_F = sqrt(d).

    Every direction moves by ``size`` of its own length, the small ones too, as in S <- (1 - size) S + size * (a fresh
    sample of S).
    """
    X = random_stream(len(S), len(S), steps=1, seed=seed)[0]
    X = (X + X.mT) * (math.sqrt(len(S)) / torch.linalg.matrix_norm(X + X.mT))
    values, vectors = np.linalg.eigh(S.numpy())
    half = torch.from_numpy((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)
    moved = half @ (torch.eye(len(S), dtype=torch.float64) + size * X) @ half
    return (moved + moved.mT) / 2
