"""Inverse roots of matrices whose roots are known, by every solver: errors, steps, seconds and bytes."""

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

from caspr_cli.bench.root_errors import before, logarithmic, spectral
from caspr_cli.optim.refresh import ACCEPTED
from caspr_cli.optim.roots import (
    Damping,
    Root,
    bound,
    eigendecomposition,
    eigh_root,
    newton_root,
    newton_steps,
    residual,
    rotated,
    warm_root,
)
from caspr_cli.optim.schedule import EIGH_FLOPS
from caspr_cli.optim.symmetric import packed_length
from caspr_cli.theory.rounding import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    TF32,
    Precision,
    RoundedProducts,
    one_rounding,
    rounded,
    storage,
    worst_case,
)

PATIENCE, REPEATS = 0.2, 3  # seconds after which nothing is timed again, and how often it is at most
SQUARE = {"eigh": 3, "newton": 9, "warm": 4}  # d x d matrices that a solver holds at once beside S and its basis


@dataclass(frozen=True)
class Solver:
    """One way to a root.

    Args:
        precision: whose roundings its error is made of.
        stored: the type in which S is given to it.
        method: ``eigh``, ``newton`` or ``warm``.
    """

    name: str
    precision: Precision
    stored: Precision
    method: str
    exact: bool = False  # in float64 whatever S is stored in: its error is that of storing

    def matrix(self, S: Tensor) -> Tensor:
        """S ``[1, d, d]`` in float64 as this solver sees it."""
        if self.stored is BFLOAT16:
            return rounded(S, BFLOAT16.bits)
        return S if self.stored is FLOAT64 else S.float() if not self.exact else S.float().double()

    def run(self, S: Tensor, basis: Tensor, damping: Damping, p: int) -> Root:
        """Of what :meth:`matrix` gave; ``basis`` ``[1, d, d]``: float32 eigenvectors of S a sample ago."""
        if self.method == "eigh":
            return eigh_root(S, damping, p)
        if self.method == "warm":
            return warm_root(rotated(S, basis), basis, damping, p)
        return newton_root(S, damping, p)

    def products(self) -> AbstractContextManager[object]:
        """In it products are of its precision."""
        return RoundedProducts(TF32.bits) if self.precision is TF32 else nullcontext()


SOLVERS = (
    Solver("stored in float32", FLOAT32, FLOAT32, "eigh", exact=True),
    Solver("stored in bfloat16", BFLOAT16, BFLOAT16, "eigh", exact=True),
    Solver("eigh, float64", FLOAT64, FLOAT64, "eigh"),
    Solver("newton, float64", FLOAT64, FLOAT64, "newton"),
    Solver("eigh, float32", FLOAT32, FLOAT32, "eigh"),
    Solver("newton, float32", FLOAT32, FLOAT32, "newton"),
    Solver("warm, float32", FLOAT32, FLOAT32, "warm"),
    Solver("newton, TF32 products", TF32, FLOAT32, "newton"),
)
OURS = tuple(solver for solver in SOLVERS if solver.name.endswith("float32") and not solver.exact)


@dataclass(frozen=True)
class Case:
    """One root."""

    solver: Solver
    p: int
    d: int
    condition: float  # of S, before damping
    eps: float  # relative
    seed: int
    error: float  # ||A - S~^(-1/p)|| / ||S~^(-1/p)||, Frobenius, with the shift that the solver says it has added
    amplified: float  # the error that a backward error of one rounding, ||E||_2 = u ||S||_2, is expected to make
    predicted: float | None  # that storing S makes, where it is all there is
    ratio: float  # the error in the 2-norm over the worst that ||E||_2 allows; 0 where that is infinite
    finite: bool
    accepted: bool  # by the optimizer
    residual: float  # ||A^(p/2) S~ A^(p/2) - I||_F / d^(1/2), estimated as the optimizer does
    coupled: float | None  # the least of Newton's own max |M - I|
    steps: int | None  # of Newton
    forecast: int  # steps that the library takes to be enough

    @property
    def roundings(self) -> float:
        """c, see :mod:`caspr_cli.theory.rounding`."""
        return self.error / self.amplified


class Coupled(TorchFunctionMode):
    """Watches :func:`newton_root`: counts its steps, and keeps the least of max |M - I|, by which it stops."""

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


@dataclass(frozen=True)
class Matrix:
    """S = Q diag(values) Q^T of d rows with a known spectrum, evenly spaced in the logarithm, and its past."""

    values: Tensor  # [d], from 1 to 1 / condition
    Q: Tensor  # [d, d]
    S: Tensor  # [1, d, d]
    basis: Tensor  # [1, d, d], float32: of S before the last sample

    @classmethod
    def drawn(cls, d: int, condition: float, seed: int) -> Matrix:
        generator = torch.Generator().manual_seed(seed)
        values, Q = logarithmic(d, condition, generator)
        past = before(values, Q, generator).float().unsqueeze(0)
        return cls(values, Q, spectral(values, Q).unsqueeze(0), eigendecomposition(past)[1])


