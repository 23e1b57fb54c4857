r"""Inverse roots S~^(-1/p) of damped statistics S~ = S + shift I, and how far they are from being that.

Two solvers, each for K matrices at once:

``eigh``    an eigendecomposition: for any p and damping; on a CPU the fastest for d > 1.
``newton``  the coupled Newton iteration: matrix products alone, so it suits a GPU, where batched eigendecompositions
            of more than 32 rows are done one after the other. In float32 more exact than MKL's decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from caspr_cli.optim.symmetric import product

SHIFT = 16  # roundings of the largest diagonal element, see eigendecomposition(); 2 were enough wherever it was tried
PROBES = 8  # vectors on which a residual is estimated
# Steps of the power iteration, and what part of the largest eigenvalue it finds at least (of flat spectra; measured .83
# or more). That eigenvalue sets the damping, which is known to no more than its order of magnitude.
POWER_STEPS, POWER_ACCURACY = 30, 0.8
# After how many of these steps a vector is made one of length 1, where a launch takes as long as they. (Of matrices
# whose trace is 1 the sixth power is far from float32's end.)
NORMALIZED = 6
NEWTON_STEPS = 100
HELD = 0.1  # where the scaled iteration holds the largest eigenvalue; without, the residual was up to .74
ROUNDINGS = 8  # of an eigenvalue, in bound()

# Largest eigenvalue [K] (float64, at least 0) to what is added to the diagonal [K].
Damping = Callable[[Tensor], Tensor]


@dataclass
class Root:
    """Inverse roots of K matrices, and what is known of the matrices."""

    A: Tensor  # [K, d, d]
    shift: Tensor  # [K], float64: what was added to the diagonal
    largest: Tensor  # [K], float64: the largest eigenvalue with it; 0 for a matrix of zeros, whose A is the identity
    condition: Tensor  # [K], float64: at least the condition number of the damped matrix
    values: Tensor | None = None  # [K, d], float64: damped eigenvalues, where A has the eigenvectors as columns


def damping_shift(largest: Tensor, unit: Tensor, eps: Tensor, damping: str) -> Tensor:
    """Return what is added to the diagonal of S / c^2: eps lambda_max (``relative``) or eps / c^2 (``absolute``).

    Args:
        largest: ``[K]``, the largest eigenvalue of S / c^2.
        unit: ``[K]``, c.
        eps: ``[K]``.

    Returns:
        ``[K]`` in float64: eps / c^2 leaves the range of float32 for small gradients.
    """
    return eps.double() * (largest if damping == "relative" else unit.double().pow(-2))


def eigendecomposition(S: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``[K, d]``, ascending, and eigenvectors ``[K, d, d]`` of K symmetric matrices that have no
    negative eigenvalue but by rounding. Only the lower triangle is read.

    MKL's divide-and-conquer (2024.2) does not converge where exact zeros alternate with a full block, and such is the
    statistic of a 3 x 3 convolution on a single pixel, of which one tap in nine ever sees an input. On one thread it
    also returns NaN for some matrices of low rank with rows of zeros. Such a matrix is tried with a multiple of the
    identity added, of the size of a decomposition's own error, which is taken off after.
    """
    try:
        values, Q = _eigh(S)
        if S.device.type != "cpu" or bool((right := values.isfinite().all(-1)).all()):  # a GPU would be waited for
            return values, Q
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        right = torch.zeros(S.shape[:-2], dtype=torch.bool, device=S.device)
    shift = SHIFT * torch.finfo(S.dtype).eps * S.diagonal(dim1=-2, dim2=-1).amax(-1).masked_fill(right, 0)  # [K]
    shifted = S.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
    values, Q = _eigh(shifted)
    return values - shift.unsqueeze(-1), Q


def _eigh(S: Tensor) -> tuple[Tensor, Tensor]:
    """Return torch's decomposition of the lower triangles, as the upper ones of the transposed matrices.

    LAPACK's columns are torch's rows, so that nothing is transposed on the way; and MKL takes 4 % less for an upper
    triangle (both together 7 % at d = 1024 and 6 % at 512, on an AMD EPYC with one thread).
    """
    values, Q = torch.linalg.eigh(S.mT, UPLO="U")
    return values, Q


