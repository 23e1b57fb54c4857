"""The tables and figures of ``caspr-verify roots``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median, pstdev
from typing import Any

import torch
from matplotlib.axes import Axes

from caspr_cli.report import look
from caspr_cli.report.answer import Column, Figure, Sheet
from caspr_cli.theory import panels
from caspr_cli.theory.root_cases import ABSOLUTE, Constant, Found, P, typical
from caspr_cli.theory.solving import SOLVERS, Case, Solver

STYLES = {
    "stored in float32": look.Style("blue", look.SOLID),
    "predicted for float32": look.Style("blue", look.DOTTED),
    "stored in bfloat16": look.Style("purple", look.SOLID),
    "predicted for bfloat16": look.Style("purple", look.DOTTED),
    "eigh, float64": look.Style("ink", look.SOLID),
    "newton, float64": look.Style("ink", look.DASHED),
    "eigh, float32": look.Style("vermilion", look.SOLID),
    "newton, float32": look.Style("vermilion", look.DASHED),
    "warm, float32": look.Style("green", look.DASHED),
    "newton, TF32 products": look.Style("amber", look.DASHED),
}
Key = tuple[str, float, float, int]  # solver, condition, eps, p


def grouped(cases: Iterable[Case]) -> dict[Key, list[Case]]:
    """Over seeds."""
    found: dict[Key, list[Case]] = {}
    for case in cases:
        found.setdefault((case.solver.name, case.condition, case.eps, case.p), []).append(case)
    return found


def error(cases: Sequence[Case]) -> float | None:
    """Typical of the seeds; nothing where a root is not finite."""
    found = typical(cases)
    return None if found == math.inf else found


def forecast(case: Case, constants: Mapping[str, Constant]) -> float | None:
    """The error that is expected: of storing, or of the solver's usual backward error and of rounding its result."""
    if case.predicted is not None:
        return case.predicted
    if case.solver.name not in constants:
        return None
    constant = constants[case.solver.name]
    return math.hypot(constant.middle * case.amplified, constant.floor * case.solver.precision.unit)


def sheets(found: Found, constants: Sequence[Constant]) -> tuple[Sheet, ...]:
    return (
        stability(found.conditions), exponents(found.conditions), law(constants), damping(found.dampings),
        absolute(found.scales), precision(found.default), complexity(found), everything(found, constants),
    )  # fmt: skip


def _errors(names: Sequence[str]) -> tuple[Column, ...]:
    return tuple(Column(name, name, ".1e") for name in names)


NAMES = tuple(solver.name for solver in SOLVERS)


def stability(cases: Sequence[Case]) -> Sheet:
    of = grouped(case for case in cases if case.p == P)
    rows = []
    for condition in dict.fromkeys(case.condition for case in cases):
        by = {name: of[name, condition, 0.0, P] for name in NAMES}
        newton = by["newton, float32"]
        row: dict[str, Any] = {"condition": condition, "predicted": fmean(c.predicted or 0 for c in by[NAMES[0]])}
        row |= {name: error(by[name]) for name in NAMES}
        row["coupled"] = median(c.coupled or math.inf for c in newton)
        row["residual"] = median(c.residual for c in newton)
        row["steps"] = max(c.steps or 0 for c in newton)
        row["forecast"] = newton[0].forecast
        row["accepted"] = fmean(c.accepted for c in newton)
        rows.append(row)
    first = ("stored in float32", "eigh, float32", "newton, float32")
    return Sheet(
        "stability",
        f"Stability: error of S^(-1/{P}) by condition, without damping",
        (
            Column("condition", "condition", ".0e"),
            Column("predicted", "predicted: stored in float32", ".1e"),
            *_errors(first),
            Column("coupled", "max|M−I| of the last", ".0e"),
            Column("residual", "its residual", ".0e"),
            Column("steps", "its steps"),
            Column("forecast", "forecast"),
            Column("accepted", "accepted", ".0%"),
            *_errors([name for name in NAMES if name not in first]),
        ),
        tuple(rows),
        note=f"Relative, Frobenius norm, geometric means over seeds; {cases[0].d} rows with eigenvalues from 1 to "
        "1/condition, evenly spaced in the logarithm. Stored: the exact root of S as the type has it. Warm: from "
        "eigenvectors of statistics of which a hundredth was new.",
    )


