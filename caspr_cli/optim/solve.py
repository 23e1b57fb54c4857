"""Inverse roots of many matrices by a chosen solver: on all threads, and whatever happens to one of them."""

from __future__ import annotations

import math
import os
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from caspr_cli.optim.combine import root_exponent
from caspr_cli.optim.options import Group
from caspr_cli.optim.roots import (
    POWER_ACCURACY,
    Root,
    basis,
    damping_shift,
    eigh_root,
    newton_root,
    newton_steps,
    residual,
    scaled_newton_root,
    scaled_steps,
)
from caspr_cli.optim.schedule import EIGH_FLOPS

# Numbers in the matrices that one thread works on at once: what becomes of them stays in its cache.
PIECE = 2**20


def choose(solver: str, device: torch.device) -> str:
    """Return the solver that ``"auto"`` stands for.

    On a CPU an eigendecomposition takes as long as 7 to 13 products of d x d (measured on two cores, d from 256 to
    1024), and coupled Newton needs four for each of its 8 to 25 steps. On a GPU (not measured here) torch decomposes
    batches of more than 32 rows one by one, and waits after each batch to see whether it has converged; coupled Newton
    is batched, and nobody waits.
    """
    if solver != "auto":
        return solver
    return "newton" if device.type == "cuda" else "eigh"


def newton_products(p: int) -> int:
    """Return the products in a step of Newton: log2(p) squarings, products of their results, and two for M and H."""
    return p.bit_length() - 1 + p.bit_count() - 1 + 2


def is_scaled(device: torch.device, condition: float) -> bool:
    """Whether Newton is :func:`scaled_newton_root`: each product takes longest on a GPU, and with fewer steps there is
    less to ask; on a CPU it asks when to stop."""
    return device.type != "cpu" and math.isfinite(condition)


def root_flops(group: Group, axes: int, device: torch.device) -> float:
    """Return the FLOPs of a root over d^3, in units of products, for blocks of so many axes with statistics.

    They are those of an eigendecomposition, as a basis is counted, too, or Newton's steps times its products.
    """
    if group["measured"] or choose(group["solver"], device) == "eigh":
        return EIGH_FLOPS
    p = root_exponent(group["order"], axes, group["exponent"])
    condition = 1 + 1 / group["eps"] if group["damping"] == "relative" else math.inf
    if is_scaled(device, condition):  # its first step has one product less, its last has that one alone
        steps = len(scaled_steps(POWER_ACCURACY / condition, p, 8 * torch.finfo(torch.float32).eps)) - 1
    else:
        steps = newton_steps(condition, p)
    return 2.0 * steps * newton_products(p)


@dataclass
class Problem:
    """The damped statistics of K blocks along one axis."""

    S: Tensor  # [K, d, d]
    unit: Tensor  # [K]
    eps: Tensor  # [K]
    damping: str
    p: int  # 0: their eigenvectors are wanted, no roots
    condition: float = math.inf  # at least that of each damped matrix
    last: Tensor | None = None  # [K, d, d], the last eigenvectors, for an iteration from them

    def take(self, at: slice | Tensor) -> Problem:
        """Return the problem of some of the matrices."""
        last = None if self.last is None else self.last[at]
        return replace(self, S=self.S[at], unit=self.unit[at], eps=self.eps[at], last=last)

    @staticmethod
    def join(parts: list[Problem]) -> Problem:
        """Return the problem of all matrices of problems that differ in nothing else."""
        if len(parts) == 1:
            return parts[0]
        S, unit, eps = (torch.cat([getattr(one, name) for one in parts]) for name in ("S", "unit", "eps"))
        last = [one.last for one in parts if one.last is not None]
        return replace(parts[0], S=S, unit=unit, eps=eps, last=torch.cat(last) if last else None)

    @property
    def cost(self) -> int:
        """A number in proportion to the time of its decompositions."""
        return len(self.S) * self.S.shape[-1] ** 3

    def shift(self, largest: Tensor) -> Tensor:
        """Return, for largest eigenvalues ``[K]``, what is added to the diagonal."""
        return damping_shift(largest, self.unit, self.eps, self.damping)


@dataclass
class Solution:
    """Roots of K matrices, and their residuals."""

    root: Root
    residual: Tensor  # [K]

    @staticmethod
    def join(parts: list[Solution]) -> Solution:
        if len(parts) == 1:
            return parts[0]
        roots: list[dict[str, Any]] = [vars(part.root) for part in parts]
        columns = {name: [root[name] for root in roots] for name in roots[0]}
        joined: dict[str, Any] = {name: c[0] if c[0] is None else torch.cat(c) for name, c in columns.items()}
        return Solution(Root(**joined), torch.cat([part.residual for part in parts]))

    def split(self, sizes: list[int]) -> list[Solution]:
        """Return the solutions of these numbers of matrices, one after the other."""
        root = self.root
        values = root.values.split(sizes) if root.values is not None else [None] * len(sizes)
        columns = (x.split(sizes) for x in (root.A, root.shift, root.largest, root.condition))
        parts = zip(zip(*columns, values, strict=True), self.residual.split(sizes), strict=True)
        return [Solution(Root(*x), r) for x, r in parts]


