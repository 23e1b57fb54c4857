"""Weights between the family's closed form and the second moment that is measured in the eigenbasis, in float64.

Everything is recomputed from the whole history of a block's gradients, with dense matrices on vec(G).
"""

import itertools
import math

import torch
from torch import Tensor

from references.kronecker import on_axis
from references.stream import statistics


def operator(bases: dict[int, Tensor], shape: tuple[int, ...]) -> Tensor:
    """K [n, n] with vec(G') = K^T vec(G): the basis of each axis that has one, the identity on the others."""
    whole = torch.eye(math.prod(shape), dtype=torch.float64)
    for axis, basis in bases.items():
        whole = whole @ on_axis(basis.contiguous(), shape, axis)
    return whole


def next_basis(statistic: Tensor, last: Tensor | None, solver: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues and a basis: exact, or for "newton" from the last one by a step of orthogonal iteration."""
    if solver != "newton" or last is None:
        return torch.linalg.eigh(statistic)
    estimates = (last * (statistic @ last)).sum(0)
    basis, _ = torch.linalg.qr(statistic @ last[:, estimates.argsort(descending=True)])
    return (basis * (statistic @ basis)).sum(0), basis


def closed_form(values: dict[int, Tensor], shape: tuple[int, ...], order: float, exponent: float) -> Tensor:
    """The factor of each entry of vec(G') in the family's closed form, of damped eigenvalues."""
    k, factors = len(values), []
    for index in itertools.product(*map(range, shape)):
        own = [eigenvalues[index[axis]] for axis, eigenvalues in values.items()]
        if order == math.inf:
            factors.append(math.prod(x ** (-exponent / k) for x in own))
        else:
            factors.append((sum(x ** (-exponent / order) for x in own) / k) ** order)
    return torch.stack([torch.as_tensor(f) for f in factors])


def pooled(V: Tensor, values: dict[int, Tensor], limits: dict[int, float], shape: tuple[int, ...]) -> Tensor:
    """V with its mean over the directions of each axis whose damped eigenvalue is below a limit, in place of each."""
    V = V.reshape(shape).clone()
    for axis, eigenvalues in values.items():
        low = (eigenvalues < limits[axis]).nonzero().flatten().tolist()
        if low:
            part = V.index_select(axis, torch.tensor(low))
            V.index_copy_(axis, torch.tensor(low), part.mean(axis, keepdim=True).expand_as(part))
    return V.flatten()


def in_eigenbasis(
    gradient: Tensor, history: list[Tensor], refreshed: list[int], axes: list[int], *,
    kind: str, beta: float, eps: float, damping: str, order: float, exponent: float, measured: float, solver: str,
) -> Tensor:  # fmt: skip
    """U of a block whose bases were computed after these numbers of gradients.

    V begins as what the eigenvalues of the axes say (their product over the trace), takes the square of each gradient
    in the basis of then, and turns with the basis as a diagonal covariance does.
    """
    shape, bases, values, limits = tuple(gradient.shape), {}, {}, {}
    V = torch.zeros(gradient.numel(), dtype=torch.float64)
    K = operator(bases, shape)
    for t, new in enumerate(history, start=1):
        share = (1 - beta) / (1 - beta**t) if kind == "ema" else 1
        V = (1 - share if kind == "ema" else 1) * V + share * (K.T @ new.flatten()) ** 2
        if bases:
            V = pooled(V, values, limits, shape)
        if t not in refreshed:
            continue
        found = statistics(history[:t], kind, beta)
        if not any(S.any() for S in found):
            return torch.zeros_like(gradient)
        first, before, trace = not bases, K, found[0].trace()
        for axis in axes:
            values[axis], bases[axis] = next_basis(found[axis], bases.get(axis), solver)
            values[axis] = values[axis].clamp(min=0)
            values[axis] = values[axis] + (eps * values[axis].max() if damping == "relative" else eps)
            limits[axis] = 2 * eps * (values[axis].max() if damping == "relative" else 1)
        K = operator(bases, shape)
        if first:
            V = trace * torch.ones_like(V) / math.prod(d for axis, d in enumerate(shape) if axis not in axes)
            for i, index in enumerate(itertools.product(*map(range, shape))):
                V[i] *= math.prod(values[axis][index[axis]] / values[axis].sum() for axis in axes)
        else:
            turn = K.T @ before
            V = torch.diagonal(turn @ torch.diag(V) @ turn.T)
        V = pooled(V, values, limits, shape)
    V = V + (eps * V.max() if damping == "relative" else eps)
    c = closed_form(values, shape, order, exponent)
    prior = (c**2 * V).mean() / c**2
    mixed = measured * V + (1 - measured) * prior
    return (K @ (mixed**-0.5 * (K.T @ gradient.flatten()))).reshape(shape)