def exponents(cases: Sequence[Case]) -> Sheet:
    of = grouped(cases)
    names = ("stored in float32", "eigh, float32", "newton, float32", "newton, float64")
    rows = []
    for condition in dict.fromkeys(case.condition for case in cases):
        for p in dict.fromkeys(case.p for case in cases):
            stored, newton = of[names[0], condition, 0.0, p], of["newton, float32", condition, 0.0, p]
            row: dict[str, Any] = {"condition": condition, "p": p, "predicted": fmean(c.predicted or 0 for c in stored)}
            row |= {name: error(of[name, condition, 0.0, p]) for name in names}
            rows.append(row | {"steps": max(c.steps or 0 for c in newton), "forecast": newton[0].forecast})
    return Sheet(
        "exponents",
        "Exponents: errors of S^(-1/p), without damping",
        (
            Column("condition", "condition", ".0e"),
            Column("p", "p"),
            Column("predicted", "predicted: stored in float32", ".1e"),
            *_errors(names),
            Column("steps", "steps of newton, float32"),
            Column("forecast", "forecast"),
        ),
        tuple(rows),
        note="p is 2q for order q, 4 for CASPR and Shampoo.",
    )


def law(constants: Sequence[Constant]) -> Sheet:
    keys = ("middle", "least", "most", "count", "floor")
    rows = [{"solver": c.solver.name} | {key: getattr(c, key) for key in keys} for c in constants]
    return Sheet(
        "law",
        "Solvers: c, the backward error ‖E‖₂ in units of u‖S‖₂ that explains their errors at all conditions and "
        "exponents",
        (
            Column("solver", "solver"),
            Column("middle", "c, median", ".2f"),
            Column("least", "least", ".2f"),
            Column("most", "most", ".2f"),
            Column("count", "roots"),
            Column("floor", "error / u at the least condition", ".3g"),
        ),
        tuple(rows),
        note="From conditions of 1e3 on, where the error is below 2 %. Below that the rounding of the result decides. "
        "TF32: u is that of its 11 bits.",
    )


def damping(cases: Sequence[Case]) -> Sheet:
    of = grouped(cases)
    names = [name for name in NAMES if not name.endswith("float64")]
    condition = cases[0].condition
    values = torch.logspace(0, -math.log10(condition), cases[0].d, dtype=torch.float64)
    rows = []
    for eps in dict.fromkeys(case.eps for case in cases):
        row: dict[str, Any] = {"eps": eps} | moved(values, eps)
        row["predicted"] = fmean(c.predicted or 0 for c in of[NAMES[0], condition, eps, P])
        rows.append(row | {name: error(of[name, condition, eps, P]) for name in names})
    return Sheet(
        "damping",
        "Damping, relative to the largest eigenvalue: what it changes, and the error that is left (condition "
        f"{condition:.0e})",
        (
            Column("eps", "eps", ".0e"),
            Column("damped", "eigenvalues below it", ".0%"),
            Column("cosine", "cosine", ".4f"),
            Column("bias", "root moved by", ".1e"),
            Column("predicted", "predicted: stored in float32", ".1e"),
            *_errors(names),
        ),
        tuple(rows),
        note="Cosine: of (S + eps λ I)^(-1/2) G to S^(-1/2) G, for G of covariance S; moved: ‖S~^(-1/4) − S^(-1/4)‖ / "
        "‖S^(-1/4)‖; both exact. Errors are those of S~^(-1/4), with the damping.",
    )


def moved(values: torch.Tensor, eps: float) -> dict[str, float]:
    """What damping does to S of these eigenvalues, exactly: to the root, and to the direction of a whitened update."""
    shifted = values + eps * values.max()
    kept = values / shifted  # squares of what is left of each direction of S^(-1/2) G, which have all the same length
    change = values.pow(-1 / P) - shifted.pow(-1 / P)
    return {
        "damped": float((values < eps * values.max()).double().mean()),
        "cosine": float(kept.sqrt().sum() / (len(values) * kept.sum()).sqrt()),
        "bias": float(change.norm() / values.pow(-1 / P).norm()),
    }


