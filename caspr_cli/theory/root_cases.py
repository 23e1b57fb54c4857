"""Which roots ``caspr-verify roots`` looks at, and the constants that their errors come to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from caspr_cli.theory.solving import OURS, SOLVERS, Case, Cost, Matrix, Solver, cost_of, solved

CONDITIONS, QUICK_CONDITIONS = tuple(10.0**k for k in range(1, 13)), (1e1, 1e2, 1e4, 1e6, 1e8)
EXPONENTS = (2, 4, 6)  # of order 1, of CASPR and Shampoo, and of order 3
P = 4
ROWS, QUICK_ROWS = 128, 48
DAMPINGS = tuple(10.0**k for k in range(-12, -1))
ILL = 1e8  # the condition at which dampings are compared
SCALES = tuple(10.0**k for k in (-12, -8, -4, 0, 4))  # of largest eigenvalues, for absolute damping
ABSOLUTE = 1e-6
DEFAULT = 1e-6  # the library's damping, relative
SIZES, QUICK_SIZES = (16, 32, 64, 128, 256, 512, 1024), (16, 32, 64)
SIZED_CONDITION = 1e6

SMALL = 0.02  # predicted errors up to here are in the reach of a first order
ASYMPTOTIC = 1e3  # conditions from here on are what decides an error, and not the rounding of the result itself

Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """All that is measured."""

    conditions: list[Case]  # without damping
    default: list[Case]  # with the library's
    dampings: list[Case]  # at the condition ILL, p = P
    scales: list[Case]  # absolute damping: eps is what it is relative to the largest eigenvalue
    costs: list[Cost]


def measured(quick: bool, seeds: Sequence[int], say: Say) -> Found:
    """On one thread, as each matrix has in the optimizer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        conditions, d = (QUICK_CONDITIONS, QUICK_ROWS) if quick else (CONDITIONS, ROWS)
        say("errors by condition and exponent")
        bare = list(_cases(d, conditions, (0.0,), EXPONENTS, seeds))
        say("errors with the default damping")
        default = list(_cases(d, conditions, (DEFAULT,), (P,), seeds))
        say("errors by damping")
        dampings = list(_cases(d, (ILL,), DAMPINGS, (P,), seeds))
        scales = list(_cases(d, (ILL,), [ABSOLUTE / scale for scale in SCALES], (P,), seeds))
        return Found(bare, default, dampings, scales, list(_costs(QUICK_SIZES if quick else SIZES, seeds[0], say)))
    finally:
        torch.set_num_threads(threads)


def _cases(
    d: int, conditions: Sequence[float], dampings: Sequence[float], exponents: Sequence[int], seeds: Sequence[int]
) -> Iterator[Case]:
    for condition in conditions:
        for seed in seeds:
            matrix = Matrix.drawn(d, condition, seed)
            for p in exponents:
                for eps in dampings:
                    yield from (solved(solver, matrix, condition, eps, p, seed) for solver in SOLVERS)


def _costs(sizes: Sequence[int], seed: int, say: Say) -> Iterator[Cost]:
    for d in sizes:
        say(f"time and memory: {d} rows")
        matrix = Matrix.drawn(d, SIZED_CONDITION, seed)
        yield from (cost_of(solver, matrix, DEFAULT, P) for solver in OURS)


# ---- what the numbers come to ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constant:
    """The backward error of a solver, in roundings, over conditions and exponents; and what rounding its result "
    "costs."""

    solver: Solver
    least: float
    middle: float
    most: float
    count: int
    floor: float  # error at the least condition, in units of u


def constants(cases: Iterable[Case]) -> list[Constant]:
    """Of solvers whose errors are their own; from cases where the condition decides and the error is small."""
    found, every = [], list(cases)
    for solver in SOLVERS:
        own = [case for case in every if case.solver is solver]
        clear = [case for case in own if case.condition >= ASYMPTOTIC and case.error <= SMALL]
        if solver.exact or solver.method == "warm" or not clear:
            continue
        values = sorted(case.roundings for case in clear)
        least = min(case.condition for case in own)
        floor = median(case.error for case in own if case.condition == least) / solver.precision.unit
        found.append(Constant(solver, values[0], median(values), values[-1], len(values), floor))
    return found


def typical(cases: Iterable[Case]) -> float:
    """The geometric mean of errors over seeds; infinite where one is."""
    errors = [case.error for case in cases]
    return math.inf if math.inf in errors else math.exp(sum(map(math.log, errors)) / len(errors))


def chosen(cases: Iterable[Case], solver: str, p: int = P) -> dict[float, list[Case]]:
    """The cases of a solver by condition."""
    found: dict[float, list[Case]] = {}
    for case in cases:
        if case.solver.name == solver and case.p == p:
            found.setdefault(case.condition, []).append(case)
    return found
