r"""The statistics and preconditioners of the paper as dense matrices on vec(G), in float64.

Gradients are a stack ``[T, m, n]``; vec is row-major, so L acts as L x I and R as I x R. A *preconditioner* X is what
stands for the root of the full-matrix statistic, X = F^(1/2); an update is X^{-1} vec(G). With L~ = eps I + sum G G^T
and R~ = eps I + sum G^T G,

    full        (eps I + sum g g^T)^(1/2), g = vec(G)                                      full-matrix Adagrad
    order q     [ (L~^(-1/2q) on rows + R~^(-1/2q) on columns) / 2 ]^(-q)                  q = 2 is CASPR
    product     L~^(1/4) on rows, R~^(1/4) on columns                                      Shampoo, the limit q -> inf
    diagonal    (eps + sum G_ij^2)^(1/2)                                                   Adagrad
    descent     max_{s <= t} ||G_s||_F sqrt(t)                                             online gradient descent

Source: the formulas of Duvvuri et al. (ICLR 2024), Gupta et al. (ICML 2018), Duchi et al. (JMLR 2011) and Zinkevich
(ICML 2003). Statements about all of this are checked in :mod:`caspr_cli.theory.chain`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Root:
    """(V x W) diag(values) (V x W)^T, a symmetric matrix on vec(G); leading axes are a batch.

    Functions of the statistics of two axes, which commute, have their eigenvectors V ``[..., m, m]`` and W
    ``[..., n, n]``; any other matrix has V ``[..., mn, mn]`` and W = 1.
    """

    values: Tensor  # [..., m, n], or [..., mn, 1]
    left: Tensor  # V
    right: Tensor  # W

    @classmethod
    def of(cls, matrix: Tensor) -> Root:
        """Return the eigendecomposition of any ``[..., mn, mn]``; about 10 (mn)^3 FLOPs."""
        values, vectors = torch.linalg.eigh(matrix)
        return cls(values.unsqueeze(-1), vectors, torch.ones(1, 1).to(values))

    def power(self, exponent: float) -> Root:
        return replace(self, values=self.values**exponent)

    def dense(self) -> Tensor:
        basis = torch.einsum("...ij,...kl->...ikjl", self.left, self.right).flatten(-4, -3).flatten(-2)  # [..., mn, mn]
        return (basis * self.values.flatten(-2).unsqueeze(-2)) @ basis.mT

    def rotated(self, G: Tensor) -> Tensor:
        """Return G ``[..., m, n]`` in the coordinates of ``values``."""
        return self.left.mT @ G.reshape(*G.shape[:-2], *self.values.shape[-2:]) @ self.right

    def back(self, V: Tensor, shape: torch.Size) -> Tensor:
        """Return the G of this shape that :meth:`rotated` makes ``V`` of."""
        back: Tensor = (self.left @ V @ self.right.mT).reshape(shape)
        return back

    def apply(self, G: Tensor) -> Tensor:
        return self.back(self.values * self.rotated(G), G.shape)


# ---- statistics --------------------------------------------------------------------------------------------------


def averaging(steps: int, beta: float) -> Tensor:
    """Return the weights ``[T]`` of the bias-corrected moving average: (1 - beta) beta^(T-t) / (1 - beta^T)."""
    ages = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    return (1 - beta) * beta**ages / (1 - beta**steps)


def _weighted(gradients: Tensor, weights: Tensor | None) -> Tensor:
    """Return the gradients times sqrt(w), which is a weight w on G G^T."""
    return gradients if weights is None else gradients * weights.sqrt()[:, None, None]


def full_statistic(gradients: Tensor, eps: float, rank: int = 1, weights: Tensor | None = None) -> Tensor:
    """Return F~ = eps I + (1/r) sum_t w_t vec(G_t) vec(G_t)^T, ``[mn, mn]``; w_t are 1, or those of an average.

    With r = 1 its root is what full-matrix Adagrad divides by (Duchi, Hazan, Singer, JMLR 2011). The r >= rank(G_t)
    is that of Gupta, Koren, Singer, ICML 2018, Lemma 8, without which L and R do not bound F.
    """
    rows = _weighted(gradients, weights).flatten(1)  # [T, mn]
    return rows.mT @ rows / rank + eps * torch.eye(rows.shape[1], dtype=rows.dtype)


def axis_statistics(gradients: Tensor, eps: float, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return L~ = eps I + sum_t w_t G_t G_t^T, ``[m, m]``, and R~ = eps I + sum_t w_t G_t^T G_t, ``[n, n]``."""
    G = _weighted(gradients, weights)
    L, R = torch.einsum("tij,tkj->ik", G, G), torch.einsum("tji,tjk->ik", G, G)
    return L + eps * torch.eye(len(L), dtype=L.dtype), R + eps * torch.eye(len(R), dtype=R.dtype)


def row_statistic(gradients: Tensor, eps: float) -> Tensor:
    """Return the blocks of F~ (r = 1) that belong to a row of G each, ``[mn, mn]``, zero elsewhere.

    A row holds the weights into one neuron: this is full-matrix Adagrad for each neuron alone.
    """
    blocks = torch.einsum("tij,tik->ijk", gradients, gradients)  # [m, n, n]
    ridge = eps * torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    assembled: Tensor = torch.block_diag(*(blocks + ridge))
    return assembled