def eigh_root(S: Tensor, damping: Damping, p: int) -> Root:
    """Return inverse roots by eigendecomposition. Rounding may have left negative eigenvalues; they count as zero.

    Only the lower triangle is read. Cost: the decomposition, about 10 products of d x d on a CPU, and half a product.
    """
    eigenvalues, Q = eigendecomposition(S)
    lam = eigenvalues.double().clamp(min=0)
    shift = damping(lam[:, -1])
    lam = lam + shift.unsqueeze(1)
    values = torch.where(lam > 0, lam, 1).pow(-1 / p).to(S.dtype)
    A = product(Q * values.unsqueeze(1), Q)
    return Root(_kept_apart(A, S), shift, lam[:, -1], lam[:, -1] / lam[:, 0])


def _kept_apart(A: Tensor, S: Tensor) -> Tensor:
    """Return roots in which rows that are zero in S are zero but on the diagonal, as they are without rounding.

    So a row that never had a gradient stays as it is, to the last bit. (Newton's products keep such zeros.)
    """
    silent = S.diagonal(dim1=1, dim2=2) == 0  # [K, d]
    if S.device.type == "cpu" and not bool(silent.any()):  # a GPU would be waited for
        return A
    apart = silent.unsqueeze(1) | silent.unsqueeze(2)
    apart.diagonal(dim1=1, dim2=2).fill_(False)
    return A.masked_fill_(apart, 0)


def basis(S: Tensor, damping: Damping, last: Tensor | None) -> Root:
    """Return eigenvalues and eigenvectors; or, from a basis ``last`` ``[K, d, d]``, those of a step of orthogonal
    iteration: QR of S times ``last``, the largest first, so that they need no decomposition of S.

    Source of that step: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv:2409.11321.
    """
    if last is None:
        lam, Q = eigendecomposition(S)
    else:
        Y = torch.bmm(S, last)
        order = (last * Y).sum(1).argsort(dim=1, descending=True)
        Q, _ = torch.linalg.qr(Y.gather(2, order.unsqueeze(1).expand_as(Y)))
        lam = (Q * torch.bmm(S, Q)).sum(1)
    lam = lam.double().clamp(min=0)
    shift = damping(lam.amax(1))
    lam = lam + shift.unsqueeze(1)
    return Root(Q, shift, lam.amax(1), lam.amax(1) / lam.amin(1), torch.where(lam > 0, lam, 1))


def newton_steps(condition: float, p: int) -> int:
    """Return the steps after which the coupled Newton iteration is done with matrices of at most this condition.

    The smallest eigenvalue has the longest way, or, where it starts near its goal, the largest.
    """

    def from_start(x: float) -> int:
        steps = 0
        while abs(1 - x) > 1e-8 and steps < NEWTON_STEPS:
            x, steps = x * (1 + (1 - x) / p) ** p, steps + 1
        return steps

    z = (1 + p) / 2
    longest = max(from_start(z / condition), from_start(z), from_start(z / POWER_ACCURACY))
    return min(longest + 1, NEWTON_STEPS)


def newton_root(S: Tensor, damping: Damping, p: int, condition: float = math.inf) -> Root:
    """Return inverse roots by coupled Newton: M -> ((1 + 1/p) I - M / p)^p M and H -> H ((1 + 1/p) I - M / p).

    M -> I and H -> S~^(-1/p) for M = z S~, H = z^(1/p) I with eigenvalues of M in (0, p + 1). Each matrix stops by
    itself: when the largest entry of M - I is at rounding, or grows again. M and H part in finite precision, so that
    M = I says nothing of H: see :func:`residual`.

    Source: Guo and Higham, "A Schur-Newton method for the matrix pth root and its inverse", SIAM J. Matrix Anal.
    Appl. 28 (2006), Algorithm 3.3; used for Shampoo by Anil et al., arXiv:2002.09018.

    Args:
        condition: at least that of the damped matrices, to know when to stop without asking a device.

    Cost: two products and as many as it takes to raise to the power p (4 in all for p = 4), for each of log(condition)
    / log((1 + 1/p)^p) + 5 steps or so.
    """
    d = S.shape[-1]
    largest = largest_eigenvalue(S)
    shift = damping(largest)
    size = largest + shift
    scale = torch.where(size > 0, size, 1).reciprocal()
    eye = torch.eye(d, dtype=S.dtype, device=S.device)
    z = (1 + p) / 2
    M = (S * (z * scale).to(S.dtype).view(-1, 1, 1)).add_(eye * (z * shift * scale).to(S.dtype).view(-1, 1, 1))
    H = eye.mul(z ** (1 / p)).expand_as(M).clone()
    tolerance = 8 * torch.finfo(S.dtype).eps
    error = _farthest(M, eye)
    first = eye * (1 + 1 / p)
    active = torch.isfinite(error) & (size > 0)
    for step_number in range(newton_steps(condition, p)):
        if S.device.type == "cpu" and not bool(active.any()):  # elsewhere the question would wait for the device
            break
        step = torch.add(first, M, alpha=-1 / p)
        new_M, new_H = torch.bmm(torch.linalg.matrix_power(step, p), M), torch.bmm(H, step)
        new_error = _farthest(new_M, eye)
        # In the first step entries may grow: an eigenvalue above 1 lands anywhere in (0, 1]. From then on I - M is
        # positive semidefinite, its largest entry stands on the diagonal, and falls.
        better = active & (new_error < 1.2 * error) if step_number > 0 else active
        M = torch.where(better.view(-1, 1, 1), new_M, M)
        H = torch.where(better.view(-1, 1, 1), new_H, H)
        error = torch.where(better, new_error, error)
        active = better & (error > tolerance)
    H = torch.where((size > 0).view(-1, 1, 1), H * scale.pow(1 / p).to(S.dtype).view(-1, 1, 1), eye)
    return Root(H, shift, size, torch.where(shift > 0, size / shift, math.inf))