def absolute(cases: Sequence[Case]) -> Sheet:
    of = grouped(cases)
    condition = cases[0].condition
    values = torch.logspace(0, -math.log10(condition), cases[0].d, dtype=torch.float64)
    names = ("stored in float32", "eigh, float32", "newton, float32")
    rows = []
    for eps in dict.fromkeys(case.eps for case in cases):
        row: dict[str, Any] = {"largest": ABSOLUTE / eps, "eps": eps} | moved(values, eps)
        rows.append(row | {name: error(of[name, condition, eps, P]) for name in names})
    return Sheet(
        "absolute",
        "Damping, absolute: 1e-6 added whatever the gradients",
        (
            Column("largest", "largest eigenvalue", ".0e"),
            Column("eps", "relative to it", ".0e"),
            Column("damped", "eigenvalues below it", ".0%"),
            Column("cosine", "cosine", ".4f"),
            *_errors(names),
        ),
        tuple(rows),
        note="Where the cosine is near that of no preconditioning at all, the update is the gradient.",
    )


def precision(cases: Sequence[Case]) -> Sheet:
    of = grouped(cases)
    rows = []
    for condition in dict.fromkeys(case.condition for case in cases):
        eps = cases[0].eps
        row: dict[str, Any] = {"condition": condition}
        row["float32"] = fmean(c.predicted or 0 for c in of["stored in float32", condition, eps, P])
        row["bfloat16"] = fmean(c.predicted or 0 for c in of["stored in bfloat16", condition, eps, P])
        rows.append(row | {name: error(of[name, condition, eps, P]) for name in NAMES})
    return Sheet(
        "precision",
        f"Low precision: errors with the default damping of {cases[0].eps:g}",
        (
            Column("condition", "condition", ".0e"),
            Column("float32", "predicted: stored in float32", ".1e"),
            Column("bfloat16", "predicted: stored in bfloat16", ".1e"),
            *_errors(NAMES),
        ),
        tuple(rows),
        note="Predictions are of first order: one above a tenth says that the root is lost. TF32 is emulated.",
    )


def complexity(found: Found) -> Sheet:
    rows = [
        {
            "d": c.d, "solver": c.solver.method, "ms": c.milliseconds, "predicted_ms": c.predicted_ms,
            "ratio": c.milliseconds / c.predicted_ms, "flops": c.flops, "cubes": c.flops / c.d**3, "steps": c.steps,
            "mb": c.megabytes, "predicted_mb": c.predicted_mb,
        }
        for c in found.costs
    ]  # fmt: skip
    return Sheet(
        "complexity",
        "Complexity: a root S^(-1/4) in float32, condition 1e6, damping 1e-6, one thread",
        (
            Column("d", "rows"),
            Column("solver", "solver"),
            Column("ms", "ms", ".3g"),
            Column("predicted_ms", "predicted", ".3g"),
            Column("ratio", "ratio", ".2f"),
            Column("cubes", "FLOPs / d³", ".0f"),
            Column("steps", "steps"),
            Column("mb", "MB held", ".3g"),
            Column("predicted_mb", "predicted", ".3g"),
        ),
        tuple(rows),
        note="Predicted times: FLOPs at the rate of a product of this size, measured just before. FLOPs of eigh: as "
        "long as 25 d³ of products take. MB: beside S and, for a warm start, the eigenvectors that it has kept.",
    )


def everything(found: Found, constants: Sequence[Constant]) -> Sheet:
    by = {c.solver.name: c for c in constants}
    rows = [
        {
            "solver": c.solver.name, "p": c.p, "d": c.d, "condition": c.condition, "eps": c.eps, "seed": c.seed,
            "error": c.error if c.finite else None, "predicted": forecast(c, by),
            "roundings": c.roundings if c.finite else None, "residual": c.residual if c.finite else None,
            "coupled": c.coupled if c.coupled != math.inf else None, "steps": c.steps, "forecast": c.forecast,
            "accepted": c.accepted,
        }
        for c in (*found.conditions, *found.default, *found.dampings, *found.scales)
    ]  # fmt: skip
    forms = {"condition": ".0e", "eps": ".0e", "error": ".2e", "predicted": ".2e", "roundings": ".2g"}
    forms |= {"residual": ".1e", "coupled": ".1e"}
    return Sheet(
        "roots",
        "Every root",
        tuple(Column(key, key, forms.get(key, "")) for key in rows[0]),
        tuple(rows),
        note="Predicted: of storing from the spectrum alone; of solvers with their two constants of the table above.",
        shown=0,
    )


# ---- figures -----------------------------------------------------------------------------------------------------


def figures(found: Found) -> tuple[Figure, ...]:
    return condition_figure(found.conditions), damping_figure(found.dampings), cost_figure(found)


def _line(label: str, points: Mapping[float, Sequence[float]]) -> panels.Line:
    x = sorted(points)
    return panels.Line(label, x, [fmean(points[k]) for k in x], [pstdev(points[k]) for k in x])