# ---- preconditioners ---------------------------------------------------------------------------------------------


def entrywise(values: Tensor) -> Root:
    """Return the diagonal matrix with these ``values`` ``[..., m, n]``."""
    return Root(values, *(torch.eye(size, dtype=values.dtype) for size in values.shape[-2:]))


def combined(L: Tensor, R: Tensor, order: float) -> Root:
    """Return X_p = [ (L~^(-1/(2p)) x I + I x R~^(-1/(2p))) / 2 ]^(-p), or X_Shampoo = L~^(1/4) x R~^(1/4) for inf.

    CASPR is p = 2 (Duvvuri et al., ICLR 2024, Algorithm 1). The terms commute, so X_p has the eigenvectors of
    L x R, and there the value ((l^(-1/2p) + r^(-1/2p)) / 2)^(-p), a power mean of l^(1/2) and r^(1/2) with exponent
    -1/p. Power means grow with their exponent, and tend to the geometric mean (l r)^(1/4) as it goes to 0.
    """
    (a, V), (b, W) = torch.linalg.eigh(L), torch.linalg.eigh(R)
    return Root(combined_values(a, b, order), V, W)


def combined_values(left: Tensor, right: Tensor, order: float) -> Tensor:
    """Return the eigenvalues of X_p ``[..., m, n]`` from those of L~ ``[..., m]`` and R~ ``[..., n]``."""
    a, b = left.unsqueeze(-1), right.unsqueeze(-2)
    if math.isinf(order):
        return (a * b).pow(0.25)
    return ((a.pow(-0.5 / order) + b.pow(-0.5 / order)) / 2).pow(-order)


def product(A: Tensor, B: Tensor) -> Root:
    """Return A x B by its spectrum."""
    (a, V), (b, W) = torch.linalg.eigh(A), torch.linalg.eigh(B)
    return Root(a[:, None] * b, V, W)


def one_sided(L: Tensor, R: Tensor, *, left: bool) -> Root:
    """Return L~^(1/2) x I, or I x R~^(1/2).

    Of all L' x I, the nearest to sum_t vec(G_t) vec(G_t)^T in Frobenius norm is L' = L / n (the paper's Lemma 3.1).
    """
    return product(L if left else torch.eye(len(L)).to(L), torch.eye(len(R)).to(R) if left else R).power(0.5)


def shampoo_half(L: Tensor, R: Tensor) -> Root:
    """Return L~^(1/2) x R~^(1/2) / (tr L~ tr R~)^(1/4): Shampoo with exponent 1/2, as large as F^(1/2) is.

    For gradients whose covariance is a Kronecker product, it is F^(1/2) in the limit (Morwani et al.,
    arXiv:2406.17748); the trace makes it of degree 1 in G, as the other preconditioners are.
    """
    return product(L, R / (torch.trace(L) * torch.trace(R)).sqrt()).power(0.5)


def caspr_one(L: Tensor, R: Tensor) -> Root:
    """Return [ (L~^(-1/2) x I + I x R~^(-1/2)) / 2 ]^(-2) / (tr L~ tr R~)^(1/4).

    This is CASPR with the exponent 1 that Shampoo has in :func:`shampoo_half`, as the optimizer's option has it.
    """
    (a, V), (b, W) = torch.linalg.eigh(L), torch.linalg.eigh(R)
    return Root(combined_values(a**2, b**2, 2) / (a.sum() * b.sum()) ** 0.25, V, W)


def nearest_kronecker(F: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return A ``[m, m]`` and B ``[n, n]`` with the least || F - A x B ||_F.

    The entries of F, put in order so that A x B becomes vec(A) vec(B)^T, are a matrix of ``[m^2, n^2]``: its first
    singular vectors are the answer. If F is symmetric positive definite, so are A and B, up to one sign (Van Loan and
    Pitsianis, "Approximation with Kronecker products", 1993, Theorems 5.3 and 5.8). The vector is taken from an
    eigendecomposition of the smaller Gram matrix; about 10 min(m, n)^6 FLOPs.
    """
    m, n = shape
    moved = F.reshape(m, n, m, n).transpose(1, 2).reshape(m * m, n * n)
    if m > n:
        b = torch.linalg.eigh(moved.mT @ moved).eigenvectors[:, -1]  # of unit length
        a = moved @ b
    else:
        a = torch.linalg.eigh(moved @ moved.mT).eigenvectors[:, -1]
        b = moved.mT @ a
    A, B = a.reshape(m, m), b.reshape(n, n)
    sign = torch.sign(torch.trace(A))
    return sign * (A + A.mT) / 2, sign * (B + B.mT) / 2


# ---- how they compare --------------------------------------------------------------------------------------------


def loewner_gap(larger: Tensor, smaller: Tensor, scale: float) -> float:
    """Return the least eigenvalue of ``larger - smaller`` in units of ``scale``: not negative iff larger >= smaller."""
    return float(torch.linalg.eigvalsh(larger - smaller)[0]) / scale


def cosine(A: Tensor, B: Tensor) -> float:
    """Return <A, B> / (||A|| ||B||), of matrices in the Frobenius sense."""
    return float((A * B).sum() / (A.norm() * B.norm()))
