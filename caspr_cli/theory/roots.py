"""``caspr-verify roots``: how exact are inverse roots, what do they cost, and which damping do they need?

The questions of reviewers on complexity, stability, the choice of damping and low precision, a table each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from caspr_cli.report.answer import Answer
from caspr_cli.theory import roots_shown as shown
from caspr_cli.theory.root_cases import (
    ABSOLUTE,
    DEFAULT,
    EXPONENTS,
    ILL,
    SCALES,
    SMALL,
    Found,
    P,
    Say,
    chosen,
    constants,
    measured,
    typical,
)
from caspr_cli.theory.rounding import TF32
from caspr_cli.theory.solving import OURS, SOLVERS, SQUARE, Case, Cost, Solver

QUESTION = "How exact are the inverse roots, at what cost, and how much damping do they need in which precision?"
GOOD = 1e-2  # an error that an update does not notice
LEAST = 1e-12  # what float64, in which roots are compared, tells
WITHIN = 2.0  # a factor

HOLDS = {
    "storage": f"storing: measured errors are within a factor of {WITHIN:g} of what a first order predicts, without "
    "any fit",
    "worst": "the error in the 2-norm is at most (δκ/p)(1 − δκ)^(−1−1/p), δ = ‖E‖₂/‖S‖₂",
    "steps": "Newton takes no more steps than are forecast from condition and p",
    "memory": "solvers hold as many d × d matrices as was counted in their code (within 10 %, d of 128 or more)",
}


def answer(*, quick: bool = False, seed: int = 0, seeds: int = 3, say: Say = lambda text: None) -> Answer:
    """Errors, steps, seconds and bytes of all solvers.

    Args:
        quick: one seed, small matrices: seconds.
        seed: the first of ``seeds``; each is another basis.
    """
    found = measured(quick, list(range(seed, seed + (1 if quick else seeds))), say)
    return Answer(
        name="roots",
        question=QUESTION,
        words=tuple(words(found)),
        sheets=shown.sheets(found, constants(found.conditions)),
        figures=shown.figures(found),
        holds=tuple((text, held) for text, held in zip(HOLDS.values(), _held(found), strict=True)),
        fails=tuple(_fails(found)),
    )


def slope(cases: Iterable[Case], p: int) -> float:
    """The power of the condition with which the error of storing in float32 grows, between 1e2 and 1e6."""
    by = {kappa: typical(of) for kappa, of in chosen(cases, SOLVERS[0].name, p).items() if 1e2 <= kappa <= 1e6}
    return math.log(by[max(by)] / by[min(by)]) / math.log(max(by) / min(by))


def _held(found: Found) -> Iterator[bool]:
    """In the order of HOLDS."""
    every = [*found.conditions, *found.default, *found.dampings, *found.scales]
    predicted = [case for case in every if case.predicted is not None and LEAST <= case.predicted <= SMALL]
    ratios = [case.error / case.predicted for case in predicted if case.predicted]
    yield all(1 / WITHIN <= ratio <= WITHIN for ratio in ratios)
    yield all(case.ratio <= 1 for case in every)
    newton = [case for case in every if case.steps is not None and case.solver.precision is not TF32]
    yield all(case.steps <= case.forecast for case in newton if case.steps is not None)
    yield all(abs(cost.megabytes / cost.predicted_mb - 1) <= 0.1 for cost in found.costs if cost.d >= 128)


def _fails(found: Found) -> Iterator[str]:
    powers = ", ".join(f"{slope(found.conditions, p):.2f} for p = {p}" for p in EXPONENTS)
    yield f"errors grow as κ^(1/p), the condition of the root: they grow as κ to the power {powers}"
    newton = [c for c in found.conditions if c.solver.name == "newton, float32" and c.coupled and c.error <= 1]
    worst = max(newton, key=lambda c: c.error / (c.coupled or 1))
    yield (
        f"Newton's own max|M − I| tells the error of its root: it was {worst.coupled:.0e} where the error is "
        f"{worst.error:.0e} (condition {worst.condition:.0e}, p = {worst.p})"
    )


# ---- what is said ------------------------------------------------------------------------------------------------


def words(found: Found) -> Iterator[str]:
    yield _errors_in_words(found)
    yield _law_in_words(found)
    yield _stability_in_words(found)
    yield _damping_in_words(found)
    yield _precision_in_words(found)
    yield _cost_in_words(found.costs)


def _reach(cases: Iterable[Case], solver: str) -> float | None:
    """The largest condition up to which errors are good."""
    good = None
    for condition, of in sorted(chosen(cases, solver).items()):
        if typical(of) > GOOD:
            break
        good = condition
    return good


def _errors_in_words(found: Found) -> str:
    def said(cases: Iterable[Case]) -> str:
        reach = {solver.name: _reach(cases, solver.name) for solver in SOLVERS}
        return ", ".join(f"{name} {'none' if k is None else f'{k:.0e}'}" for name, k in reach.items())

    most = max(case.condition for case in found.conditions)
    return (
        f"Roots S^(-1/{P}) of {found.conditions[0].d} rows have an error of at most {100 * GOOD:g} % up to these "
        f"conditions (of at most {most:.0e} that were tried), without damping: {said(found.conditions)}. With the "
        f"library's damping of {DEFAULT:g}, relative: {said(found.default)}."
    )


def _law_in_words(found: Found) -> str:
    cases = [c for c in found.conditions if c.predicted is not None and c.predicted <= SMALL]
    ratios = [c.error / c.predicted for c in cases if c.predicted]
    powers = [slope(found.conditions, p) for p in EXPONENTS]
    said = "; ".join(
        f"{c.solver.name} {c.middle:.2g} ({c.least:.2g} to {c.most:.2g})" for c in constants(found.conditions)
    )
    return (
        "What storing S in float32 or bfloat16 costs is predicted from the spectrum alone, without any fit: measured "
        f"over predicted is {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} cases. Errors grow with the "
        f"condition to the power {min(powers):.2f} to {max(powers):.2f}, for p from {EXPONENTS[0]} to {EXPONENTS[-1]} "
        "(the condition of the root is κ^(1/p)). The matrix whose root a solver finds is off from S by so many "
        f"roundings of its largest eigenvalue, median and range over conditions and exponents: {said}."
    )


def _stability_in_words(found: Found) -> str:
    every = [*found.conditions, *found.default, *found.dampings]
    ours = [c for c in every if c.solver in OURS]
    lost, broken = [c for c in ours if c.error > 0.1], [c for c in every if not c.finite]
    passed = sum(c.accepted for c in lost)
    damped = [c for c in lost if c.eps >= DEFAULT]
    newton = [c for c in every if c.steps is not None and c.solver.precision is not TF32]
    most = max((c.steps or 0) - c.forecast for c in newton)
    beyond = "never" if most <= 0 else f"up to {most}"
    return (
        f"Stability: {len(broken)} of {len(every):,} roots are not finite. Of the float32 roots that are off by more "
        f"than 10 % ({len(lost)}, {len(damped)} of them with a damping of {DEFAULT:g} or more), the optimizer's test "
        f"of the residual would have taken {passed} ({sum(c.accepted for c in damped)} of those): at high conditions "
        "it asks no more of a residual than rounding lets it be. Newton's iteration takes "
        f"{min(c.steps or 0 for c in newton)} to {max(c.steps or 0 for c in newton)} steps, {beyond} more than are "
        "forecast from condition and p."
    )


def _damping_in_words(found: Found) -> str:
    def least(solver: Solver) -> str:
        good = [eps for eps, of in _by_damping(found.dampings, solver).items() if typical(of) <= GOOD]
        return f"{solver.name} {f'{min(good):.0e}' if good else 'none of these'}"

    names = ("stored in float32", "eigh, float32", "newton, float32", "stored in bfloat16", "newton, TF32 products")
    said = ", ".join(least(solver) for solver in SOLVERS if solver.name in names)
    tiny, huge = SCALES[0], SCALES[-1]
    return (
        f"Damping: at a condition of {ILL:.0e} and p = {P}, an error of {100 * GOOD:g} % needs at least this much, "
        f"relative to the largest eigenvalue: {said}. An absolute damping of {ABSOLUTE:g} is relative to gradients: "
        f"{ABSOLUTE / tiny:.0e} where the largest eigenvalue is {tiny:.0e}, and {ABSOLUTE / huge:.0e} where it is "
        f"{huge:.0e}."
    )


def _by_damping(cases: Iterable[Case], solver: Solver) -> dict[float, list[Case]]:
    found: dict[float, list[Case]] = {}
    for case in cases:
        if case.solver is solver:
            found.setdefault(case.eps, []).append(case)
    return found


def _precision_in_words(found: Found) -> str:
    def at(solver: str, condition: float) -> str:
        return f"{typical(chosen(found.default, solver)[condition]):.1e}"

    conditions = [k for k in (1e2, 1e4, 1e6) if k in chosen(found.default, SOLVERS[0].name)]
    said = "; ".join(
        f"{solver.name} " + ", ".join(at(solver.name, k) for k in conditions)
        for solver in SOLVERS
        if solver.precision.bits <= 11
    )
    return (
        f"Low precision, with the default damping, at conditions of {', '.join(f'{k:.0e}' for k in conditions)}: "
        f"{said}. (TF32 is emulated: operands of products are rounded to 11 bits, and the rest is float32. That is "
        "what a GPU does, and none was used.)"
    )


def _cost_in_words(costs: Sequence[Cost]) -> str:
    by = {(cost.solver.method, cost.d): cost for cost in costs}
    sizes = sorted({cost.d for cost in costs})
    largest = sizes[-1]
    eigh, newton, warm = (by[method, largest] for method in SQUARE)
    ratios = [by["newton", d].milliseconds / by["eigh", d].milliseconds for d in sizes]
    off = [cost.milliseconds / cost.predicted_ms for cost in costs if cost.d >= 128] or [
        cost.milliseconds / cost.predicted_ms for cost in costs
    ]
    return (
        f"Cost, seconds of one core of this CPU in float32: {largest} rows take {eigh.milliseconds:.3g} ms by eigh, "
        f"{newton.milliseconds:.3g} by Newton and {warm.milliseconds:.3g} by a warm start; Newton takes "
        f"{min(ratios):.2g} to {max(ratios):.2g} times as long as eigh over sizes from {sizes[0]} to {largest}. From "
        f"FLOPs at the rate of a product of that size, times are predicted within a factor of {min(off):.2g} to "
        f"{max(off):.2g}. Held at once, beside S: {eigh.megabytes:.3g}, {newton.megabytes:.3g} and "
        f"{warm.megabytes:.3g} MB, that is {SQUARE['eigh']}, {SQUARE['newton']} and {SQUARE['warm']} matrices."
    )
