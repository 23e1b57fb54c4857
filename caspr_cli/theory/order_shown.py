"""The tables and figures of ``caspr-verify order``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from matplotlib.axes import Axes

from caspr_cli.report import look
from caspr_cli.report.answer import Column, Figure, Sheet
from caspr_cli.theory import panels
from caspr_cli.theory.chain import BETA, FAILS, HOLDS, NAMES, STALE, chain, ridge
from caspr_cli.theory.gradients import Recording, names
from caspr_cli.theory.order_cases import DRAWN, REAL, Case, failures, margins
from caspr_cli.theory.preconditioners import Spectral, axis_statistics, combined, full_statistic

SEEN = 10  # the step whose eigenvalues are drawn: early enough for what is false to be seen

DRAWN_VALUES = 64  # eigenvalues of a matrix that are drawn, at most


def sheets(found: Sequence[Recording], cases: Sequence[Case]) -> tuple[Sheet, ...]:
    return statements(cases), counterexamples(cases), layers(cases), recorded(found), everything(cases)


def statements(cases: Sequence[Case]) -> Sheet:
    rows = []
    for key, text in HOLDS.items():
        seen = margins(cases, key)
        broken = sum(margin < -tolerance for margin, tolerance in seen)
        least = min((margin for margin, _ in seen), default=None)
        rows.append({"statement": text, "checked": len(seen), "failed": broken, "least": least})
    return Sheet(
        "statements",
        "Statements that should hold everywhere",
        (
            Column("statement", "statement"),
            Column("checked", "checked", ","),
            Column("failed", "failed", ","),
            Column("least", "least margin", ".1e"),
        ),
        tuple(rows),
        note="Margins are relative: the smallest eigenvalue of a difference over the largest of the larger matrix, or "
        "a difference over the larger number; for the identity, the relative error. A statement fails where its margin "
        "is below 0 by more than rounding, 20 u cond(F~).",
        shown=0,
    )


def counterexamples(cases: Sequence[Case]) -> Sheet:
    rows = []
    for key, text in FAILS.items():
        row: dict[str, Any] = {"statement": text}
        for source in (REAL, DRAWN):
            bad, of = failures(cases, key, source)
            row |= {f"{source}_failed": bad, f"{source}_checked": of}
            row[f"{source}_least"] = min((margin for margin, _ in margins(cases, key, source)), default=None)
        rows.append(row)
    heads = [
        Column(f"{source}_{what}", head, form)
        for source in (REAL, DRAWN)
        for what, head, form in (("failed", f"{source}: false", ","), ("checked", "of", ","), ("least", "least", ".0e"))
    ]
    return Sheet(
        "counterexamples",
        "Statements that look like these, and are false",
        (Column("statement", "statement"), *heads),
        tuple(rows),
        note=f"Averages have beta = {BETA:g}; roots are {STALE} steps old, or of the first step before that; random "
        "gradients have ranks 1 (where 1/r is 1), 2 and 4. Margins: the smallest eigenvalue of the difference over the "
        "largest of one of the two.",
    )


def layers(cases: Sequence[Case]) -> Sheet:
    """Means over seeds, by layer and step."""
    groups: dict[tuple[str, str, str, int], list[Case]] = {}
    for case in cases:
        if case.source == REAL:
            groups.setdefault((case.task, case.parameter, case.size, case.step), []).append(case)
    gaps = ("gap_1", "gap_2", "gap_3", "gap_shampoo")
    rows = []
    for (task, parameter, size, step), found in groups.items():
        row: dict[str, Any] = {"task": task, "parameter": parameter, "size": size, "rank": found[0].rank, "step": step}
        row |= {key: min(case.checked.margins[key] for case in found) for key in gaps}
        for k, name in enumerate(NAMES[1:], start=1):
            row[f"trace {name}"] = fmean(case.checked.traces[k] for case in found)
            row[f"distance {name}"] = fmean(case.checked.distances[k] for case in found)
            row[f"product {name}"] = fmean(case.checked.products[k] for case in found)
        rows.append(row)
    rows.sort(key=lambda row: -row["step"])
    measures = (("trace", "tr", ".2f"), ("distance", "dist", ".2f"), ("product", "⟨G,U⟩", ".3f"))
    return Sheet(
        "layers",
        "By layer and step, the last step first",
        (
            Column("task", "task"),
            Column("parameter", "layer"),
            Column("size", "m x n"),
            Column("rank", "r"),
            Column("step", "step"),
            *(Column(key, HOLDS[key].replace(" (CASPR)", ""), ".0e") for key in gaps),
            *(Column(f"{key} {name}", f"{head} {name}", form) for key, head, form in measures for name in NAMES[1:]),
        ),
        tuple(rows),
        note="Smallest eigenvalues of the differences (the least over seeds, relative); traces, distances to F~^½ and "
        "inner products ⟨G, U⟩ are means over seeds, in units of the full matrix's own.",
        shown=max(len({(row["task"], row["parameter"]) for row in rows}), 1),
    )


def recorded(found: Sequence[Recording]) -> Sheet:
    """What was trained: that it learned is part of what makes the gradients real."""
    rows = []
    for task, parameter in dict.fromkeys((one.task, one.parameter) for one in found):
        own = [one for one in found if (one.task, one.parameter) == (task, parameter)]
        row: dict[str, Any] = {"task": task, "parameter": parameter, "m": own[0].shape[0], "n": own[0].shape[1]}
        row |= {"rank": max(one.rank for one in own), "seeds": len(own), "steps": len(own[0].gradients)}
        rows.append(row | {key: fmean(one.losses[k] for one in own) for k, key in enumerate(("first", "last"))})
    return Sheet(
        "recorded",
        "The gradients: layers of small models, trained on the tasks' samples",
        (
            Column("task", "task"),
            Column("parameter", "layer"),
            Column("m", "m"),
            Column("n", "n"),
            Column("rank", "r"),
            Column("seeds", "seeds"),
            Column("steps", "steps", ","),
            Column("first", "loss at first", ".3f"),
            Column("last", "at last", ".3f"),
        ),
        tuple(rows),
        note="Losses are means over seeds, and over the first and the last tenth of the steps.",
    )


def everything(cases: Sequence[Case]) -> Sheet:
    keys = (*HOLDS, *FAILS)
    rows = [
        {name: getattr(case, name) for name in ("source", "task", "parameter", "size", "rank", "seed", "step")}
        | {key: case.checked.margins.get(key) for key in keys}
        for case in cases
    ]
    first = [Column(name, name) for name in ("source", "task", "parameter", "size", "rank", "seed", "step")]
    return Sheet(
        "cases",
        "Every margin",
        (*first, *(Column(key, key, ".1e") for key in keys)),
        tuple(rows),
        note="The columns are statements, in the order of the tables above.",
        shown=0,
    )


# ---- figures -----------------------------------------------------------------------------------------------------

STYLES = {
    "order 1": look.Style("green", look.DASHED),
    "caspr": look.KNOWN["caspr"],
    "order 3": look.Style("purple", look.DASHDOT),
    "shampoo": look.KNOWN["shampoo"],
}


def figures(found: Sequence[Recording], cases: Sequence[Case]) -> Iterator[Figure]:
    traces = _traces([case for case in cases if case.source == REAL])
    title = "Traces along the chain, in units of tr F~^½: mean over layers and seeds, band ± one standard deviation."
    alt = f"{title} " + "; ".join(
        f"{task}: " + ", ".join(f"{line.label} {line.mean[-1]:.1f}" for line in lines) for task, lines in traces.items()
    )
    svg = panels.drawn(traces, STYLES, name="order traces", alt=alt, y="tr X / tr F~^½", legend_columns=4)
    yield Figure("traces", title, svg, alt)
    step = min(SEEN, len(found[0].gradients))
    title = f"Eigenvalues of differences at step {step}, in order, over the largest of F~^½: below 0 the order fails."
    spectra = {task: _spectrum(next(one for one in found[::-1] if one.task == task), step) for task in names(found)}
    alt = f"{title} " + "; ".join(
        f"{task}: " + ", ".join(f"{line.label} from {min(line.mean):.0e} to {max(line.mean):.1g}" for line in lines)
        for task, lines in spectra.items()
    )
    svg = panels.drawn(
        spectra, DIFFERENCES, name="order eigenvalues", alt=alt, y="eigenvalue", x="share of all", log=False,
        finish=_signed, legend_columns=2,
    )  # fmt: skip
    yield Figure("eigenvalues", title, svg, alt)


def _signed(axes: Axes) -> None:
    """Several powers of ten on both sides of zero."""
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.set_yticks([-1, -1e-2, 0, 1e-2, 1], ["−1", "−0.01", "0", "0.01", "1"])
    axes.minorticks_off()
    axes.axhline(0, color=look.MUTED, linewidth=0.8)


def _traces(real: Sequence[Case]) -> dict[str, list[panels.Line]]:
    made: dict[str, list[panels.Line]] = {}
    for task in dict.fromkeys(case.task for case in real):
        steps = sorted({case.step for case in real if case.task == task})
        at = {step: [c.checked.traces for c in real if c.task == task and c.step == step] for step in steps}
        made[task] = [
            panels.Line(
                name,
                steps,
                [fmean(traces[k] for traces in at[step]) for step in steps],
                [stdev(traces[k] for traces in at[step]) if len(at[step]) > 1 else 0.0 for step in steps],
            )
            for k, name in enumerate(NAMES)
            if k
        ]
    return made


DIFFERENCES = {
    "X₁ − F~^½": look.Style("green", look.DASHED),
    "X₂ − X₁": look.Style("blue", look.SOLID),
    "X_Shampoo − X₂": look.Style("vermilion", look.SOLID),
    "X₂ − F^½, without 1/r": look.Style("grey", look.DASHED),
    f"X₂ of {STALE} steps ago − F~^½": look.Style("ink", look.DOTTED),
}


def _spectrum(one: Recording, step: int) -> list[panels.Line]:
    """The eigenvalues of the differences for one layer."""
    G, eps = one.gradients[:step], ridge(one.gradients)
    full, first, second, _, shampoo = (root.dense() for root in chain(G, eps, one.rank))
    bare = Spectral.of(full_statistic(G, eps)).power(0.5).dense()
    old = combined(*axis_statistics(G[: max(step - STALE, 1)], eps), 2).dense()
    top = float(torch.linalg.matrix_norm(full, 2))
    drawn = (
        torch.linspace(0, len(full) - 1, min(len(full), DRAWN_VALUES)).round().long()
    )  # places, both ends among them
    shares = ((drawn + 0.5) / len(full)).tolist()
    pairs = ((first, full), (second, first), (shampoo, second), (second, bare), (old, full))
    lines = []
    for label, (larger, smaller) in zip(DIFFERENCES, pairs, strict=True):
        values = (torch.linalg.eigvalsh(larger - smaller)[drawn] / top).tolist()
        lines.append(panels.Line(label, shares, values, [0.0] * len(shares)))
    return lines