def _lines(cases: Sequence[Case], over: str, solvers: Sequence[Solver]) -> list[panels.Line]:
    """Errors of solvers, and predictions of what is stored, over ``condition`` or ``eps``."""
    made: list[panels.Line] = []
    for solver in solvers:
        errors: dict[float, list[float]] = {}
        predicted: dict[float, list[float]] = {}
        for case in cases:
            if case.solver is solver and case.finite:
                errors.setdefault(getattr(case, over), []).append(case.error)
                if case.predicted is not None:
                    predicted.setdefault(getattr(case, over), []).append(case.predicted)
        made.append(_line(solver.name, errors))
        if predicted:
            made.append(_line(f"predicted for {solver.stored.name}", predicted))
    return made


def _alt(title: str, found: Mapping[str, Sequence[panels.Line]]) -> str:
    said = (
        f"{name}: " + ", ".join(f"{line.label} from {line.mean[0]:.0e} to {line.mean[-1]:.0e}" for line in lines)
        for name, lines in found.items()
    )
    return f"{title} {'; '.join(said)}."


def condition_figure(cases: Sequence[Case]) -> Figure:
    title = "Error of S^(-1/p) by condition, without damping: mean over seeds, band ± one standard deviation."
    found = {
        f"p = {p}": _lines([case for case in cases if case.p == p], "condition", SOLVERS)
        for p in dict.fromkeys(case.p for case in cases)
    }

    def finish(axes: Axes) -> None:
        panels.logarithmic(axes)
        axes.set_ylim(1e-16, 30)
        axes.set_yticks([1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 1])
        axes.set_xticks([1e2, 1e4, 1e6, 1e8, 1e10, 1e12], ["1e2", "1e4", "1e6", "1e8", "1e10", "1e12"])
        axes.set_xlim(right=max(case.condition for case in cases))

    alt = _alt(title, found)
    svg = panels.drawn(found, STYLES, name="conditions", alt=alt, y="relative error", x="condition", finish=finish)
    return Figure("conditions", title, svg, alt)


def damping_figure(cases: Sequence[Case]) -> Figure:
    title = (
        "Error of S~^(-1/4) by damping, relative to the largest eigenvalue, at a condition of "
        f"{cases[0].condition:.0e}."
    )
    some = [solver for solver in SOLVERS if not solver.name.endswith("float64")]
    float32 = [solver for solver in some if solver.name.endswith("float32")]
    low = [solver for solver in some if not solver.name.endswith("float32")]
    found = {"float32": _lines(cases, "eps", float32), "lower": _lines(cases, "eps", low)}

    def finish(axes: Axes) -> None:
        panels.logarithmic(axes)
        axes.set_ylim(1e-6, 30)
        axes.set_xticks([1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2], ["1e-12", "1e-10", "1e-8", "1e-6", "1e-4", "1e-2"])

    alt = _alt(title, found)
    styles = {label: style for label, style in STYLES.items() if not label.endswith("float64")}
    svg = panels.drawn(found, styles, name="dampings", alt=alt, y="relative error", x="eps", finish=finish)
    return Figure("damping", title, svg, alt)


def cost_figure(found: Found) -> Figure:
    title = "Milliseconds and megabytes of a root by its rows, measured and predicted, one thread, float32."
    hues = {"eigh": "vermilion", "newton": "blue", "warm": "green"}
    styles = {}
    for method, hue in hues.items():
        styles[method] = look.Style(hue, look.SOLID)
        styles[f"{method}, predicted"] = look.Style(hue, look.DOTTED)
    shown = {
        "milliseconds": _costs(found, hues, "milliseconds", "predicted_ms"),
        "megabytes": _costs(found, hues, "megabytes", "predicted_mb"),
    }
    alt = _alt(title, shown)
    svg = panels.drawn(shown, styles, name="root costs", alt=alt, y="", x="rows", finish=panels.logarithmic)
    return Figure("costs", title, svg, alt)


def _costs(found: Found, methods: Iterable[str], measured: str, predicted: str) -> list[panels.Line]:
    made = []
    for method in methods:
        costs = [cost for cost in found.costs if cost.solver.method == method]
        for label, key in ((method, measured), (f"{method}, predicted", predicted)):
            made.append(_line(label, {cost.d: [getattr(cost, key)] for cost in costs}))
    return made