def solved(solver: Solver, matrix: Matrix, condition: float, eps: float, p: int, seed: int) -> Case:
    """What a solver makes of a matrix."""
    seen = solver.matrix(matrix.S)
    with solver.products(), Coupled() as watch:
        root = solver.run(seen, matrix.basis, lambda largest: eps * largest, p)
    damped, A = matrix.values + float(root.shift), root.A[0].double()
    expected = (matrix.Q * damped.pow(-1 / p)) @ matrix.Q.mT
    finite, off = bool(torch.isfinite(A).all()), A - expected
    left = float(residual(seen, root, p)) if finite else math.inf
    allowed = float(bound(root.condition, seen.dtype, ACCEPTED))
    newton = solver.method == "newton"
    return Case(
        solver,
        p,
        len(damped),
        condition,
        eps,
        seed,
        error=float(off.norm() / expected.norm()) if finite else math.inf,
        amplified=one_rounding(damped, solver.precision, p),
        predicted=storage(matrix.values, solver.stored, p, eps) if solver.exact else None,
        ratio=_of_worst(off, expected, seen[0], matrix.S[0], damped, eps, p) if finite and solver.exact else 0.0,
        finite=finite,
        accepted=finite and left <= allowed,
        residual=left,
        coupled=watch.least if newton and watch.steps else None,
        steps=watch.steps if newton else None,
        forecast=newton_steps(float(damped.max() / damped.min()), p),
    )


def _of_worst(off: Tensor, expected: Tensor, seen: Tensor, S: Tensor, damped: Tensor, eps: float, p: int) -> float:
    """The error in the 2-norm in units of the most that theory allows for S + E as the solver sees it.

    Damping follows the largest eigenvalue, which E moves by no more than its norm; negative eigenvalues count as zero,
    which moves what is seen by its norm once more.
    """
    delta = float(torch.linalg.matrix_norm(seen - S, 2) / damped.max())
    clamped = float(torch.linalg.eigvalsh(seen)[0]) < 0
    most = worst_case(delta * (1 + eps + clamped), float(damped.max() / damped.min()), p)
    return float(torch.linalg.matrix_norm(off, 2) / torch.linalg.matrix_norm(expected, 2)) / most


# ---- what it costs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of one root of d rows in float32."""

    solver: Solver
    d: int
    milliseconds: float
    predicted_ms: float  # from FLOPs, at the rate of a product of this size
    flops: float
    megabytes: float  # that are held at once beside S and what is kept from before
    predicted_mb: float
    steps: int | None


def flops_of(method: str, d: int, p: int, steps: int) -> float:
    """2 for a multiply and an add: of a decomposition what takes as long (``EIGH_FLOPS`` d^3); of Newton, in each step,
    two products and those that make a power p by squaring; of a warm start two products, and two whose result is known
    to be symmetric, of which panels of one triangle are computed."""
    if method == "eigh":
        return float(EIGH_FLOPS) * d**3
    if method == "newton":
        return 2.0 * d**3 * steps * newton_products(p)
    return 2.0 * d**3 * (2 + 2 * packed_length(d) / d**2)


def newton_products(p: int) -> int:
    """In a step of Newton: log2(p) squarings, products of their results, and two for M and H."""
    return p.bit_length() - 1 + p.bit_count() - 1 + 2


def cost_of(solver: Solver, matrix: Matrix, eps: float, p: int) -> Cost:
    """Measured on as many threads as torch has."""
    seen, d = solver.matrix(matrix.S), len(matrix.values)

    def run() -> Root:
        return solver.run(seen, matrix.basis, lambda largest: eps * largest, p)

    with Coupled() as watch:
        run()
    steps = watch.steps or newton_steps(1 + 1 / eps, p)
    flops, bytes_held = flops_of(solver.method, d, p, steps), peak_bytes(run)
    return Cost(
        solver,
        d,
        milliseconds=1e3 * least_seconds(run),
        predicted_ms=1e3 * flops / product_rate(d),
        flops=flops,
        megabytes=bytes_held / 1e6,
        predicted_mb=SQUARE[solver.method] * d * d * seen.element_size() / 1e6,
        steps=watch.steps or None,
    )


def product_rate(d: int) -> float:
    """FLOPs a second of float32 products of d x d."""
    X, Y, out = torch.randn(1, d, d), torch.randn(1, d, d), torch.empty(1, d, d)
    count = max(1, 2**24 // d**3)

    def run() -> None:
        for _ in range(count):
            torch.bmm(X, Y, out=out)

    run()
    return 2.0 * count * d**3 / least_seconds(run)


def least_seconds(run: Callable[[], object]) -> float:
    """Of this process's processors, in the shortest of a few runs, or in one where it takes long: on one thread that is
    the time it takes where nothing else runs."""
    taken: list[float] = []
    while len(taken) < REPEATS or (len(taken) < 50 and sum(taken) < PATIENCE / 4):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
        if sum(taken) > PATIENCE:
            break
    return min(taken)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that torch holds at once for what happens in ``run``, LAPACK's workspace included."""
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = most = 0
    for _, change in changes:
        live += change
        most = max(most, live)
    return most


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler writes to the terminal, from below Python, of devices that are not there."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
