"""The preconditioners as dense matrices on vec(G), G a tensor with axes d_1 .. d_k and n = d_1 ... d_k.

vec is torch's row-major flatten, so "A on axis i" is I x ... x A x ... x I with A in place i.
"""

import math

import torch
from torch import Tensor


def unfold(tensor: Tensor, axis: int) -> Tensor:
    """The matrix [d_axis, n / d_axis] whose rows are the slices of the tensor along one axis."""
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def gram(tensor: Tensor, axis: int) -> Tensor:
    """unfold(G) unfold(G)^T, [d_axis, d_axis]."""
    matrix = unfold(tensor, axis)
    return matrix @ matrix.mT


def spectral_power(matrix: Tensor, exponent: float) -> Tensor:
    """S^exponent of a positive definite matrix by its eigendecomposition (NaN if it is not definite)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.mT


def damped(statistic: Tensor, eps: float, damping: str) -> Tensor:
    """S + eps * lambda_max(S) * I ("relative") or S + eps * I ("absolute")."""
    ridge = eps * torch.linalg.eigvalsh(statistic)[-1].item() if damping == "relative" else eps
    return statistic + ridge * torch.eye(len(statistic), dtype=statistic.dtype)


def on_axis(matrix: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """The [n, n] operator that applies ``matrix`` along one axis of vec(G)."""
    before = torch.eye(math.prod(shape[:axis]), dtype=matrix.dtype)
    after = torch.eye(math.prod(shape[axis + 1 :]), dtype=matrix.dtype)
    return torch.kron(torch.kron(before, matrix), after)


def kronecker_sum(statistics: list[Tensor], order: int, exponent: float = 0.5) -> Tensor:
    """P_q = [ (1/k) sum_i S_i^(-e/q) on axis i ]^q, [n, n]; e = 1/2 and q = 2 is Algorithm 1 of the paper."""
    shape = tuple(len(statistic) for statistic in statistics)
    roots = [spectral_power(statistic, -exponent / order) for statistic in statistics]
    mean = sum(on_axis(root, shape, axis) for axis, root in enumerate(roots)) / len(roots)
    return torch.linalg.matrix_power(mean, order)


def kronecker_product(statistics: list[Tensor], exponent: float = 0.5) -> Tensor:
    """S_1^(-e/k) x ... x S_k^(-e/k), [n, n]: Shampoo for e = 1/2."""
    operator = torch.ones(1, 1, dtype=statistics[0].dtype)
    for statistic in statistics:
        operator = torch.kron(operator, spectral_power(statistic, -exponent / len(statistics)))
    return operator


def inverse_preconditioner(statistics: list[Tensor], order: float, exponent: float = 0.5) -> Tensor:
    """X_q^{-1} of damped statistics; ``order=math.inf`` is the product."""
    if order == math.inf:
        return kronecker_product(statistics, exponent)
    return kronecker_sum(statistics, int(order), exponent)


def preconditioner(statistics: list[Tensor], order: float) -> Tensor:
    """X_q itself, symmetric."""
    matrix = torch.linalg.inv(inverse_preconditioner(statistics, order))
    return (matrix + matrix.mT) / 2


def precondition(
    gradient: Tensor, statistics: list[Tensor], eps: float, damping: str, order: float, exponent: float = 0.5
) -> Tensor:
    """U = tr(S)^(e - 1/2) P vec(G) in the shape of G, of undamped statistics. Zero where nothing but zero was seen."""
    if damping == "relative" and not any(statistic.any() for statistic in statistics):
        return torch.zeros_like(gradient)
    if exponent == 0:
        return gradient
    operator = inverse_preconditioner([damped(s, eps, damping) for s in statistics], order, exponent)
    length = statistics[0].trace() ** (exponent - 0.5)
    return length * (operator @ gradient.flatten()).reshape(gradient.shape)


def one_sided(
    gradient: Tensor, statistic: Tensor, axis: int, eps: float, damping: str, exponent: float = 0.5
) -> Tensor:
    """S^(-e) tr(S)^(e - 1/2) along one axis of G, of its undamped statistic: L^(-1/2) G or G R^(-1/2) of a matrix."""
    if damping == "relative" and not statistic.any():
        return torch.zeros_like(gradient)
    operator = on_axis(spectral_power(damped(statistic, eps, damping), -exponent), tuple(gradient.shape), axis)
    return statistic.trace() ** (exponent - 0.5) * (operator @ gradient.flatten()).reshape(gradient.shape)


def row_by_row(gradient: Tensor, statistics: list[Tensor], eps: float, damping: str, exponent: float = 0.5) -> Tensor:
    """u_i = R_i^(-1/2) g_i for each row of a matrix, of R_i = sum g_i g_i^T, undamped."""
    rows = [one_sided(g, R, 0, eps, damping, exponent) for g, R in zip(gradient, statistics, strict=True)]
    return torch.stack(rows)


def polar_factor(matrix: Tensor) -> Tensor:
    """The orthogonal polar factor Q K^T of G = Q diag(s) K^T."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """What so many of Muon's Newton-Schulz steps make of G: Q f(s) K^T, with f as often a s + b s^3 + c s^5."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm() if values.any() else values
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


def loewner_gap(larger: Tensor, smaller: Tensor) -> float:
    """The least eigenvalue of ``larger - smaller`` over the size of both: >= 0 up to rounding iff larger >= smaller."""
    scale = max(torch.linalg.matrix_norm(larger, 2).item(), torch.linalg.matrix_norm(smaller, 2).item())
    return torch.linalg.eigvalsh(larger - smaller)[0].item() / scale
