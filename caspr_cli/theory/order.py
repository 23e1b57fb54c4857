"""``caspr-verify order``: is CASPR between full-matrix Adagrad and Shampoo? On gradients of real training."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from pandas import DataFrame, concat

from caspr_cli.report import style
from caspr_cli.report.answer import Answer, Figure, table
from caspr_cli.theory import panels
from caspr_cli.theory.chain import BETA, CLAIMS, FALSE_CLAIMS, GAPS, MEASURES, NAMES, STALE, chain, check, ridge
from caspr_cli.theory.choices import Layers
from caspr_cli.theory.gradients import Log, Recording, low_rank_stream, points, recordings
from caspr_cli.theory.preconditioners import Root, axis_statistics, combined, full_statistic

QUESTION = (
    "Does CASPR stand between full-matrix Adagrad and Shampoo, in the order of positive matrices, on real gradients?"
)
TRIALS, QUICK_TRIALS = 50, 5  # random streams of each kind
RANDOM = (((3, 4), 1), ((4, 3), 2), ((4, 4), 4), ((2, 5), 2))  # shapes and ranks of random streams
RANDOM_STEPS = 6
CLEAR = -1e-6  # a margin below this is a counterexample, and no rounding
SOURCES = REAL, DRAWN = "recorded", "random"
KEYS = ("source", "task", "parameter", "size", "rank", "seed", "step")
DRAWN_STEP = 10  # the step whose eigenvalues are drawn: early enough for what is false to be seen
DRAWN_VALUES = 64  # eigenvalues of a matrix that are drawn, at most


def answer(choice: Layers, log: Log = lambda text: None) -> Answer:
    """Check the chain and its relatives on recorded gradients and on random ones. Raises as :func:`recordings`."""
    found = recordings(choice, log)
    real = [
        row_of((REAL, r.task, r.parameter, r.size, r.rank, r.seed, step), check(G, ridge(r.gradients), r.rank))
        for r, step, G in points(found, log)
    ]
    cases = DataFrame([*real, *_of_random(choice.seed, QUICK_TRIALS if choice.quick else TRIALS, log)])
    margins = [*CLAIMS, *FALSE_CLAIMS]
    return Answer(
        name="order",
        question=QUESTION,
        formula="F~^½ ⪯ X₁ ⪯ X₂ (CASPR) ⪯ X₃ ⪯ X_Shampoo,   X₂⁻¹ = ½ (X₁⁻¹ + X_Shampoo⁻¹)",
        finding=finding(cases),
        tables={
            "counterexamples": counterexamples(cases),
            "traces": traces(cases),
            "layers": layers(cases),
            "recorded": recorded(found),
            "cases": table(
                cases[[*KEYS, *margins]],
                "Every margin",
                formats=dict.fromkeys(margins, ".1e"),
                note="The columns are the statements, in their order. One that should hold fails where its margin is "
                "below 0 by more than rounding, 20 u cond(F~).",
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


def row_of(place: Sequence[Any], found: dict[str, float]) -> dict[str, Any]:
    """Return the row of a layer or random stream at one step; ``place`` has the values of ``KEYS``."""
    row: dict[str, Any] = dict(zip(KEYS, place, strict=True))
    return row | dict.fromkeys((*CLAIMS, *FALSE_CLAIMS)) | found


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
    """Return the number of counterexamples of a statement, and how often it was checked."""
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
    broken = [key for key in CLAIMS if failures(cases, key)]
    if broken:
        return f"{len(broken)} of {len(CLAIMS)} statements that should hold failed at least once."
    last = last_real(cases)
    saved = 100 * (1 - (last["trace caspr"] / last["trace shampoo"]).mean())
    return (
        f"At all {len(cases):,} points CASPR lies between full-matrix Adagrad and Shampoo, and its trace, which "
        f"bounds the regret, is {saved:.1f} % below Shampoo's."
    )


# ---- tables ------------------------------------------------------------------------------------------------------


def counterexamples(cases: DataFrame) -> DataFrame:
    """Return how often each false statement failed, on recorded and on random gradients."""
    rows: list[dict[str, Any]] = [{"statement": text} for text in FALSE_CLAIMS.values()]
    heads: dict[str, str] = {}
    for source, own in cases.groupby("source", sort=False):
        heads |= {f"{source}_failed": f"{source}: false", f"{source}_checked": "of", f"{source}_least": "least"}
        for row, key in zip(rows, FALSE_CLAIMS, strict=True):
            row |= dict(zip(list(heads)[-3:], (*counted(cases, key, str(source)), own[key].min()), strict=True))
    return table(
        rows,
        "Similar statements that are false in general",
        heads=heads,
        formats={key: ".0e" if key.endswith("least") else "," for key in heads},
        note=f"Averages have beta = {BETA:g}; roots are {STALE} steps old, or of the first step before that; random "
        "gradients have ranks 1 (where 1/r is 1), 2 and 4. Margins: the smallest eigenvalue of the difference over the "
        "largest of one of the two.",
    )


def traces(cases: DataFrame) -> DataFrame:
    last = last_real(cases)
    kept = last[[f"trace {name}" for name in NAMES]].set_axis(NAMES, axis=1)
    saved = 100 * (1 - kept.div(kept["shampoo"], axis=0))
    found = DataFrame({"trace": kept.mean(), "saved": saved.mean(), "least": saved.min(), "most": saved.max()})
    return table(
        found.rename_axis("member").reset_index(),
        f"Traces at step {last['step'].max()}, which bound the regret",
        heads={"trace": "tr X / tr F~^½", "saved": "% below Shampoo's"},
        formats=dict.fromkeys(found, ".1f"),
        note="Means over layers and seeds, and the least and most that a trace is below Shampoo's.",
    )


def layers(cases: DataFrame) -> DataFrame:
    """Return means over seeds, by layer and step."""
    means = [f"{measure} {name}" for measure in MEASURES for name in NAMES[1:]]
    groups = cases[cases["source"] == REAL].groupby(["task", "parameter", "size", "step"], sort=False)
    rows = groups.agg({"rank": "first", **dict.fromkeys(GAPS, "min"), **dict.fromkeys(means, "mean")}).reset_index()
    signs = dict(zip(MEASURES, ("tr", "dist", "⟨G,U⟩"), strict=True))
    return table(
        rows.sort_values("step", ascending=False, kind="stable")[
            ["task", "parameter", "size", "rank", "step", *GAPS, *means]
        ],
        "By layer and step, the last step first",
        heads={"parameter": "layer", "size": "m x n", "rank": "r"}
        | {key: CLAIMS[key].replace(" (CASPR)", "") for key in GAPS}
        | {key: f"{signs[key.split()[0]]} {key.partition(' ')[2]}" for key in means},
        formats=dict.fromkeys(GAPS, ".0e") | {key: ".3f" if "product" in key else ".2f" for key in means},
        note="Smallest eigenvalues of the differences (the least over seeds, relative); traces, distances to F~^½ and "
        "inner products ⟨G, U⟩ are means over seeds, in units of the full matrix's own.",
        shown=max(rows.groupby(["task", "parameter"]).ngroups, 1),
    )


def recorded(found: Sequence[Recording]) -> DataFrame:
    """Return the layers whose gradients were recorded, with the losses, which show that the models learned."""
    keys = ["task", "parameter", "m", "n", "rank", "seeds", "steps", "first", "last"]
    rows = [(r.task, r.parameter, *r.shape, r.rank, r.seed, len(r.gradients), *r.losses) for r in found]
    how = dict.fromkeys(keys[2:], "first") | {"rank": "max", "seeds": "count", "first": "mean", "last": "mean"}
    return table(
        DataFrame(rows, columns=keys).groupby(keys[:2], sort=False).agg(how).reset_index(),
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
    traces = cases[cases["source"] == REAL].rename(columns={f"trace {name}": name for name in STYLES})
    title = "Traces along the chain, in units of tr F~^½: mean over layers and seeds, band ± one standard deviation."
    data, columns = traces.melt(["task", "step"], list(STYLES), "member", "trace"), ("task", "member", "step", "trace")
    return panels.figure("traces", title, data, STYLES, columns, unit="tr X / tr F~^½", legend_columns=4)


def _eigenvalue_figure(found: Sequence[Recording]) -> Figure:
    step = min(DRAWN_STEP, len(found[0].gradients))
    last = {one.task: one for one in found}  # the last layer of each task
    title = f"Eigenvalues of differences at step {step}, in order, over the largest of F~^½: below 0 the order fails."
    data = concat([_spectra(one, step) for one in last.values()])
    columns = ("task", "difference", "share of all", "eigenvalue")
    return panels.figure("eigenvalues", title, data, DIFFERENCES, columns, log=False, finish=_signed, legend_columns=2)


def _signed(axes: Axes) -> None:
    """Show several powers of ten on both sides of zero."""
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.set_yticks([-1, -1e-2, 0, 1e-2, 1], ["−1", "−0.01", "0", "0.01", "1"])
    axes.minorticks_off()
    axes.axhline(0, color=style.MUTED, linewidth=0.8)


def _spectra(one: Recording, step: int) -> DataFrame:
    """Return at most ``DRAWN_VALUES`` eigenvalues of each difference for one layer, with the least and the largest."""
    G, eps = one.gradients[:step], ridge(one.gradients)
    full, first, second, _, shampoo = (root.dense() for root in chain(G, eps, one.rank))
    bare = Root.of(full_statistic(G, eps)).power(0.5).dense()
    old = combined(*axis_statistics(G[: max(step - STALE, 1)], eps), 2).dense()
    top, drawn = torch.linalg.matrix_norm(full, 2), torch.linspace(0, len(full) - 1, min(len(full), DRAWN_VALUES))
    pairs = ((first, full), (second, first), (shampoo, second), (second, bare), (old, full))
    shares = ((drawn.round() + 0.5) / len(full)).tolist()
    return concat(
        DataFrame({"task": one.task, "difference": name, "share of all": shares, "eigenvalue": values.tolist()})
        for name, (larger, smaller) in zip(DIFFERENCES, pairs, strict=True)
        for values in [torch.linalg.eigvalsh(larger - smaller)[drawn.round().long()] / top]
    )
