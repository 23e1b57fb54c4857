"""Inverse roots of matrices whose roots are known, by every solver: errors, steps, seconds and bytes.

A matrix S has eigenvalues from 1 to 1 / condition, evenly spaced in the logarithm. It is known in float64; a solver
sees S as its type stores it, so that a solver without any error of its own still has that of storing S.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from caspr_cli.optim.roots import Root, eigh_root, newton_root
from caspr_cli.theory.precision import BFLOAT16, FLOAT32, FLOAT64, TF32, RoundedProducts, rounded

P = 4  # roots of CASPR at its default order
TIMED, LEAST_RUNS, MOST_RUNS = 0.05, 3, 50  # seconds that are spent on timing something short, and repetitions

# ---- solvers and matrices ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """S = Q diag(values) Q^T ``[d, d]`` with a known spectrum."""

    values: Tensor  # [d], from 1 to 1 / condition
    Q: Tensor  # [d, d]
    S: Tensor  # [1, d, d], symmetric to the last bit

    @classmethod
    def drawn(cls, d: int, condition: float, seed: int) -> Matrix:
        generator = torch.Generator().manual_seed(seed)
        values = torch.logspace(0, -math.log10(condition), d, dtype=torch.float64)
        Q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
        S = (Q * values) @ Q.mT
        return cls(values, Q, ((S + S.mT) / 2).unsqueeze(0))

    def root(self, shift: float, p: int) -> Tensor:
        """Return (S + shift I)^(-1/p) ``[d, d]``, exactly."""
        found: Tensor = (self.Q * (self.values + shift).pow(-1 / p)) @ self.Q.mT
        return found


@dataclass(frozen=True)
class Solver:
    name: str
    bits: int  # of the significands whose roundings its error is made of
    stored: int  # those of the type in which S is given to it
    method: str  # `eigh` or `newton`
    exact: bool = False  # whether it computes in float64 whatever S is stored in; its error is then that of storing S

    def matrix(self, S: Tensor) -> Tensor:
        """Return S ``[1, d, d]``, float64, as this solver sees it."""
        seen = rounded(S, self.stored)
        return seen if self.exact or self.stored == FLOAT64 else seen.float()

    def run(self, S: Tensor, eps: float, p: int) -> Root:
        """Return the root of what :meth:`matrix` gave, with a damping of ``eps``, relative."""
        return {"eigh": eigh_root, "newton": newton_root}[self.method](S, lambda largest: eps * largest, p)

    def products(self) -> AbstractContextManager[object]:
        """Return a context in which products are of this solver's precision."""
        return RoundedProducts(TF32) if self.bits == TF32 else nullcontext()


SOLVERS = (
    Solver("stored in float32", FLOAT32, FLOAT32, "eigh", exact=True),
    Solver("stored in bfloat16", BFLOAT16, BFLOAT16, "eigh", exact=True),
    Solver("eigh, float64", FLOAT64, FLOAT64, "eigh"),
    Solver("newton, float64", FLOAT64, FLOAT64, "newton"),
    Solver("eigh, float32", FLOAT32, FLOAT32, "eigh"),
    Solver("newton, float32", FLOAT32, FLOAT32, "newton"),
    Solver("newton, TF32 products", TF32, FLOAT32, "newton"),
)
BY_NAME = {solver.name: solver for solver in SOLVERS}
MATRICES_HELD = {"eigh": 3, "newton": 9}  # of d x d at once, beside S
OURS = tuple(solver for solver in SOLVERS if solver.name.endswith("float32") and not solver.exact)


class NewtonWatch(TorchFunctionMode):
    """Counts the steps of :func:`newton_root`, and keeps the least of max |M - I|, by which it stops."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.least = 0, math.inf
        self._power: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.linalg.matrix_power:
            self.steps, self._power = self.steps + 1, result
        elif func is torch.bmm and self._power is not None and args[0] is self._power:
            off = float((result.double() - torch.eye(result.shape[-1], dtype=torch.float64)).abs().amax())
            self.least = min(self.least, off) if math.isfinite(off) else self.least
        return result


# ---- time and memory ---------------------------------------------------------------------------------------------


@contextmanager
def threads(count: int) -> Iterator[None]:
    own = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(own)


def least_seconds(run: Callable[[], object], now: Callable[[], float] = time.process_time) -> float:
    """Return the seconds of the shortest of a few runs, or of a single run that takes long.

    The default clock counts the processors of this process: on one thread, the time where nothing else runs.
    """
    taken: list[float] = []
    while len(taken) < LEAST_RUNS or (len(taken) < MOST_RUNS and sum(taken) < TIMED):
        start = now()
        run()
        taken.append(now() - start)
        if sum(taken) > 4 * TIMED:
            break
    return min(taken)


def product_rate(d: int) -> float:
    """Return the FLOPs in a second of float32 products of d x d."""
    X, Y, out = torch.randn(1, d, d), torch.randn(1, d, d), torch.empty(1, d, d)
    count = max(1, 2**24 // d**3)

    def run() -> None:
        for _ in range(count):
            torch.bmm(X, Y, out=out)

    run()
    return 2.0 * count * d**3 / least_seconds(run)


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes that torch holds at once for what happens in ``run``, LAPACK's workspace included."""
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()  # the only place that has the order of allocations
    live = most = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += change
        most = max(most, live)
    return most


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard what the profiler writes to the terminal, from below Python, about devices that are not there."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
