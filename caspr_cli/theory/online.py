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

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from caspr_cli.theory.gradients import Log
from caspr_cli.theory.preconditioners import Root, combined_values, entrywise
from caspr_cli.theory.problems import Problem

EPS = 1e-6  # damping, in units of the mean of ||G||_F^2 where W = 0
LOST = 1e9  # a run whose W has an entry that many times as large as ||W*|| is lost: its regret is infinite
RUNGS = ("regret", "linear", "distances", "largest", "trace", "full", "bound")
HALVINGS = range(9)  # step sizes of the grid: ||W*|| / 2^k, the same for all methods
BISECTIONS = 45  # halvings of what is a few times as large as it needs to be: to 1e-13


@dataclass(frozen=True)
class Method:
    """A preconditioned online learner, W_{t+1} = W_t - eta X_t^{-1} G_t, by name."""

    name: str
    label: str
    order: float | None = None  # q of a member of CASPR's family, `math.inf` for Shampoo; None for the others
    # of a moving average of statistics, times t after bias correction: equal gradients give their sum; None: a sum
    beta: float | None = None
    interval: int = 1  # rounds between two computations of roots; in between they are stale
    fresh: int = 0  # rounds, from the first, in which they are computed anew in any case

    @property
    def ranked(self) -> bool:
        """Whether r, the rank of gradients, is in its bound."""
        return self.order is not None

    @property
    def entrywise(self) -> bool:
        """Whether the distances in its bound are those of the largest entry."""
        return self.name == "diagonal"


METHODS = (
    Method("full", "full-matrix Adagrad"),
    Method("order1", "order 1", 1),
    Method("caspr", "CASPR", 2),
    Method("order3", "order 3", 3),
    Method("shampoo", "Shampoo", math.inf),
    Method("diagonal", "diagonal Adagrad"),
    Method("descent", "gradient descent"),
)
# CASPR with what the theorem does not allow.
DEPARTURES = (
    Method("caspr", "CASPR, as the theorem has it", 2),
    Method("average", "moving average, beta 0.9", 2, beta=0.9),
    Method("stale", "roots every 10 rounds", 2, interval=10),
    Method("later", "roots every 10 after 50 rounds", 2, interval=10, fresh=50),
)
CASPR = METHODS[2]


class Learner:
    """The statistics of a method over gradients ``[..., m, n]`` of many runs at once, and its preconditioner ``root``.

    Args:
        shape: ``[..., m, n]`` of W.
        eps: broadcasts to ``[...]``; added to statistics, in the units of a squared gradient.
    """

    root: Root

    def __init__(self, method: Method, shape: torch.Size, eps: Tensor) -> None:
        self.method, self.shape, self.eps, self.age = method, shape, eps.expand(shape[:-2]), 0
        self._seen: Any = (0.0, 0.0) if method.order else torch.zeros((), dtype=torch.float64)  # the statistics

    def see(self, G: Tensor) -> None:
        """Take G_t into X_t. For the full matrix this is an eigendecomposition of m n rows."""
        self.age += 1
        eps = self.eps[..., None, None]
        if self.method.order is not None:
            self._see_sides(G, self.method.order)
        elif self.method.name == "full":
            self._seen = self._seen + G.flatten(-2).unsqueeze(-1) * G.flatten(-2).unsqueeze(-2)
            F = Root.of(self._seen)
            self.root = replace(F, values=(F.values.clamp(min=0) + eps).sqrt())
        elif self.method.name == "diagonal":
            self._seen = self._seen + G.square()
            self.root = entrywise((self._seen + eps).sqrt())
        else:  # steps as 1 / sqrt(t), in units of the largest gradient so far: of degree 0, as all
            self._seen = torch.maximum(self._seen, torch.linalg.matrix_norm(G, keepdim=True))
            self.root = entrywise((math.sqrt(self.age) * self._seen.clamp(min=eps.sqrt())).expand(self.shape))

    def _see_sides(self, G: Tensor, order: float) -> None:
        beta = self.method.beta
        keep, weight = (1.0, 1.0) if beta is None else (beta, 1 - beta)
        self._seen = [keep * S + weight * own for S, own in zip(self._seen, (G @ G.mT, G.mT @ G), strict=True)]
        if self.age <= self.method.fresh or (self.age - 1) % self.method.interval == 0:
            times = 1.0 if beta is None else self.age / (1 - beta**self.age)
            (a, V), (b, W) = (torch.linalg.eigh(times * S) for S in self._seen)
            ridge = self.eps.unsqueeze(-1)
            self.root = Root(combined_values(a.clamp(min=0) + ridge, b.clamp(min=0) + ridge, order), V, W)

    def projected(self, W: Tensor, radius: Tensor) -> Tensor:
        """Return the matrix of length at most ``radius`` ``[...]`` that is nearest to W in the norm of X_t.

        It is (X_t + nu I)^{-1} X_t W, nu >= 0 (Lagrange); its length falls with nu, which is found by bisection. In the
        norm of an entrywise bound, entries are cut.
        """
        if self.method.entrywise:
            return W.clamp(-radius[..., None, None], radius[..., None, None])
        V, x = self.root.rotated(W), self.root.values
        radius = radius.clamp(min=torch.finfo(V.dtype).tiny)

        def shorter(nu: Tensor) -> Tensor:
            return V * x / (x + nu[..., None, None])

        length = torch.linalg.matrix_norm(V)
        low, high = torch.zeros_like(length), x.amax((-2, -1)) * (length / radius - 1).clamp(min=0)  # is short enough
        for _ in range(BISECTIONS if bool((high > 0).any()) else 0):
            nu = (low + high) / 2
            long = torch.linalg.matrix_norm(shorter(nu)) > radius
            low, high = torch.where(long, nu, low), torch.where(long, high, nu)
        return self.root.back(shorter(high), self.shape)

    def trace(self) -> Tensor:
        """Return tr(X_t) ``[...]``; for gradient descent one of its equal eigenvalues, which its bound has."""
        values = self.root.values
        return values[..., 0, 0] if self.method.name == "descent" else values.sum((-2, -1))