@lru_cache(maxsize=64)
def scaled_steps(smallest: float, p: int, rounding: float) -> tuple[tuple[float, float], ...]:
    """Return a and b of the steps x -> x (a - b x)^p that bring all of [smallest, 1] to 1 within ``rounding``.

    Each has the largest lower end of an interval that ends at 1: then (a - b)^p, where the largest eigenvalue goes, is
    as far as the smallest gets. While that is small the largest is held at ``HELD`` instead: were it to fall as low,
    its rounding would be lost in that of the matrix.
    """
    steps: list[tuple[float, float]] = []
    low = smallest
    while 1 - low > rounding and len(steps) < NEWTON_STEPS:
        if low < HELD / 20:
            end = HELD ** (1 / p)
            least, most = max(1 + 1 / p, end * (p + 1) / p), 4.0  # a: the peak of x (a - b x)^p is 1 at one of them
            for _ in range(60):
                a = (least + most) / 2
                peak = a / (p + 1) / (a - end) * (a * p / (p + 1)) ** p
                least, most = (a, most) if peak < 1 else (least, a)
            a, b = least, least - end
        elif 1 - low > 1e-3:
            ratio = (1 - low ** (1 / p)) / (1 - low ** (1 + 1 / p))  # b / a
            a = ((p + 1) * ratio * ((p + 1) / p) ** p) ** (1 / p)
            b = ratio * a
        else:
            a, b = 1 + 1 / p, 1 / p
        steps.append((a, b))
        low = min((a - b) ** p, low * (a - b * low) ** p, 1.0)
    return tuple(steps)


def scaled_newton_root(S: Tensor, damping: Damping, p: int, condition: float) -> Root:
    """Return inverse roots by the iteration of :func:`newton_root` with the best coefficients for the known condition:
    half as many steps, and nothing is asked on the way, so that what did not converge is known by its residual alone.

    Args:
        condition: finite, at least that of the damped matrices.

    Cost: as there, for 9 steps (p = 4, a condition of 1e6; the first and the last are one together) in place of 21.
    """
    trace = S.diagonal(dim1=1, dim2=2).sum(1).clamp(min=torch.finfo(S.dtype).tiny)
    M = S / trace.view(-1, 1, 1)
    largest = largest_eigenvalue(M, NORMALIZED) * trace.double()
    shift = damping(largest)
    size = largest + shift
    top = torch.where(size > 0, largest / POWER_ACCURACY + shift, 1)  # at least the largest eigenvalue
    M.mul_((trace / top).to(S.dtype).view(-1, 1, 1))
    M.diagonal(dim1=1, dim2=2).add_((shift / top).to(S.dtype).unsqueeze(1))
    H: Tensor | None = None
    steps = scaled_steps(POWER_ACCURACY / condition, p, 8 * torch.finfo(S.dtype).eps)
    for number, (a, b) in enumerate(steps, 1):
        step = M * -b
        step.diagonal(dim1=1, dim2=2).add_(a)
        H = step if H is None else torch.bmm(H, step)
        if number < len(steps):
            M = torch.bmm(torch.linalg.matrix_power(step, p), M)
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    H = eye if H is None else H * top.pow(-1 / p).to(S.dtype).view(-1, 1, 1)
    H = torch.where((size > 0).view(-1, 1, 1), H, eye)
    return Root(H, shift, size, torch.where(shift > 0, size / shift, math.inf))


