r"""Preconditioned online learners, W_{t+1} = W_t - eta X_t^{-1} G_t, for many runs at once; float64.

Each keeps what it has seen of gradients G ``[..., m, n]`` and gives its preconditioner X_t as a spectrum: eigenvalues
``values`` and a rotation of matrices into the coordinates where X_t is diagonal. From these come the update, the trace,
projections in the norm of X_t, and X_t itself as a matrix on vec(V) (row by row).

    full        (eps I + sum g g^T)^(1/2), g = vec(G)                                      full-matrix Adagrad
    order q     [ (L~^(-1/2q) on rows + R~^(-1/2q) on columns) / 2 ]^(-q)                  q = 2 is CASPR
    product     L~^(1/4) on rows, R~^(1/4) on columns                                      Shampoo, the limit q -> inf
    diagonal    (eps + sum G_ij^2)^(1/2)                                                   Adagrad
    descent     max_{s <= t} ||G_s||_F sqrt(t)                                             online gradient descent

with L~ = eps I + sum G G^T and R~ = eps I + sum G^T G. Source: the formulas of Duvvuri et al. (ICLR 2024), Gupta et al.
(ICML 2018), Duchi et al. (JMLR 2011) and Zinkevich (ICML 2003), with the step size in eta alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from caspr_cli.theory.preconditioners import combined_values

BISECTIONS = 45  # halvings of what is a few times as large as it needs to be: to 1e-13


class Learner(ABC):
    """One method, of many runs.

    Args:
        shape: ``[..., m, n]`` of W.
        eps: broadcasts to ``[...]``; added to statistics, in the units of a squared gradient.
    """

    #: whether r, the rank of gradients, is in its bound, and whether distances there are those of the largest entry
    ranked, entrywise = False, False
    values: Tensor  # [..., m, n] or [..., m n], positive: eigenvalues of X_t

    def __init__(self, shape: torch.Size, eps: Tensor) -> None:
        self.shape, self.eps, self.age = shape, eps.expand(shape[:-2]), 0

    def see(self, G: Tensor) -> None:
        """Take G_t into X_t."""
        self.age += 1
        self._see(G)

    @abstractmethod
    def _see(self, G: Tensor) -> None: ...

    def rotated(self, V: Tensor) -> Tensor:
        """V ``[..., m, n]`` in the coordinates of ``values``."""
        return V

    def back(self, V: Tensor) -> Tensor:
        return V

    def update(self, G: Tensor) -> Tensor:
        """U = X_t^{-1} G."""
        return self.back(self.rotated(G) / self.values)

    def projected(self, W: Tensor, radius: Tensor) -> Tensor:
        """The matrix of length at most ``radius`` ``[...]`` that is nearest to W in the norm of X_t.

        It is (X_t + nu I)^{-1} X_t W, nu >= 0 (Lagrange); its length falls with nu, which is found by bisection.
        """
        axes = tuple(range(len(self.shape) - 2, self.values.ndim))
        V, x = self.rotated(W), self.values
        radius = radius.clamp(min=torch.finfo(V.dtype).tiny)

        def column(nu: Tensor) -> Tensor:
            return nu.view(*nu.shape, *(1,) * len(axes))

        length = torch.linalg.vector_norm(V, dim=axes)
        low, high = torch.zeros_like(length), x.amax(axes) * (length / radius - 1).clamp(min=0)  # is short enough
        for _ in range(BISECTIONS if bool((high > 0).any()) else 0):
            nu = (low + high) / 2
            long = torch.linalg.vector_norm(V * x / (x + column(nu)), dim=axes) > radius
            low, high = torch.where(long, nu, low), torch.where(long, high, nu)
        return self.back(V * x / (x + column(high)))

    def trace(self) -> Tensor:
        """``[...]``: tr(X_t)."""
        return self.values.flatten(len(self.shape) - 2).sum(-1)

    @abstractmethod
    def dense(self) -> Tensor:
        """X_t ``[..., m n, m n]``."""


class Full(Learner):
    """Full-matrix Adagrad. Cost: an eigendecomposition of m n rows a round."""

    def __init__(self, shape: torch.Size, eps: Tensor) -> None:
        super().__init__(shape, eps)
        size = shape[-2] * shape[-1]
        self._F = torch.diag_embed(self.eps.unsqueeze(-1).expand(*shape[:-2], size).double())

    def _see(self, G: Tensor) -> None:
        g = G.flatten(-2)
        self._F = self._F + g.unsqueeze(-1) * g.unsqueeze(-2)
        values, self._Q = torch.linalg.eigh(self._F)
        self.values = values.clamp(min=self.eps.unsqueeze(-1)).sqrt()

    def rotated(self, V: Tensor) -> Tensor:
        rotated: Tensor = (self._Q.mT @ V.flatten(-2).unsqueeze(-1)).squeeze(-1)
        return rotated

    def back(self, V: Tensor) -> Tensor:
        back: Tensor = (self._Q @ V.unsqueeze(-1)).view(self.shape)
        return back

    def dense(self) -> Tensor:
        X: Tensor = (self._Q * self.values.unsqueeze(-2)) @ self._Q.mT
        return X


class Kronecker(Learner):
    """The family of CASPR: a Kronecker sum of order q, or the product.

    Args:
        order: q, or ``math.inf`` for Shampoo.
        beta: of a moving average of statistics, bias-corrected and taken t times, so that for gradients that are all
            alike it is the sum; None is the sum.
        interval: rounds between two computations of roots; in between they are stale.
        fresh: rounds, from the first, in which they are computed anew in any case.
    """

    ranked = True

    def __init__(
        self,
        shape: torch.Size,
        eps: Tensor,
        order: float,
        *,
        beta: float | None = None,
        interval: int = 1,
        fresh: int = 0,
    ) -> None:
        super().__init__(shape, eps)
        self._order, self._beta, self._interval, self._fresh = order, beta, interval, fresh
        self._L, self._R = (torch.zeros(*shape[:-2], d, d, dtype=torch.float64) for d in shape[-2:])

    def _see(self, G: Tensor) -> None:
        keep, weight = (1.0, 1.0) if self._beta is None else (self._beta, 1 - self._beta)
        self._L = keep * self._L + weight * G @ G.mT
        self._R = keep * self._R + weight * G.mT @ G
        if self.age <= self._fresh or (self.age - 1) % self._interval == 0:
            times = 1.0 if self._beta is None else self.age / (1 - self._beta**self.age)
            (left, self._P), (right, self._Q) = (torch.linalg.eigh(times * S) for S in (self._L, self._R))
            ridge = self.eps.unsqueeze(-1)
            self.values = combined_values(left.clamp(min=0) + ridge, right.clamp(min=0) + ridge, self._order)

    def rotated(self, V: Tensor) -> Tensor:
        rotated: Tensor = self._P.mT @ V @ self._Q
        return rotated

    def back(self, V: Tensor) -> Tensor:
        back: Tensor = self._P @ V @ self._Q.mT
        return back

    def dense(self) -> Tensor:
        basis = torch.einsum("...ij,...kl->...ikjl", self._P, self._Q).flatten(-4, -3).flatten(-2)  # [..., m n, m n]
        return (basis * self.values.flatten(-2).unsqueeze(-2)) @ basis.mT


class Diagonal(Learner):
    """Adagrad: each entry by itself."""

    entrywise = True

    def __init__(self, shape: torch.Size, eps: Tensor) -> None:
        super().__init__(shape, eps)
        self._squares = self.eps[..., None, None].expand(shape).double()

    def _see(self, G: Tensor) -> None:
        self._squares = self._squares + G.square()
        self.values = self._squares.sqrt()

    def projected(self, W: Tensor, radius: Tensor) -> Tensor:
        """In the norm of its bound: entries of at most ``radius``."""
        limit = radius[..., None, None]
        return W.clamp(-limit, limit)

    def dense(self) -> Tensor:
        return torch.diag_embed(self.values.flatten(-2))


class Descent(Learner):
    """Online gradient descent, steps as 1 / sqrt(t), in units of the largest gradient so far: of degree 0, as all."""

    def __init__(self, shape: torch.Size, eps: Tensor) -> None:
        super().__init__(shape, eps)
        self._largest = self.eps.double().sqrt()

    def _see(self, G: Tensor) -> None:
        self._largest = torch.maximum(self._largest, torch.linalg.matrix_norm(G))
        self.values = (math.sqrt(self.age) * self._largest)[..., None, None].expand(self.shape)

    def trace(self) -> Tensor:
        """Of the 1 x 1 matrix that it is on a line: its bound has this, and no dimension."""
        return self.values[..., 0, 0]

    def dense(self) -> Tensor:
        return torch.diag_embed(self.values.flatten(-2))


@dataclass(frozen=True)
class Method:
    """A learner by name."""

    name: str
    label: str
    order: float | None = None  # of a member of CASPR's family
    beta: float | None = None
    interval: int = 1
    fresh: int = 0

    def make(self, shape: torch.Size, eps: Tensor) -> Learner:
        if self.order is not None:
            return Kronecker(shape, eps, self.order, beta=self.beta, interval=self.interval, fresh=self.fresh)
        others: dict[str, Callable[[torch.Size, Tensor], Learner]]
        others = {"full": Full, "diagonal": Diagonal, "descent": Descent}
        return others[self.name](shape, eps)


METHODS = (
    Method("full", "full-matrix Adagrad"),
    Method("order1", "order 1", 1),
    Method("caspr", "CASPR", 2),
    Method("order3", "order 3", 3),
    Method("shampoo", "Shampoo", math.inf),
    Method("diagonal", "diagonal Adagrad"),
    Method("descent", "gradient descent"),
)
# What the theorem does not allow, with CASPR.
DEPARTURES = (
    Method("caspr", "CASPR, as the theorem has it", 2),
    Method("average", "moving average, beta 0.9", 2, beta=0.9),
    Method("stale", "roots every 10 rounds", 2, interval=10),
    Method("later", "roots every 10 after 50 rounds", 2, interval=10, fresh=50),
)