# ---- runs -----------------------------------------------------------------------------------------------------------


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


Watch = Callable[["Learner", Tensor, Tensor, Tensor], None]


def play(
    problem: Problem, method: Method, eta: Tensor, radius: Tensor | None = None, watch: Watch = lambda *seen: None
) -> Runs:
    """Return all runs of a method with step sizes ``[S, E]``, in balls of that radius ``[S, E]`` if one is given.

    ``watch``: takes in each round the learner, whose X_t has G_t, and G_t, U_t and W_t - W*, all ``[S, E, m, n]``.
    """
    best = problem.best.unsqueeze(1).expand(-1, eta.shape[1], -1, -1)
    learner = Learner(method, best.shape, damping(problem).unsqueeze(1))
    W, distance, regret, rounds = torch.zeros_like(best), torch.zeros_like(eta), torch.zeros_like(eta), []
    for t in range(problem.rounds):
        off = W - best
        paid, G = problem.play(t, W)
        regret = regret + paid - problem.play(t, best)[0]
        distance = torch.maximum(distance, length(off, method))
        learner.see(G)
        U = learner.root.power(-1).apply(G)
        watch(learner, G, U, off)
        W = W - eta[..., None, None] * U
        if radius is not None:
            W = learner.projected(W, radius)
        lost = ~(W.abs().amax((-2, -1)) <= LOST * torch.linalg.matrix_norm(best))
        W = torch.where(lost[..., None, None], 0, W)
        distance, regret = (torch.where(lost, math.inf, x) for x in (distance, regret))
        rounds.append(torch.stack([regret, learner.trace()]))
    regrets, sizes = torch.stack(rounds, -1)
    return Runs(regrets, sizes, distance, eta, problem.rank if method.ranked else 1)


def length(V: Tensor, method: Method) -> Tensor:
    """Return the length ``[...]`` in the norm in which the method's bound has D."""
    return V.abs().amax((-2, -1)) if method.entrywise else torch.linalg.matrix_norm(V)


def damping(problem: Problem) -> Tensor:
    """Return eps ``[S]``, in units of the mean of ||G_t||_F^2 at W = 0."""
    W = torch.zeros_like(problem.best).unsqueeze(1)
    squares = [problem.play(t, W)[1].square().sum((-2, -1)) for t in range(problem.rounds)]
    return EPS * torch.stack(squares).mean(0).squeeze(1)


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
    size = math.prod(problem.best.shape[1:])
    X = moment = torch.zeros(*eta.shape, size, size, dtype=torch.float64)
    parts = []

    def watch(learner: Learner, G: Tensor, U: Tensor, off: Tensor) -> None:
        nonlocal X, moment
        change, v, g = learner.root.dense() - X, off.flatten(-2), G.flatten(-2)
        X, moment = X + change, moment + g.unsqueeze(-1) * g.unsqueeze(-2)
        linear, product = ((G * other).sum((-2, -1)) for other in (off, U))
        moved, ends = torch.einsum("...i,...ij,...j->...", v, change, v), torch.linalg.eigvalsh(change)
        growth = ends[..., 0] / learner.root.values.flatten(2).amax(-1)
        parts.append(torch.stack([linear, product, moved, ends[..., -1], growth]))

    runs = play(problem, method, eta, radius, watch)
    rounds = torch.stack(parts, -1)  # [5, S, 1, T]
    linear, products, distances, largest, _ = rounds.sum(-1)
    rank, trace = runs.rank, runs.sizes[..., -1]
    full = _trace_of_root(moment / rank, damping(problem).unsqueeze(1)) if method.ranked else trace
    near, far = products * eta / 2, runs.distance.square() / (2 * eta)
    rungs = (
        runs.at_end,
        linear,
        distances / (2 * eta) + near,
        torch.full_like(far, math.nan) if method.entrywise else far * largest + near,
        far * trace + near,
        far * trace + eta * rank * full,
        (far + eta * rank) * trace,
    )
    named = {name: value.squeeze(1) for name, value in zip(RUNGS, rungs, strict=True)}
    return Ladder(runs, named, rounds[-1].squeeze(1), (products / (2 * rank * full)).squeeze(1))


def traces(problem: Problem, orders: list[float]) -> Tensor:
    """Return tr(F~_T^(1/2)), then tr(X_T) for each order, ``[S, 1 + orders]``, all of the gradients that CASPR sees."""
    seen: list[Tensor] = []
    runs = play(problem, CASPR, *of_theorem(problem, CASPR), lambda learner, G, U, off: seen.append(G))
    G, eps = torch.cat(seen, 1), damping(problem)  # [S, T, m, n]
    g = G.flatten(-2)
    found = [_trace_of_root(g.mT @ g / runs.rank, eps)]
    ends = [torch.linalg.eigvalsh(S.sum(1)).clamp(min=0) + eps.unsqueeze(-1) for S in (G @ G.mT, G.mT @ G)]
    found += [combined_values(ends[0], ends[1], order).sum((-2, -1)) for order in orders]
    return torch.stack(found, 1)


def _trace_of_root(moment: Tensor, eps: Tensor) -> Tensor:
    """Return tr((eps I + M)^(1/2)) ``[...]`` of M ``[..., N, N]``."""
    root: Tensor = (torch.linalg.eigvalsh(moment).clamp(min=0) + eps.unsqueeze(-1)).sqrt().sum(-1)
    return root
