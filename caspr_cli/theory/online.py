r"""Learners on online problems, and the bound on their regret with every inequality on the way to it.

Regret_T = sum_t f_t(W_t) - f_t(W*), W* the best fixed W. For W_{t+1} = W_t - eta X_t^{-1} G_t and any W*:

(a) f_t is convex: Regret_T <= sum <G_t, W_t - W*>.
(b) ||W_{t+1} - W*||^2 in the norm of X_t is ||W_t - W*||^2 - 2 eta <G_t, W_t - W*> + eta^2 <G_t, X_t^{-1} G_t>. Solved
    for the middle term and summed, with X_0 = 0 and what is left at the end dropped:
    <= (1 / 2 eta) sum ||W_t - W*||^2_(X_t - X_{t-1}) + (eta / 2) sum <G_t, X_t^{-1} G_t>.
(c) X_t - X_{t-1} is positive semidefinite, and D = max_t ||W_t - W*||_F: the first sum is at most
    D^2 sum lambda_max(X_t - X_{t-1}), (d) which is at most D^2 tr(X_T).
(e) The second is at most 2 r tr(F~_T^(1/2)), F~_t = eps I + (1/r) sum g g^T, g = vec(G), r the largest rank of a G: as
    X_t >= F~_t^(1/2) (the chain of `caspr-verify order`), <G_t, X_t^{-1} G_t> <= g^T F~_t^(-1/2) g
    = r tr(F~_t^(-1/2) (F~_t - F~_{t-1})) <= 2 r (tr F~_t^(1/2) - tr F~_{t-1}^(1/2)), for tr F^(1/2) is concave and its
    slope at F~_t is F~_t^(-1/2) / 2.
(f) F~_T^(1/2) <= X_T has the smaller trace.

Together Regret_T <= (D^2 / 2 eta + eta r) tr(X_T), and with eta = D / sqrt(2 r) at most sqrt(2 r) D tr(X_T). D is then
to be known before the run that it is a property of. It is where W stays in a ball that W* is in: W_{t+1} is projected
onto it in the norm of X_t, which brings it no further from W* in that norm, so that (b) holds as well. For a ball of
radius ||W*|| around 0, D <= 2 ||W*||.

Full-matrix Adagrad is its own F~ with r = 1. So is diagonal Adagrad an entry at a time, with the largest entry of
W_t - W* for D; there (c) and (d) are one step. For gradient descent X_t = max_s ||G_s|| sqrt(t) times the identity,
r = 1, "tr" is that number, and (e) is sum 1 / sqrt(t) <= 2 sqrt(T).

(c) needs X_t that grow: X_q is a power mean, of exponent in [-1, 0), of commuting powers of what grows, and such means
are operator monotone (Kubo and Ando, Means of positive linear operators, Math. Ann. 246, 1980). A moving average does
not grow, and then (c) fails; roots that are old break (e).

Source of the scheme: Gupta, Koren, Singer, "Shampoo", ICML 2018, section 3; of (e) Duchi, Hazan, Singer, JMLR 2011,
Lemma 10.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from caspr_cli.theory.gradients import Log
from caspr_cli.theory.preconditioners import METHODS, Learner, Method, combined_values
from caspr_cli.theory.problems import Problem

EPS = 1e-6  # damping, in units of the mean of ||G||_F^2 where W = 0
LOST = 1e9  # a run whose W has an entry that many times as large as ||W*|| is lost: its regret is infinite
RUNGS = ("regret", "linear", "distances", "largest", "trace", "full", "bound")
HALVINGS = range(9)  # step sizes of the grid: ||W*|| / 2^k, the same for all methods
CASPR = METHODS[2]


@dataclass(frozen=True)
class Runs:
    """E runs of one method a seed."""

    regret: Tensor  # [S, E, T]: up to each round
    sizes: Tensor  # [S, E, T]: tr(X_t)
    distance: Tensor  # [S, E]: D
    eta: Tensor  # [S, E]
    rank: int  # r

    @property
    def at_end(self) -> Tensor:
        """Return the regret ``[S, E]``; infinite where W was lost."""
        return self.regret[..., -1]

    def bound(self) -> Tensor:
        """Return (D^2 / 2 eta + eta r) tr(X_t), ``[S, E, T]``."""
        factor: Tensor = self.distance.square() / (2 * self.eta) + self.eta * self.rank
        return factor.unsqueeze(-1) * self.sizes

    def limits(self) -> Tensor:
        """Return sqrt(2 r) D tr(X_t) ``[S, T]`` of the theorem's step, D = eta sqrt(2 r): twice eta r tr(X_t)."""
        return (2 * self.eta.unsqueeze(-1) * self.rank * self.sizes).squeeze(1)


