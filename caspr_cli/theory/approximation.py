"""``caspr-verify approximation``: how near each preconditioner is to the full-matrix one, over training."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from pandas import DataFrame, Series
from torch import Tensor

from caspr_cli.report import style
from caspr_cli.report.answer import Answer, Figure, judged, table
from caspr_cli.theory import panels
from caspr_cli.theory import preconditioners as pre
from caspr_cli.theory.chain import ridge
from caspr_cli.theory.choices import Layers
from caspr_cli.theory.gradients import QUICK_STEPS, STEPS, Log, kronecker_stream, points, recordings
from caspr_cli.theory.preconditioners import Root, combined, cosine

QUESTION = "Is CASPR the nearest of its relatives to full-matrix Adagrad, over training?"
NOISE, NOISE_SHAPE, NOISE_STEPS = "Kronecker noise", (8, 8), (*STEPS, 1000, 3000)
FAMILY = ("order 1", "caspr", "order 3", "shampoo 1/4")
NEAREST = "Kronecker of F^½"
ORACLES = ("Kronecker of F", NEAREST)  # need F itself
PRODUCTS = ("shampoo 1/4", "shampoo 1/2", "left", "right", "Kronecker of F")  # Kronecker products, besides the nearest
# How each is drawn: the optimizers of this library as everywhere, those that need the full matrix without a hue.
STYLES = {
    "caspr": style.KNOWN["caspr"],
    "order 1": style.Style("green", style.DASHED),
    "order 3": style.Style("blue", style.DASHDOT),
    "shampoo 1/4": style.KNOWN["shampoo"],
    "shampoo 1/2": style.Style("vermilion", style.DASHED),
    "caspr, e = 1": style.Style("blue", style.DASHED),
    "left": style.Style("purple", style.SOLID),
    "right": style.Style("purple", style.DASHED),
    "row-wise": style.Style("amber", style.SOLID),
    "diagonal": style.Style("grey", style.SOLID),
    "Kronecker of F": style.Style("ink", style.DASHED),
    NEAREST: style.Style("ink", style.DOTTED),
}
MEASURES = {  # by measure: title and format of a table
    "root": ("Cosine with F^½ at the last step: 1 is F^½ itself, up to scale", ".3f"),
    "inverse": ("Cosine with F^−½ at the last step", ".3f"),
    "angle": ("Degrees between the update and that of full-matrix Adagrad at the last step", ".1f"),
    "root_distance": ("Distance to F^½ in Frobenius norm without scaling, in units of ‖F^½‖, at the last step", ".2f"),
}
KEYS = ["task", "parameter", "seed", "step", "preconditioner"]
# Cosines of X with F^(1/2) and of X^{-1} with F^(-1/2), distances in units of the full matrix's norm, and degrees
# between X^{-1} G and F^(-1/2) G for the last G.
VALUES = ["root", "inverse", "root_distance", "inverse_distance", "angle"]


def approximations(gradients: Tensor, eps: float) -> dict[str, Root]:
    """Return each X of gradients ``[T, m, n]``, with the same eps everywhere: in F, its parts, L and R.

    The nearest Kronecker product is taken twice: of F, which then gets its root, and of F^(1/2) itself.
    """
    m, n = gradients.shape[1:]
    L, R = pre.axis_statistics(gradients, eps)
    F = pre.full_statistic(gradients, eps)
    root = Root.of(F).power(0.5)
    return {
        "caspr": combined(L, R, 2),
        "order 1": combined(L, R, 1),
        "order 3": combined(L, R, 3),
        "shampoo 1/4": combined(L, R, math.inf),
        "shampoo 1/2": pre.shampoo_half(L, R),
        "caspr, e = 1": pre.caspr_one(L, R),
        "left": pre.one_sided(L, R, left=True),
        "right": pre.one_sided(L, R, left=False),
        "row-wise": Root.of(pre.row_statistic(gradients, eps)).power(0.5),
        "diagonal": pre.entrywise(gradients.square().sum(0) + eps).power(0.5),
        "Kronecker of F": pre.product(*pre.nearest_kronecker(F, (m, n))).power(0.5),
        NEAREST: pre.product(*pre.nearest_kronecker(root.dense(), (m, n))),
        "full": root,
    }


def nearness(gradients: Tensor, eps: float) -> dict[str, dict[str, float]]:
    """Return the ``VALUES`` of each preconditioner after the last of ``gradients`` ``[T, m, n]``.

    Cosines do not depend on the scale of X: after the best scaling the relative distance is sqrt(1 - cos^2). The
    plain distance depends on it, and compares X as the update uses it.
    """
    roots = approximations(gradients, eps)
    full, G = roots.pop("full"), gradients[-1]
    F, inverse, wanted = full.dense(), full.power(-1).dense(), full.power(-1).apply(G)
    found = {}
    for name, root in roots.items():
        X, P = root.dense(), root.power(-1).dense()
        found[name] = {
            "root": cosine(X, F),
            "inverse": cosine(P, inverse),
            "root_distance": float((X - F).norm() / F.norm()),
            "inverse_distance": float((P - inverse).norm() / inverse.norm()),
            "angle": math.degrees(math.acos(min(max(cosine(root.power(-1).apply(G), wanted), -1.0), 1.0))),
        }
    return found


def answer(choice: Layers, log: Log = lambda text: None) -> Answer:
    """Compare every preconditioner with the full-matrix one, on recorded gradients and on Kronecker-structured noise.

    Raises as :func:`recordings`.
    """
    cases = DataFrame([*_recorded(choice, log), *_noise(choice, log)])
    by = wide(cases)
    distances = (by[name] for name in ("root_distance", "inverse_distance"))
    grows = all((d[a] <= d[b] * (1 + 1e-7)).all() for d in distances for a, b in pairwise(FAMILY))
    nearest = all((by["root"][NEAREST] >= by["root"][name] - 1e-9).all() for name in PRODUCTS)
    return Answer(
        name="approximation",
        question=QUESTION,
        formula="cos(X, F^½) = ⟨X, F^½⟩ / (‖X‖ ‖F^½‖)",
        verdict=judged(list(places(cases) == 1)),
        finding=finding(cases),
        tables={measure: summary(cases, measure) for measure in MEASURES}
        | {"nearer": nearer(cases), "cases": table(cases, "Every layer, seed and step", shown=0)},
        figures=tuple(_figure(cases, measure, *labels) for measure, labels in FIGURES.items()),
        claims=(
            # Statement 9 of caspr_cli.theory.chain, which is about distances without scaling.
            ("the distances to F^½ and to F^−½ grow from order 1 over CASPR and order 3 to Shampoo 1/4", grows),
            (
                "no other Kronecker product has a larger cosine with F^½ than the nearest one (Van Loan and Pitsianis)",
                nearest,
            ),
        ),
        counterexamples=(_cosines(by["root"]),),
    )


def _recorded(choice: Layers, log: Log) -> Iterator[dict[str, Any]]:
    for one, step, seen in points(recordings(choice, log), log):
        yield from rows_of(nearness(seen, ridge(one.gradients)), one.task, one.parameter, one.seed, step)


def _noise(choice: Layers, log: Log) -> Iterator[dict[str, Any]]:
    log("Kronecker-structured noise")
    steps = (*QUICK_STEPS, 30, 100) if choice.quick else NOISE_STEPS
    for seed in choice.all_seeds:
        G = kronecker_stream(NOISE_SHAPE, steps[-1], seed)
        for step in steps:
            size = f"{NOISE_SHAPE[0]} x {NOISE_SHAPE[1]}"
            yield from rows_of(nearness(G[:step], ridge(G[:100])), NOISE, size, seed, step)


def rows_of(found: dict[str, dict[str, float]], *place: Any) -> Iterator[dict[str, Any]]:
    """Yield a row for each preconditioner; ``place`` is task, parameter, seed and step."""
    for name, near in found.items():
        yield dict(zip(KEYS, (*place, name), strict=True)) | near


def wide(cases: DataFrame) -> DataFrame:
    """Return a row for each layer, seed and step, with a column for each measure and preconditioner."""
    return cases.pivot(index=KEYS[:-1], columns="preconditioner", values=VALUES)


def _cosines(cosines: DataFrame) -> str:
    """Return how often cosines follow the order of distances. In general they need not."""
    ordered = [cosines[a] >= cosines[b] - 1e-12 for a, b in pairwise(FAMILY)]
    falls = int(sum(ordered).eq(len(ordered)).sum())
    return (
        f"the cosine with F^½ falls from order 1 over CASPR and order 3 to Shampoo 1/4: it does in {falls:,} of "
        f"{len(cosines):,} cases here; gradients of single entries are a counterexample"
    )


def last(cases: DataFrame) -> DataFrame:
    return cases[cases["step"] == cases.groupby("task")["step"].transform("max")]


def means(cases: DataFrame, measure: str) -> DataFrame:
    """Return means over layers and seeds at the last step: preconditioners by tasks."""
    found = last(cases).groupby(["preconditioner", "task"], sort=False)[measure].mean().unstack(sort=False)
    return found.reindex(index=list(STYLES), columns=cases["task"].unique())


def places(cases: DataFrame) -> Series:
    """Return the rank of CASPR by task, 1 for the nearest to F^½, among preconditioners that do not need F itself."""
    found = means(cases[cases["task"] != NOISE], "root").drop(index=list(ORACLES))
    return found.rank(ascending=False).loc["caspr"]


def finding(cases: DataFrame) -> str:
    real = cases[cases["task"] != NOISE]
    found, place = means(real, "root").drop(index=list(ORACLES)), places(cases)
    wins = found.idxmax().value_counts(sort=True)
    return (
        f"At step {real['step'].max()} {wins.index[0]} is nearest to F^½ on {wins.iloc[0]} of {len(place)} tasks; "
        f"CASPR ranks {place.min():.0f} to {place.max():.0f} of {len(found)}."
    )


# ---- tables ------------------------------------------------------------------------------------------------------


def summary(cases: DataFrame, measure: str) -> DataFrame:
    """Return one measure at the last step: preconditioners by tasks, mean ± sd over layers and seeds."""
    title, form = MEASURES[measure]
    mean = means(cases, measure)
    spread = last(cases).groupby(["preconditioner", "task"])[measure].std().unstack()
    found = DataFrame({"preconditioner": mean.index}, index=mean.index)
    for task in mean.columns:
        found[task], found[f"{task} sd"] = mean[task], spread[task]
    found["tasks"] = mean.drop(columns=NOISE, errors="ignore").mean(axis=1)
    return table(
        found,
        title,
        heads={f"{task} sd": "± sd" for task in mean.columns} | {"tasks": "mean of tasks"},
        formats=dict.fromkeys(found.columns, form),
        note="Means and standard deviations over layers and seeds; the last column is without the noise. The two "
        "Kronecker rows need the full matrix.",
    )


def nearer(cases: DataFrame) -> DataFrame:
    """Return in how many cases CASPR is nearer to the full matrix than each of some others."""
    by = wide(cases[(cases["task"] != NOISE) & (cases["step"] > 1)])
    others = ["shampoo 1/4", "order 1", "shampoo 1/2", "row-wise", "diagonal"]
    rows = DataFrame({"other": others, "cases": len(by)})
    for measure, sign in (("root", 1), ("inverse", 1), ("angle", -1)):
        rows[measure] = [int((sign * (by[measure]["caspr"] - by[measure][other]) > 0).sum()) for other in others]
    return table(
        rows,
        "In how many cases CASPR is nearer than another preconditioner",
        heads={"other": "than", "root": "to F^½", "inverse": "to F^−½", "angle": "to the update"},
        note="Layers, seeds and steps after the first; to F^½ and F^−½ by cosine, to the update by angle.",
    )


# ---- figures -----------------------------------------------------------------------------------------------------

FIGURES = {
    "root": ("cosine", "Cosine of each preconditioner with F^½ over training."),
    "inverse": ("cosine", "Cosine of each inverse with F^−½ over training."),
    "angle": ("degrees", "Angle between each update and that of full-matrix Adagrad over training."),
}


def _figure(cases: DataFrame, measure: str, unit: str, title: str) -> Figure:
    caption = f"{title} Mean over layers and seeds, band ± one standard deviation; the x axis is the step."
    return panels.figure(measure, caption, cases, STYLES, ("task", "preconditioner", "step", measure), unit=unit)
