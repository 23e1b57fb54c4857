"""The tables and figures of ``caspr-verify approximation``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import Any

from caspr_cli.report import look
from caspr_cli.report.answer import Column, Figure, Sheet
from caspr_cli.theory import panels
from caspr_cli.theory.nearness import Case, Near, at, mean, tasks_of

# How each is drawn: the optimizers of the house as everywhere, what needs the full matrix dotted.
STYLES = {
    "caspr": look.KNOWN["caspr"],
    "order 1": look.Style("green", look.DASHED),
    "order 3": look.Style("blue", look.DASHDOT),
    "shampoo 1/4": look.KNOWN["shampoo"],
    "shampoo 1/2": look.Style("vermilion", look.DASHED),
    "caspr, e = 1": look.Style("blue", look.DASHED),
    "left": look.Style("purple", look.SOLID),
    "right": look.Style("purple", look.DASHED),
    "row-wise": look.Style("amber", look.SOLID),
    "diagonal": look.Style("grey", look.SOLID),
    "Kronecker of F": look.Style("ink", look.DASHED),
    "Kronecker of F^½": look.Style("ink", look.DOTTED),
}


def _sd(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def summaries(cases: Sequence[Case]) -> Iterator[Sheet]:
    """One table a measure at the last step: preconditioners by tasks, mean ± sd over layers and seeds."""
    tasks = tasks_of(cases)
    for measure, title in (
        ("root", "Cosine with F^½ at the last step: 1 is F^½ itself, up to scale"),
        ("inverse", "Cosine with F^−½ at the last step"),
        ("angle", "Degrees between the update and that of full-matrix Adagrad at the last step"),
        ("root_distance", "Distance to F^½ in Frobenius norm without scaling, in units of ‖F^½‖, at the last step"),
    ):
        rows = []
        for name in STYLES:
            row: dict[str, Any] = {"preconditioner": name}
            for task in tasks:
                values = [getattr(case.near[name], measure) for case in at(cases, task)]
                row[task], row[f"{task} sd"] = fmean(values), stdev(values) if len(values) > 1 else None
            rows.append(row)
        form = {"angle": ".1f", "root_distance": ".2f"}.get(measure, ".3f")
        spread = [Column(f"{task} sd", "± sd", form) for task in tasks]
        pairs = zip((Column(task, task, form) for task in tasks), spread, strict=True)
        yield Sheet(
            measure,
            title,
            (Column("preconditioner", "preconditioner"), *(column for pair in pairs for column in pair)),
            tuple(rows),
            note="Means and standard deviations over layers and seeds. The two Kronecker rows need the full matrix.",
        )


def over_steps(cases: Sequence[Case]) -> Sheet:
    rows = []
    for task in tasks_of(cases):
        for step in sorted({case.step for case in cases if case.task == task}):
            own = at(cases, task, step)
            for name in STYLES:
                means = {m: mean(own, name, m) for m in Near.__dataclass_fields__}
                scaled = {f"{m}_scaled": math.sqrt(max(1 - means[m] ** 2, 0.0)) for m in ("root", "inverse")}
                rows.append({"task": task, "step": step, "preconditioner": name, "cases": len(own)} | means | scaled)
    return Sheet(
        "steps",
        "Over training: means over layers and seeds",
        (
            Column("task", "task"),
            Column("step", "step", ","),
            Column("preconditioner", "preconditioner"),
            Column("cases", "cases"),
            *(
                Column(m, m.replace("_", " "), ".3f")
                for m in (*Near.__dataclass_fields__, "root_scaled", "inverse_scaled")
            ),
        ),
        tuple(rows),
        note="root, inverse: cosines with F^½ and F^−½; scaled: relative distances after the best scaling, as root and "
        "inverse have them; angle in degrees.",
        shown=0,
    )


def everything(cases: Sequence[Case]) -> Sheet:
    keys = ("task", "parameter", "seed", "step")
    rows = [
        {key: getattr(case, key) for key in keys} | {"preconditioner": name} | vars(near)
        for case in cases
        for name, near in case.near.items()
    ]
    return Sheet(
        "cases",
        "Every layer, seed and step",
        (
            *(Column(key, key) for key in (*keys, "preconditioner")),
            *(Column(m, m, ".4f") for m in vars(next(iter(cases[0].near.values())))),
        ),
        tuple(rows),
        shown=0,
    )


# ---- figures -----------------------------------------------------------------------------------------------------


def figures(cases: Sequence[Case]) -> Iterator[Figure]:
    for name, measure, y, title in (
        ("root", "root", "cosine", "Cosine of each preconditioner with F^½ over training."),
        ("inverse", "inverse", "cosine", "Cosine of each inverse with F^−½ over training."),
        ("angle", "angle", "degrees", "Angle between each update and that of full-matrix Adagrad over training."),
    ):
        shown = {task: _lines(cases, task, measure) for task in tasks_of(cases)}
        caption = f"{title} Mean over layers and seeds, band ± one standard deviation; the x axis is the step."
        alt = f"{title} At the last step: " + "; ".join(
            f"{task}: " + ", ".join(f"{line.label} {line.mean[-1]:.3g}" for line in lines)
            for task, lines in shown.items()
        )
        svg = panels.drawn(shown, STYLES, name=f"approximation {name}", alt=alt, y=y)
        yield Figure(name, caption, svg, alt)


def _lines(cases: Sequence[Case], task: str, measure: str) -> list[panels.Line]:
    steps = sorted({case.step for case in cases if case.task == task})
    seen = {step: at(cases, task, step) for step in steps}
    return [
        panels.Line(
            name,
            steps,
            [mean(seen[step], name, measure) for step in steps],
            [_sd([getattr(case.near[name], measure) for case in seen[step]]) for step in steps],
        )
        for name in STYLES
    ]