@dataclass(frozen=True)
class Ladder:
    """The chain (a) to (f) of one run a seed, each rung a bound on that before it."""

    runs: Runs
    rungs: dict[str, Tensor]  # [S], by the names of RUNGS; NaN where a rung is not one of this method's
    growth: Tensor  # [S, T]: the least eigenvalue of X_t - X_{t-1}, in units of the largest of X_t
    sums: Tensor  # [S]: sum <G_t, X_t^{-1} G_t> over 2 r tr(F~_T^(1/2))


@dataclass(frozen=True)
class Played:
    """All runs of one method on one problem."""

    problem: Problem
    method: Method
    grid: Runs  # [S, steps of the grid]
    ladder: Ladder  # of the theorem's run
    strayed: Tensor  # [S]: with the theorem's step and no ball, how far W came from W*, in units of D

    @property
    def theorem(self) -> Runs:
        """Return the runs ``[S, 1]`` with the theorem's step."""
        return self.ladder.runs

    @property
    def chosen(self) -> int:
        """Return the place in the grid of the step with the least regret, on average over seeds."""
        return int(self.grid.at_end.mean(0).argmin())


class Match:
    """Runs ``[S, E]`` of one method on one problem, a round after the other.

    Args:
        radius: ``[S, E]``, of the ball that W is kept in, if it is.
    """

    def __init__(self, problem: Problem, method: Method, eta: Tensor, radius: Tensor | None = None) -> None:
        self.best = problem.best.unsqueeze(1).expand(-1, eta.shape[1], -1, -1)
        self.learner = Learner(method, self.best.shape, EPS * scale_of(problem).unsqueeze(1))
        self.rank = problem.rank if method.ranked else 1
        self.W, self.distance = torch.zeros_like(self.best), torch.zeros_like(eta)
        self._problem, self._eta, self._radius = problem, eta, radius
        self._regret, self._sizes = [torch.zeros_like(eta)], list[Tensor]()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Play all rounds; yield G_t, U_t and W_t - W*, all ``[S, E, m, n]``; X_t is then the learner's."""
        for t in range(self._problem.rounds):
            yield self._round(t)

    def _round(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        off = self.W - self.best
        paid, G = self._problem.play(t, self.W)
        regret = self._regret[-1] + paid - self._problem.play(t, self.best)[0]
        distance = torch.maximum(self.distance, length(off, self.learner.method))
        self.learner.see(G)
        U = self.learner.root.power(-1).apply(G)
        W = self.W - self._eta[..., None, None] * U
        if self._radius is not None:
            W = self.learner.projected(W, self._radius)
        lost = ~(W.abs().amax((-2, -1)) <= LOST * torch.linalg.matrix_norm(self.best))
        self.W = torch.where(lost[..., None, None], 0, W)
        self.distance = torch.where(lost, math.inf, distance)
        self._regret.append(torch.where(lost, math.inf, regret))
        self._sizes.append(self.learner.trace())
        return G, U, off

    def runs(self) -> Runs:
        """Return what was played."""
        regret, sizes = torch.stack(self._regret[1:], -1), torch.stack(self._sizes, -1)
        return Runs(regret, sizes, self.distance, self._eta, self.rank)


def length(V: Tensor, method: Method) -> Tensor:
    """Return the length ``[...]`` in the norm in which the method's bound has D."""
    return V.abs().amax((-2, -1)) if method.entrywise else torch.linalg.matrix_norm(V)


def scale_of(problem: Problem) -> Tensor:
    """Return the mean of ||G_t||_F^2 at W = 0, ``[S]``."""
    W = torch.zeros_like(problem.best).unsqueeze(1)
    squares = [problem.play(t, W)[1].square().sum((-2, -1)) for t in range(problem.rounds)]
    return torch.stack(squares).mean(0).squeeze(1)


def play(problem: Problem, method: Method, eta: Tensor, radius: Tensor | None = None) -> Runs:
    """Return all runs of a method with step sizes ``[S, E]``, in balls of that radius ``[S, E]`` if one is given."""
    match = Match(problem, method, eta, radius)
    for _ in match:
        pass
    return match.runs()


def of_theorem(problem: Problem, method: Method) -> tuple[Tensor, Tensor]:
    """Return eta = D / sqrt(2 r) with D = 2 ||W*||, and the radius ||W*||, both ``[S, 1]``, in the bound's norm."""
    radius = length(problem.best, method).unsqueeze(1)
    return 2 * radius / math.sqrt(2 * (problem.rank if method.ranked else 1)), radius


def play_all(problem: Problem, method: Method, log: Log) -> Played:
    """Return the runs of a method at every step of the grid, and as the theorem has it."""
    log(f"{problem.name}: {method.label}")
    eta, ball = of_theorem(problem, method)
    steps = [torch.linalg.matrix_norm(problem.best).unsqueeze(1) * 0.5**k for k in HALVINGS]
    strayed = play(problem, method, eta).distance[:, 0] / (2 * ball[:, 0])
    grid = play(problem, method, torch.cat(steps, 1))
    return Played(problem, method, grid, ladder(problem, method, eta, ball), strayed)


def ladder(problem: Problem, method: Method, eta: Tensor, radius: Tensor | None = None) -> Ladder:
    """Return every inequality of the chain, for one run a seed, ``eta`` ``[S, 1]``.

    Cost: an eigendecomposition of m n rows a round.
    """
    match = Match(problem, method, eta, radius)
    learner, size = match.learner, math.prod(problem.best.shape[1:])
    X = moment = torch.zeros(*eta.shape, size, size, dtype=torch.float64)
    linear, distances, largest, products = (torch.zeros_like(eta) for _ in range(4))
    growth = []
    for G, U, off in match:
        linear = linear + (G * off).sum((-2, -1))
        products = products + (G * U).sum((-2, -1))
        change, v, g = learner.root.dense() - X, off.flatten(-2), G.flatten(-2)
        X, moment = X + change, moment + g.unsqueeze(-1) * g.unsqueeze(-2)
        distances = distances + torch.einsum("...i,...ij,...j->...", v, change, v)
        ends = torch.linalg.eigvalsh(change)
        largest = largest + ends[..., -1]
        growth.append(ends[..., 0] / learner.root.values.flatten(2).amax(-1))
    runs, rank, trace = match.runs(), match.rank, learner.trace()
    full = _trace_of_root(moment / rank, learner.eps) if method.ranked else trace
    near, far = products * eta / 2, match.distance.square() / (2 * eta)
    rungs = (
        runs.at_end,
        linear,
        distances / (2 * eta) + near,
        torch.full_like(far, math.nan) if method.entrywise else far * largest + near,
        far * trace + near,
        far * trace + eta * rank * full,
        (far + eta * rank) * trace,
    )
    return Ladder(
        runs,
        {name: value.squeeze(1) for name, value in zip(RUNGS, rungs, strict=True)},
        torch.stack(growth, -1).squeeze(1),
        (products / (2 * rank * full)).squeeze(1),
    )


def traces(problem: Problem, orders: list[float]) -> Tensor:
    """Return tr(F~_T^(1/2)), then tr(X_T) for each order, ``[S, 1 + orders]``, all of the gradients that CASPR sees."""
    match = Match(problem, CASPR, *of_theorem(problem, CASPR))
    G = torch.cat([G for G, *_ in match], 1)  # [S, T, m, n]
    g, eps = G.flatten(-2), match.learner.eps.squeeze(1)
    found = [_trace_of_root(g.mT @ g / match.rank, eps)]
    ends = [torch.linalg.eigvalsh(S.sum(1)).clamp(min=0) + eps.unsqueeze(-1) for S in (G @ G.mT, G.mT @ G)]
    found += [combined_values(ends[0], ends[1], order).sum((-2, -1)) for order in orders]
    return torch.stack(found, 1)


def _trace_of_root(moment: Tensor, eps: Tensor) -> Tensor:
    """Return tr((eps I + M)^(1/2)) ``[...]`` of M ``[..., N, N]``."""
    root: Tensor = (torch.linalg.eigvalsh(moment).clamp(min=0) + eps.unsqueeze(-1)).sqrt().sum(-1)
    return root
