"""How exact the roots are that the solvers find in float32: a table of S~^(-1/4) at many conditions and dampings.

A matrix S has eigenvalues from 1 to 1 / condition, evenly spaced in the logarithm. It is known in float64; the solvers
see what is left of it in float32. All errors are against the root of the float64 matrix at the same relative damping,
so that a solver without any error of its own still has that of storing S: ``eigh64`` tells it. (numpy decomposes
float32 in float64 and rounds: what it calls a float32 root is nearly ``eigh64``, not ``eigh32``.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from textwrap import wrap
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from caspr_cli.optim.roots import (
    Damping,
    Root,
    eigendecomposition,
    eigh_root,
    newton_root,
    residual,
    rotated,
    warm_root,
)

P = 4  # roots of CASPR at its default order
CONDITIONS = (1e2, 1e4, 1e6, 1e8, 1e12)
DAMPINGS = (1e-4, 1e-6, 1e-8, 1e-12)  # relative to the largest eigenvalue
FRESH = 0.01  # the weight of a new sample in the statistics since the decomposition that a warm start takes
REPEATS, PATIENCE = 3, 0.1  # of what is timed, of which the least counts; seconds after which there is no other

LINE = 118  # characters
KNOWN = 1e-2  # error of eigh64 up to which float32 statistics tell their root
ILL = 1e6  # condition from which on roundings matter more than the age of a basis

LEGEND = """\
error      ||A - S~^(-1/4)||_F / ||S~^(-1/4)||_F, S~ = S + eps lambda_max I of the float64 matrix S; solvers see float32
residual   ||A^2 S~ A^2 - I||_F / sqrt(d) of the root A with the float32 matrix, computed in float64
steps      of the Newton iteration, counted
eigh32, eigh64, newton32: from nothing, in that precision; warm32: from float32 eigenvectors of the statistics as they
           were before the last sample, whose weight is {fresh:g}"""


@dataclass(frozen=True)
class RootError:
    """What one solver makes of one matrix."""

    condition: float  # of S
    eps: float  # damping, relative to the largest eigenvalue
    solver: str
    error: float  # relative, Frobenius norm, against the root of the float64 matrix
    own_error: float  # the same against the float64 root of the matrix as float32 has it: the solver's own
    residual: float  # with the float32 matrix, in float64
    iterations: int | None  # of Newton
    milliseconds: float


class NewtonSteps(TorchFunctionMode):
    """Counts the steps of :func:`newton_root` within it: each raises one batch of matrices to a power."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func is torch.linalg.matrix_power
        return func(*args, **(kwargs or {}))


