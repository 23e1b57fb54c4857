"""PSGD Kron: the preconditioner is fitted by steps in a Lie group, without roots or eigendecompositions.

That of pytorch-optimizer has the same formulas but cannot be used here: without the package opt_einsum its products go
through arrays of m² n² numbers, its noise comes from global generators, which differ between ranks and are not saved,
and its state does not survive ``load_state_dict``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from caspr_cli.optim.closure import WithClosure
from caspr_cli.optim.state import counter

LONGEST = 8192  # a longer axis has a diagonal factor
RATE = 0.1  # of the steps that fit the factors
LARGEST = 1.1  # root mean square of an update
ALWAYS, DECAY, LEAST = 500, 1e-3, 0.03  # factors are fitted at each of so many steps; later less often, but so often
BALANCE = 100  # updates of the factors between two in which they are given the same size


class PSGDKron(WithClosure):
    """PSGD with Kronecker factors (arXiv:2402.04553), with the settings of its authors' Kron for torch.

    The factors ``Q_i`` of the axes are upper triangular, and ``P = Q^T Q`` preconditions the momentum. Each fit draws
    noise, which follows from the step and from ``noise_seed``, an entry of each param group; when it is built that is
    the seed of torch's global generator. So ranks that began alike draw alike, and a state that is loaded goes on.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        own = {"step": 0, "waited": 0, "fits": 0, "noise_seed": torch.initial_seed()}
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay} | own)

    def _step(self) -> None:
        for index, group in enumerate(self.param_groups):
            fits = group["waited"] + 1 >= 1 / fitted_share(group["step"])
            generator = torch.Generator("cuda" if group["params"][0].is_cuda else "cpu")
            generator.manual_seed(seed_of_step(group["noise_seed"], index, group["step"]))
            group["waited"] = 0 if fits else group["waited"] + 1
            group["fits"] += fits
            group["step"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group, generator if fits else None)

    def _move(self, p: Tensor, G: Tensor, group: dict[str, Any], generator: torch.Generator | None) -> None:
        """Move one tensor; with a generator, fit its factors first."""
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
            state["factors"] = [_identity(n, p) for n in p.shape]
            state["step"] = counter()
        elif "step" not in state:  # an older version counted the steps of the group
            state["step"] = counter(group["step"] - 1)
        state["step"] += 1
        state["momentum"].lerp_(G, 1 - group["momentum"])
        dtype = torch.promote_types(p.dtype, torch.float32)  # there are no triangular solves in bfloat16
        M = state["momentum"].to(dtype) / (1 - group["momentum"] ** int(state["step"].item()))
        factors = [Q.to(dtype) for Q in state["factors"]]
        if generator is not None:
            if group["fits"] % BALANCE == 0:
                factors = balanced(factors)
            factors = fitted(factors, M, torch.empty_like(M).normal_(generator=generator))
            state["factors"] = [Q.to(p.dtype) for Q in factors]
        U = M
        for axis, Q in enumerate(factors):
            U = _times(_times(U, Q, axis), Q.mT if Q.dim() == 2 else Q, axis)
        U *= (LARGEST / (U.square().mean().sqrt() + 1e-6)).clamp(max=1)
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(U.to(p.dtype), alpha=-group["lr"])


def fitted_share(step: int) -> float:
    """Return in which share of the steps factors are fitted, after ``step`` steps."""
    return min(1.0, max(LEAST, math.exp(-DECAY * (step - ALWAYS))))


def seed_of_step(seed: int, group: int, step: int) -> int:
    """Return the seed of the noise that a param group draws after ``step`` steps."""
    return random.Random(f"{seed} {group} {step}").getrandbits(63)


def balanced(factors: list[Tensor]) -> list[Tensor]:
    """Return the factors scaled to the same largest element. Their product stays; none over- or underflows."""
    largest = torch.stack([Q.abs().max() for Q in factors])
    return [Q * scale for Q, scale in zip(factors, largest.log().mean().exp() / largest, strict=True)]


def fitted(factors: list[Tensor], h: Tensor, v: Tensor) -> list[Tensor]:
    """Return the factors after one step on ``h^T P h + v^T P^-1 v``.

    Args:
        factors: of each axis, ``[n, n]`` upper triangular, or the diagonal ``[n]``.
        h: what P preconditions, ``[n_1, n_2, ...]``.
        v: standard normal noise of that shape.
    """
    a, b = h, v
    for axis, Q in enumerate(factors):
        a, b = _times(a, Q, axis), _solved(b, Q, axis)
    found = []
    for axis, Q in enumerate(factors):
        A, B = (x.movedim(axis, 0).flatten(1) for x in (a, b))  # [n, the rest]
        if Q.dim() == 1:
            A, B = A.square().sum(1), B.square().sum(1)
            found.append(Q - RATE * (A - B) / (A + B).max() * Q)
        else:
            A, B = A @ A.mT, B @ B.mT
            found.append(Q - RATE / _norm_bound(A + B) * torch.triu(A - B) @ Q)
    return found


def _identity(n: int, like: Tensor) -> Tensor:
    if n == 1 or n > LONGEST:
        return like.new_ones(n)
    return torch.eye(n, dtype=like.dtype, device=like.device)


def _times(x: Tensor, Q: Tensor, axis: int) -> Tensor:
    """Return ``x`` multiplied by a factor along an axis."""
    if Q.dim() == 1:
        return x * Q.view(-1, *[1] * (x.dim() - axis - 1))
    product: Tensor = torch.tensordot(Q, x, ([1], [axis]))
    return product.movedim(0, axis)


def _solved(x: Tensor, Q: Tensor, axis: int) -> Tensor:
    """Return ``x`` multiplied by ``Q^-T`` along an axis."""
    if Q.dim() == 1:
        return _times(x, 1 / Q, axis)
    last = x.movedim(axis, -1)
    flat: Tensor = torch.linalg.solve_triangular(Q, last.reshape(-1, len(Q)), upper=True, left=False)
    return flat.view(last.shape).movedim(-1, axis)


def _norm_bound(S: Tensor) -> Tensor:
    """Return a lower bound of the spectral norm of a symmetric matrix: one power step from its longest column."""
    S = S / (largest := S.abs().max())  # squares would overflow
    x = S @ S.index_select(0, S.square().sum(0).argmax().view(1)).squeeze(0)  # nothing waits for the device
    bound: Tensor = largest * torch.linalg.vector_norm(S @ x) / torch.linalg.vector_norm(x)
    return bound