def solve(problem: Problem, solver: str) -> Solution:
    """Return the inverse roots of all matrices of a problem; ``solver`` may be ``"auto"``.

    Raises nothing but for want of memory: where a solver raises, the matrix at fault is found and given to eigh in
    float64; where that raises too, its root is NaN.
    """
    S = problem.S
    try:
        root = SOLVERS[choose(solver, S.device)](problem)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if (middle := len(S) // 2) > 0:
            halves = [problem.take(slice(0, middle)), problem.take(slice(middle, len(S)))]
            return Solution.join([solve(half, solver) for half in halves])
        root = _in_float64(problem)
    return Solution(root, residual(S, root, problem.p))


def _in_float64(problem: Problem) -> Root:
    S = problem.S
    try:
        root = _eigh(replace(problem, S=S.double()))
        return replace(root, A=root.A.to(S.dtype))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        nothing = torch.full_like(problem.unit, torch.nan, dtype=torch.float64)
        values = None if problem.p else torch.full_like(S[:, 0], torch.nan, dtype=torch.float64)
        return Root(torch.full_like(S, torch.nan), nothing, nothing, nothing, values)


def _eigh(problem: Problem) -> Root:
    S, p = problem.S, problem.p
    return eigh_root(S, problem.shift, p) if p else basis(S, problem.shift, None)


def _newton(problem: Problem) -> Root:
    S, p = problem.S, problem.p
    if p == 0:
        return basis(S, problem.shift, problem.last)
    root = scaled_newton_root if is_scaled(S.device, problem.condition) else newton_root
    return root(S, problem.shift, p, problem.condition)


SOLVERS = {"eigh": _eigh, "newton": _newton}


def solve_all(problems: list[Problem], solver: str) -> list[Solution]:
    """Return the inverse roots of all matrices of all problems; ``solver`` may be ``"auto"``.

    On another device those of one size and power are one batch: a launch for all of them.

    On a CPU each matrix has one thread, the largest first. LAPACK's eigendecomposition gains little from a second: two
    at a time were 8 % faster at d = 1024 and 19 % at 512. And with two threads that wait for each other it takes many
    times as long where another process runs beside it. A single matrix has all threads.
    """
    if problems[0].S.device.type != "cpu":
        return _solve_in_batches(problems, solver)
    pieces: list[tuple[int, Problem]] = []
    threads = torch.get_num_threads()
    for i, problem in enumerate(problems):
        K, d = problem.S.shape[:2]
        size = max(1, min(PIECE // (d * d), math.ceil(K / threads)))
        pieces += [(i, problem.take(slice(start, start + size))) for start in range(0, K, size)]
    order = sorted(range(len(pieces)), key=lambda j: -pieces[j][1].cost)
    alone = len(pieces) <= 1 or threads == 1
    run = map if alone else _pool(threads).map
    solved = dict(zip(order, run(partial(solve, solver=solver), [pieces[j][1] for j in order]), strict=True))
    parts: list[list[Solution]] = [[] for _ in problems]
    for j, (i, _) in enumerate(pieces):
        parts[i].append(solved[j])
    return [Solution.join(found) for found in parts]


def _solve_in_batches(problems: list[Problem], solver: str) -> list[Solution]:
    """Return the solutions of problems, those that can be solved together in one batch each."""
    batches: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, one in enumerate(problems):
        key = one.S.shape[-1], one.S.dtype, one.S.device, one.damping, one.p, one.condition, one.last is None
        batches[key].append(i)
    solutions: dict[int, Solution] = {}
    for members in batches.values():
        parts = [problems[i] for i in members]
        found = solve(Problem.join(parts), solver).split([len(one.S) for one in parts])
        solutions |= zip(members, found, strict=True)
    return [solutions[i] for i in range(len(problems))]


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return workers that use one thread each.

    To set a thread's own number also sets what threads that start later begin with: all workers are started here, and
    that is put back. (A thread takes its number when it first asks for it.)
    """
    ready = threading.Barrier(threads)
    pool = ThreadPoolExecutor(threads, "caspr-roots", initializer=_use_one_thread)
    list(pool.map(lambda _: ready.wait(), range(threads)))
    torch.set_num_threads(threads)
    return pool


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has no threads but its own