def logarithmic(d: int, condition: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[d]``, from 1 to 1 / condition, and orthogonal eigenvectors ``[d, d]``, in float64."""
    values = torch.logspace(0, -math.log10(condition), d, dtype=torch.float64)
    return values, torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q


def spectral(values: Tensor, Q: Tensor) -> Tensor:
    """Q diag(values) Q^T, ``[d, d]``, symmetric to the last bit."""
    S = (Q * values) @ Q.mT
    return (S + S.mT) / 2


def before(values: Tensor, Q: Tensor, generator: torch.Generator) -> Tensor:
    """S_old ``[d, d]``: S = (1 - FRESH) S_old + FRESH G G^T / d, for a sample G of d columns of covariance S."""
    d = len(values)
    G = Q @ (values.sqrt().unsqueeze(1) * torch.randn(d, d, generator=generator, dtype=torch.float64))
    S_old = (spectral(values, Q) - FRESH / d * G @ G.mT) / (1 - FRESH)
    return (S_old + S_old.mT) / 2


def root_error_table(
    d: int = 256,
    conditions: Sequence[float] = CONDITIONS,
    dampings: Sequence[float] = DAMPINGS,
    repeats: int = REPEATS,
) -> list[RootError]:
    """Each solver at each condition and damping, in this order, on matrices of d rows; always the same matrices."""
    rows = []
    for condition in conditions:
        generator = torch.Generator().manual_seed(0)
        values, Q = logarithmic(d, condition, generator)
        stored = spectral(values, Q).float()
        basis = eigendecomposition(before(values, Q, generator).float().unsqueeze(0))[1]
        for eps in dampings:
            expected = Q * (values + eps).pow(-1 / P) @ Q.mT
            seen = _root64(stored.double(), eps)
            for name, solve in _solvers(stored.unsqueeze(0), basis, eps).items():
                with NewtonSteps() as steps:
                    root = solve()
                rows.append(
                    RootError(
                        condition=condition,
                        eps=eps,
                        solver=name,
                        error=_distance(root.A[0], expected),
                        own_error=_distance(root.A[0], seen),
                        residual=_residual64(stored, root),
                        iterations=steps.count or None,
                        milliseconds=1e3 * _least_seconds(solve, repeats),
                    )
                )
    return rows


def _solvers(S: Tensor, basis: Tensor, eps: float) -> dict[str, Callable[[], Root]]:
    """By name, for S and the old eigenvectors ``[1, d, d]`` in float32."""

    def damping(largest: Tensor) -> Tensor:
        return eps * largest

    return {
        "eigh32": lambda: eigh_root(S, damping, P),
        "eigh64": lambda: eigh_root(S.double(), damping, P),
        "newton32": lambda: newton_root(S, damping, P),
        "warm32": lambda: _warm(S, basis, damping),
    }


def _warm(S: Tensor, basis: Tensor, damping: Damping) -> Root:
    return warm_root(rotated(S, basis), basis, damping, P)


def _root64(S: Tensor, eps: float) -> Tensor:
    """``[d, d]``: rounding to float32 leaves negative eigenvalues, which count as zero in all solvers that see them."""
    values, Q = torch.linalg.eigh(S)
    root: Tensor = Q * (values.clamp(min=0) + eps * values[-1]).pow(-1 / P) @ Q.mT
    return root


def _distance(A: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.matrix_norm(A.double() - expected) / torch.linalg.matrix_norm(expected))


def _residual64(S: Tensor, root: Root) -> float:
    return float(residual(S.double().unsqueeze(0), Root(root.A.double(), root.shift, root.largest, root.condition), P))


def _least_seconds(run: Callable[[], Root], repeats: int) -> float:
    """Once is enough where it takes long: two threads that wait for each other do, beside another process."""
    taken: list[float] = []
    while len(taken) < repeats and sum(taken) < PATIENCE:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def format_table(rows: list[RootError]) -> list[str]:
    """Aligned lines: one for each condition and damping, with all solvers side by side; then what they show."""
    solvers = list(dict.fromkeys(row.solver for row in rows))
    shown = {"error": solvers, "residual": [name for name in solvers if name != "eigh64"], "steps": ["newton32"]}
    width = max(len(name) for name in solvers) + 2
    head = f"{'condition':>9} {'eps':>7}"
    over = " " * len(head)
    for quantity, names in shown.items():
        over += "  " + quantity.rjust(width) + " " * (width * (len(names) - 1))
        head += "  " + "".join(name.rjust(width) for name in names)
    lines = [over.rstrip(), head]
    for condition, eps in dict.fromkeys((row.condition, row.eps) for row in rows):
        of = {row.solver: row for row in rows if (row.condition, row.eps) == (condition, eps)}
        line = f"{condition:>9.0e} {eps:>7.0e}"
        line += "  " + "".join(f"{of[name].error:{width}.1e}" for name in shown["error"])
        line += "  " + "".join(f"{of[name].residual:{width}.1e}" for name in shown["residual"])
        lines.append(line + "  " + "".join(f"{of[name].iterations or 0:{width}d}" for name in shown["steps"]))
    return [*lines, "", *LEGEND.format(fresh=FRESH).splitlines(), "", *findings(rows)]


def findings(rows: list[RootError]) -> list[str]:
    """What the rows say, a few sentences."""
    by = {(row.condition, row.eps, row.solver): row for row in rows}
    cells = list(dict.fromkeys((row.condition, row.eps) for row in rows))
    solvers = list(dict.fromkeys(row.solver for row in rows))
    known = [cell for cell in cells if by[*cell, "eigh64"].error <= KNOWN]
    ill = [cell for cell in known if cell[0] >= ILL]
    times = ", ".join(f"{name} {median(r.milliseconds for r in rows if r.solver == name):.3g}" for name in solvers)
    found = [f"A root took (median, milliseconds) {times}."]

    def ratios(name: str, other: str, field: str, among: list[tuple[float, float]]) -> list[float]:
        return sorted(getattr(by[*cell, name], field) / getattr(by[*cell, other], field) for cell in among)

    if known:
        errors = [by[*cell, "eigh64"].error for cell in known]
        times_stored = {name: ratios(name, "eigh64", "error", known) for name in solvers if name != "eigh64"}
        several = ", ".join(f"{name} {median(r):.2g} ({r[0]:.2g} to {r[-1]:.2g})" for name, r in times_stored.items())
        found.append(
            f"In {len(known)} of {len(cells)} lines float32 statistics tell their root to {KNOWN:.0%}: to store them"
            f" costs an error of {min(errors):.0e} to {max(errors):.0e} (eigh64). The errors of the others in units of"
            f" it, median and range: {several}."
        )
    if ill:
        parts = [
            f"its {field} is the smaller one in {sum(x < 1 for x in r)} ({r[0]:.2g} to {r[-1]:.2g} of the other)"
            for field in ("error", "residual")
            if (r := ratios("warm32", "eigh32", field, ill))
        ]
        found.append(
            f"A warm start against a fresh eigh32, in the {len(ill)} of these lines with a condition of {ILL:.0e}"
            f" or more: {' and '.join(parts)}."
        )
    return [line for sentence in found for line in wrap(sentence, LINE)]


def main_table(d: int = 256, threads: int | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows as they go into a JSON file, and the lines to print.

    Args:
        d: rows of the matrices.
        threads: of torch while it runs; if not given one, as each matrix has in the optimizer.
    """
    own = torch.get_num_threads()
    torch.set_num_threads(threads or 1)
    try:
        rows = root_error_table(d)
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(own)
    title = (
        f"Roots S~^(-1/{P}) of {d} x {d} matrices, {used} thread{'s' if used > 1 else ''}, torch {torch.__version__}"
    )
    return [asdict(row) | {"d": d, "threads": used} for row in rows], [title, "", *format_table(rows)]