def _farthest(M: Tensor, eye: Tensor) -> Tensor:
    """Return ``[K]``, the largest entry of M - I by size."""
    distance: Tensor = torch.linalg.vector_norm(M - eye, math.inf, dim=(1, 2))
    return distance


def largest_eigenvalue(S: Tensor, every: int = 1) -> Tensor:
    """Return ``[K]`` in float64, from below, by the power method.

    Args:
        every: steps after which a vector is made one of length 1.
    """
    v = start_vector(S.shape[-1], S.dtype, S.device).expand(S.shape[0], -1, -1)
    for number in range(1, POWER_STEPS + 1):
        v = torch.bmm(v, S)
        if number % every == 0:
            v = v / torch.linalg.vector_norm(v, dim=2, keepdim=True).clamp(min=torch.finfo(S.dtype).tiny)
    largest: Tensor = torch.linalg.vector_norm(torch.bmm(v, S), dim=(1, 2))
    return largest.double()


@lru_cache(maxsize=256)
def start_vector(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``[1, d]`` of independent normal numbers, always the same.

    Signs would be orthogonal to whole statistics: half of them to those of equal rows of two, whose largest eigenvalue
    then was 0.
    """
    generator = torch.Generator("cpu").manual_seed(d)
    return torch.randn(1, d, generator=generator, device="cpu").to(device, dtype)


@lru_cache(maxsize=256)
def probe_vectors(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``[PROBES, d]`` of independent signs, always the same."""
    generator = torch.Generator("cpu").manual_seed(d)
    signs = torch.randint(0, 2, (PROBES, d), generator=generator, device="cpu") * 2 - 1
    probes: Tensor = signs.to(device, dtype)
    return probes


def residual(S: Tensor, root: Root, p: int) -> Tensor:
    """Return ``[K]``, an estimate of ||A^(p/2) S~ A^(p/2) - I||_F / sqrt(d), recomputed from A (one A
    more on one side for an odd p).

    With V of random signs, E ||R V||_F^2 = PROBES ||R||_F^2 for any R. Anything in A that is not finite makes it so.
    Of a matrix of zeros, which has no root, it is 0. In the precision of S: roundings of it times the condition.
    Of eigenvectors it is that of ||A A^T - I||_F / sqrt(d).
    """
    V = probe_vectors(S.shape[-1], S.dtype, S.device).expand(S.shape[0], -1, -1)
    if root.values is not None:
        Y = torch.bmm(torch.bmm(V, root.A), root.A.mT) + 0 * root.values.sum(1).to(S.dtype).view(-1, 1, 1)
        away: Tensor = torch.linalg.vector_norm(Y - V, dim=(1, 2)) / math.sqrt(V[0].numel())
        return away
    size = torch.where(root.largest > 0, root.largest, 1)
    Y, factor = V, size.pow(1 / p).to(S.dtype).view(-1, 1, 1)
    for _ in range(p // 2):
        Y = torch.bmm(Y, root.A) * factor  # from the right, where a product with few rows is quick
    shift = (root.shift / size).to(S.dtype).view(-1, 1, 1)
    Y = torch.bmm(Y, S) * size.reciprocal().to(S.dtype).view(-1, 1, 1) + shift * Y
    for _ in range(p - p // 2):
        Y = torch.bmm(Y, root.A) * factor
    distance = torch.linalg.vector_norm(Y - V, dim=(1, 2)) / math.sqrt(V[0].numel())
    return torch.where(root.largest > 0, distance, 0 * distance)


def bound(condition: Tensor, dtype: torch.dtype, least: float) -> Tensor:
    """Return ``[K]``, the residual that a root may have: ``least``, or what rounding alone makes of a condition number.

    Roundings of an eigendecomposition are relative to the largest eigenvalue, so the relative error of the smallest is
    ``condition`` times as large. Never more than .9: a root of zero has 1. (Measured at a condition of 1e6, of which
    half the eigenvalues are largest and half smallest: .24 at d = 64, .41 at 1024.)
    """
    return (ROUNDINGS * torch.finfo(dtype).eps * condition.nan_to_num(1)).clamp(min=least, max=0.9)
