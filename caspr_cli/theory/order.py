"""``caspr-verify order``: is CASPR between full-matrix Adagrad and Shampoo? On gradients of real training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from pandas import DataFrame

from caspr_cli.report import style
from caspr_cli.report.answer import Answer, Figure, table
from caspr_cli.theory import panels
from caspr_cli.theory.chain import BETA, CLAIMS, FALSE_CLAIMS, NAMES, STALE, Checked, chain, check, ridge
from caspr_cli.theory.gradients import Choice, Log, Recording, low_rank_stream, points, recordings
from caspr_cli.theory.preconditioners import Spectral, axis_statistics, combined, full_statistic

QUESTION = (
    "Does CASPR stand between full-matrix Adagrad and Shampoo, in the order of positive matrices, on real gradients?"
)
TRIALS, QUICK_TRIALS = 50, 5  # random streams of each kind
RANDOM = (((3, 4), 1), ((4, 3), 2), ((4, 4), 4), ((2, 5), 2))  # shapes and ranks of random streams
RANDOM_STEPS = 6
CLEAR = -1e-6  # a margin below this is a counterexample, and no rounding
SOURCES = REAL, DRAWN = "recorded", "random"
KEYS = ("source", "task", "parameter", "size", "rank", "seed", "step")
GAPS = ("gap_1", "gap_2", "gap_3", "gap_shampoo")
MEASURES = {"trace": "tr", "distance": "dist", "product": "⟨G,U⟩"}
DRAWN_STEP = 10  # the step whose eigenvalues are drawn: early enough for what is false to be seen
DRAWN_VALUES = 64  # eigenvalues of a matrix that are drawn, at most


def answer(choice: Choice, log: Log = lambda text: None) -> Answer:
    """Check the chain and its relatives on recorded gradients and on random ones.

    Raises:
        ConfigError: there is no such task or parameter, or it is too large.
    """
    found = recordings(choice, log)
    real = [
        row_of((REAL, r.task, r.parameter, r.size, r.rank, r.seed, step), check(G, ridge(r.gradients), r.rank))
        for r, step, G in points(found, log)
    ]
    cases = DataFrame([*real, *_of_random(choice.seed, QUICK_TRIALS if choice.quick else TRIALS, log)])
    return Answer(
        name="order",
        question=QUESTION,
        finding=finding(cases),
        tables={
            "statements": statements(cases),
            "counterexamples": counterexamples(cases),
            "traces": traces(cases),
            "layers": layers(cases),
            "recorded": recorded(found),
            "cases": table(
                cases[[*KEYS, *CLAIMS, *FALSE_CLAIMS]],
                "Every margin",
                formats=dict.fromkeys((*CLAIMS, *FALSE_CLAIMS), ".1e"),
                note="The columns are statements, in the order of the tables above.",
                shown=0,
            ),
        },
        figures=(_trace_figure(cases), _eigenvalue_figure(found)),
        claims=tuple(
            (f"{text} ({cases[key].count():,} cases, least margin {cases[key].min():.0e})", not failures(cases, key))
            for key, text in CLAIMS.items()
        ),
        counterexamples=tuple(f"{text}: {_said(cases, key)}" for key, text in FALSE_CLAIMS.items()),
    )


# ---- cases -------------------------------------------------------------------------------------------------------


def row_of(place: Sequence[Any], found: Checked) -> dict[str, Any]:
    """Return one layer, or random stream, at one step as a row.

    Args:
        place: source, task, parameter, size, rank, seed and step.
    """
    row = dict(zip(KEYS, place, strict=True)) | dict.fromkeys((*CLAIMS, *FALSE_CLAIMS)) | found.margins
    for measure, values in zip(MEASURES, (found.traces, found.distances, found.products), strict=True):
        row |= {f"{measure} {name}": value for name, value in zip(NAMES, values, strict=True)}
    return row | {"tolerance": found.tolerance}


def _of_random(seed: int, trials: int, log: Log) -> Iterator[dict[str, Any]]:
    log("random gradients")
    for (m, n), rank in RANDOM:
        for trial in range(trials):
            G = low_rank_stream((m, n), rank, RANDOM_STEPS, 1_000_003 * seed + trial)
            place = (DRAWN, DRAWN, f"of rank {rank}", f"{m} x {n}", rank, trial, RANDOM_STEPS)
            yield row_of(place, check(G, ridge(G), rank))


def failures(cases: DataFrame, key: str) -> int:
    """Return how often a statement that should hold did not, by more than rounding."""
    return int((cases[key] < -cases["tolerance"]).sum())


def counted(cases: DataFrame, key: str, source: str) -> tuple[int, int]:
    """Return the counterexamples of a statement, and how often it was checked."""
    margins = cases.loc[cases["source"] == source, key]
    return int((margins < CLEAR).sum()), int(margins.count())


def _said(cases: DataFrame, key: str) -> str:
    counts = ((source, *counted(cases, key, source)) for source in SOURCES)
    return ", ".join(f"false in {bad:,} of {of:,} {source} cases" for source, bad, of in counts)


def last_real(cases: DataFrame) -> DataFrame:
    """Return the recorded cases of the last step."""
    real = cases[cases["source"] == REAL]
    return real[real["step"] == real["step"].max()]


def finding(cases: DataFrame) -> str:
    """Return the answer in one sentence."""
    broken = [key for key in CLAIMS if failures(cases, key)]
    if broken:
        return f"Not everywhere: {len(broken)} of {len(CLAIMS)} statements that should hold failed at least once."
    last = last_real(cases)
    saved = 100 * (1 - (last["trace caspr"] / last["trace shampoo"]).mean())
    return (
        f"Yes, at all {len(cases):,} points: CASPR lies between full-matrix Adagrad and Shampoo, and its trace, which "
        f"bounds the regret, is {saved:.1f} % below Shampoo's."
    )


# ---- tables ------------------------------------------------------------------------------------------------------


def statements(cases: DataFrame) -> DataFrame:
    real = cases[cases["source"] == REAL]
    number = {key: real[key].nunique() for key in ("task", "seed")}
    points = real.groupby(["task", "parameter"]).ngroups
    return table(
        [
            {
                "statement": text,
                "checked": int(cases[key].count()),
                "failed": failures(cases, key),
                "least": cases[key].min(),
            }
            for key, text in CLAIMS.items()
        ],
        "Statements that should hold everywhere",
        heads={"least": "least margin"},
        formats={"checked": ",", "failed": ",", "least": ".1e"},
        note=f"Checked at {len(real):,} points of training ({points} layers, {number['task']} tasks, {number['seed']} "
        f"seeds, steps {real['step'].min()} to {real['step'].max()}) and on {len(cases) - len(real):,} random streams. "
        "Margins are relative: the smallest eigenvalue of a difference over the largest of the larger matrix, or a "
        "difference over the larger number; for the identity, the relative error. A statement fails where its margin "
        "is below 0 by more than rounding, 20 u cond(F~).",
        shown=0,
    )


def counterexamples(cases: DataFrame) -> DataFrame:
    rows = []
    for key, text in FALSE_CLAIMS.items():
        row: dict[str, Any] = {"statement": text}
        for source in SOURCES:
            row[f"{source}_failed"], row[f"{source}_checked"] = counted(cases, key, source)
            row[f"{source}_least"] = cases.loc[cases["source"] == source, key].min()
        rows.append(row)
    heads: dict[str, str] = {}
    formats: dict[str, str] = {}
    for source in SOURCES:
        heads |= {f"{source}_failed": f"{source}: false", f"{source}_checked": "of", f"{source}_least": "least"}
        formats |= {f"{source}_failed": ",", f"{source}_checked": ",", f"{source}_least": ".0e"}
    return table(
        rows,
        "Statements that look like these, and are false",
        heads=heads,
        formats=formats,
        note=f"Averages have beta = {BETA:g}; roots are {STALE} steps old, or of the first step before that; random "
        "gradients have ranks 1 (where 1/r is 1), 2 and 4. Margins: the smallest eigenvalue of the difference over the "
        "largest of one of the two.",
    )


def traces(cases: DataFrame) -> DataFrame:
    last = last_real(cases)
    rows = []
    for name in NAMES:
        saved = 100 * (1 - last[f"trace {name}"] / last["trace shampoo"])
        row = {"member": name, "trace": last[f"trace {name}"].mean()}
        rows.append(row | {"saved": saved.mean(), "least": saved.min(), "most": saved.max()})
    return table(
        rows,
        f"Traces at step {last['step'].max()}, which bound the regret",
        heads={"trace": "tr X / tr F~^½", "saved": "% below Shampoo's"},
        formats=dict.fromkeys(("trace", "saved", "least", "most"), ".1f"),
        note="Means over layers and seeds, and the least and most that a trace is below Shampoo's.",
    )


def layers(cases: DataFrame) -> DataFrame:
    """Return means over seeds, by layer and step."""
    columns = [f"{measure} {name}" for name in NAMES[1:] for measure in MEASURES]
    groups = cases[cases["source"] == REAL].groupby(["task", "parameter", "size", "step"], sort=False)
    rows = groups.agg({"rank": "first", **dict.fromkeys(GAPS, "min"), **dict.fromkeys(columns, "mean")}).reset_index()
    forms = {"trace": ".2f", "distance": ".2f", "product": ".3f"}
    shown = [f"{measure} {name}" for measure in MEASURES for name in NAMES[1:]]
    return table(
        rows.sort_values("step", ascending=False, kind="stable")[
            ["task", "parameter", "size", "rank", "step", *GAPS, *shown]
        ],
        "By layer and step, the last step first",
        heads={"parameter": "layer", "size": "m x n", "rank": "r"}
        | {key: CLAIMS[key].replace(" (CASPR)", "") for key in GAPS}
        | {key: f"{MEASURES[key.split()[0]]} {key.partition(' ')[2]}" for key in shown},
        formats=dict.fromkeys(GAPS, ".0e") | {key: forms[key.split()[0]] for key in shown},
        note="Smallest eigenvalues of the differences (the least over seeds, relative); traces, distances to F~^½ and "
        "inner products ⟨G, U⟩ are means over seeds, in units of the full matrix's own.",
        shown=max(rows.groupby(["task", "parameter"]).ngroups, 1),
    )


def recorded(found: Sequence[Recording]) -> DataFrame:
    """Return what was trained: that it learned is part of what makes the gradients real."""
    every = DataFrame(
        [
            {
                "task": one.task, "parameter": one.parameter, "m": one.shape[0], "n": one.shape[1], "rank": one.rank,
                "seeds": one.seed, "steps": len(one.gradients), "first": one.losses[0], "last": one.losses[1],
            }
            for one in found
        ]
    )  # fmt: skip
    how = {
        "m": "first",
        "n": "first",
        "rank": "max",
        "seeds": "count",
        "steps": "first",
        "first": "mean",
        "last": "mean",
    }
    return table(
        every.groupby(["task", "parameter"], sort=False).agg(how).reset_index(),
        "The gradients: layers of small models, trained on the tasks' samples",
        heads={"parameter": "layer", "rank": "r", "first": "loss at first", "last": "at last"},
        formats={"steps": ",", "first": ".3f", "last": ".3f"},
        note="Losses are means over seeds, and over the first and the last tenth of the steps.",
    )


# ---- figures -----------------------------------------------------------------------------------------------------

STYLES = {
    "order 1": style.Style("green", style.DASHED),
    "caspr": style.KNOWN["caspr"],
    "order 3": style.Style("purple", style.DASHDOT),
    "shampoo": style.KNOWN["shampoo"],
}
DIFFERENCES = {
    "X₁ − F~^½": style.Style("green", style.DASHED),
    "X₂ − X₁": style.Style("blue", style.SOLID),
    "X_Shampoo − X₂": style.Style("vermilion", style.SOLID),
    "X₂ − F^½, without 1/r": style.Style("grey", style.DASHED),
    f"X₂ of {STALE} steps ago − F~^½": style.Style("ink", style.DOTTED),
}


def _trace_figure(cases: DataFrame) -> Figure:
    real = cases[cases["source"] == REAL]
    columns = {name: f"trace {name}" for name in NAMES[1:]}
    return panels.figure(
        "traces",
        "Traces along the chain, in units of tr F~^½: mean over layers and seeds, band ± one standard deviation.",
        {task: panels.over(own, "step", columns) for task, own in real.groupby("task", sort=False)},
        STYLES,
        y="tr X / tr F~^½",
        legend_columns=4,
    )


def _eigenvalue_figure(found: Sequence[Recording]) -> Figure:
    step = min(DRAWN_STEP, len(found[0].gradients))
    last = {one.task: one for one in found}  # the last layer of each task
    return panels.figure(
        "eigenvalues",
        f"Eigenvalues of differences at step {step}, in order, over the largest of F~^½: below 0 the order fails.",
        {task: _spectra(one, step) for task, one in last.items()},
        DIFFERENCES,
        y="eigenvalue",
        x="share of all",
        log=False,
        finish=_signed,
        legend_columns=2,
    )


def _signed(axes: Axes) -> None:
    """Show several powers of ten on both sides of zero."""
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.set_yticks([-1, -1e-2, 0, 1e-2, 1], ["−1", "−0.01", "0", "0.01", "1"])
    axes.minorticks_off()
    axes.axhline(0, color=style.MUTED, linewidth=0.8)


def _spectra(one: Recording, step: int) -> list[panels.Line]:
    """Return the eigenvalues of the differences for one layer."""
    G, eps = one.gradients[:step], ridge(one.gradients)
    full, first, second, _, shampoo = (root.dense() for root in chain(G, eps, one.rank))
    bare = Spectral.of(full_statistic(G, eps)).power(0.5).dense()
    old = combined(*axis_statistics(G[: max(step - STALE, 1)], eps), 2).dense()
    top = float(torch.linalg.matrix_norm(full, 2))
    # Some of the eigenvalues, both ends among them.
    drawn = torch.linspace(0, len(full) - 1, min(len(full), DRAWN_VALUES)).round().long()
    shares = ((drawn + 0.5) / len(full)).tolist()
    pairs = ((first, full), (second, first), (shampoo, second), (second, bare), (old, full))
    return [
        panels.Line(label, shares, (torch.linalg.eigvalsh(larger - smaller)[drawn] / top).tolist())
        for label, (larger, smaller) in zip(DIFFERENCES, pairs, strict=True)
    ]
