"""The tables and figures of ``caspr-verify regret``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from caspr_cli.report import look
from caspr_cli.report.answer import Column, Figure, Sheet
from caspr_cli.theory import panels
from caspr_cli.theory.learners import METHODS, Method
from caspr_cli.theory.online import RUNGS, Runs
from caspr_cli.theory.played import Played, limits, rate

STYLES = {
    "full-matrix Adagrad": look.KNOWN["full_adagrad"],
    "order 1": look.Style("green", look.DASHED),
    "CASPR": look.KNOWN["caspr"],
    "order 3": look.Style("purple", look.DASHDOT),
    "Shampoo": look.KNOWN["shampoo"],
    "diagonal Adagrad": look.Style("grey", look.SOLID),
    "gradient descent": look.Style("ink", look.DOTTED),
}
RUNG_HEADS = {
    "regret": "regret", "linear": "(a) linear", "distances": "(b) distances", "largest": "(c) D² λ_max",
    "trace": "(d) D² tr X", "full": "(e) tr F~^½", "bound": "(f) bound",
}  # fmt: skip
MARKS = (1, 3, 10, 30, 100, 300)  # rounds at which curves are drawn, and the last
CALM = 10  # rounds before which regret is the luck of a few samples


def sheets(
    played: Sequence[Played],
    departed: Sequence[Played],
    chains: Mapping[str, Tensor],
    example: Sequence[tuple[Method, Runs]],
) -> tuple[Sheet, ...]:
    return (
        problems(played), practice(played), theorem(played), rungs(played), sizes(chains), departures(departed),
        forgotten(example),
    )  # fmt: skip


def figures(played: Sequence[Played]) -> tuple[Figure, ...]:
    return regret_figure(played), bound_figure(played), ladder_figure(played)


def problems(played: Sequence[Played]) -> Sheet:
    found = {p.problem.name: p.problem for p in played}
    rows = [
        {
            "problem": name, "about": p.about, "m": p.best.shape[1], "n": p.best.shape[2], "rank": p.rank,
            "rounds": p.rounds, "seeds": len(p.best), "radius": float(torch.linalg.matrix_norm(p.best).mean()),
        }
        for name, p in found.items()
    ]  # fmt: skip
    return Sheet(
        "problems",
        "The problems",
        (
            Column("problem", "problem"),
            Column("about", "what it is"),
            Column("m", "m"),
            Column("n", "n"),
            Column("rank", "r"),
            Column("rounds", "rounds", ","),
            Column("seeds", "seeds"),
            Column("radius", "‖W*‖", ".3g"),
        ),
        tuple(rows),
        note="W is m x n; r: no gradient has a larger rank; W*: the best fixed W in hindsight, by Newton's method to "
        "1e-10 of the loss. Labels of the two problems of real data are smoothed by a tenth, so that there is one.",
    )


def practice(played: Sequence[Played]) -> Sheet:
    """At the best step of the grid."""
    least = {p.problem.name: min(fmean(q.regret) for q in played if q.problem is p.problem) for p in played}
    rows = [
        {
            "problem": p.problem.name,
            "method": p.method.label,
            "regret": fmean(p.regret),
            "sd": stdev(p.regret) if len(p.regret) > 1 else None,
            "ratio": fmean(p.regret) / least[p.problem.name],
            "step": 0.5**p.chosen,
            "edge": "edge" if p.at_edge else "",
        }
        for p in played
    ]
    return Sheet(
        "practice",
        "Regret at the best step size of a grid, the same for all",
        (
            Column("problem", "problem"),
            Column("method", "method"),
            Column("regret", "regret", ".4g"),
            Column("sd", "± sd", ".2g"),
            Column("ratio", "of the least", ".3f"),
            Column("step", "η / ‖W*‖", ".3g"),
            Column("edge", "of the grid"),
        ),
        tuple(rows),
        note="Mean and standard deviation over seeds; the step is the one whose mean is least.",
    )


def theorem(played: Sequence[Played]) -> Sheet:
    """With the theorem's step."""
    rows = [
        {
            "problem": p.problem.name,
            "method": p.method.label,
            "regret": fmean(p.theorem.at_end[:, 0].tolist()),
            "bound": float(limits(p.theorem)[:, -1].mean()),
            "share": fmean(p.share),
            "trace": float(p.theorem.sizes[:, 0, -1].mean()),
            "strayed": float(p.strayed.max()),
        }
        for p in played
    ]
    return Sheet(
        "theorem",
        "Regret and bound with the theorem's step η = D/√(2r), D = 2‖W*‖, W in the ball of radius ‖W*‖",
        (
            Column("problem", "problem"),
            Column("method", "method"),
            Column("regret", "regret", ".4g"),
            Column("bound", "√(2r) D tr X_T", ".4g"),
            Column("share", "regret / bound", ".3f"),
            Column("trace", "tr X_T", ".4g"),
            Column("strayed", "distance without the ball / D", ".3g"),
        ),
        tuple(rows),
        note="Means over seeds; of the last column the largest. For full-matrix Adagrad, diagonal Adagrad and "
        "gradient descent r is 1; for diagonal Adagrad distances are those of the largest entry; for gradient descent "
        "tr X_T is max ‖G_t‖ √T.",
    )


def rungs(played: Sequence[Played]) -> Sheet:
    """The ladder from regret to bound."""
    rows = [
        {"problem": p.problem.name, "method": p.method.label}
        | {name: _mean(p.ladder.rungs[name] / p.ladder.rungs["bound"]) for name in RUNGS}
        for p in played
    ]
    return Sheet(
        "ladder",
        "From regret to bound: each inequality of the proof, in units of its end",
        (
            Column("problem", "problem"),
            Column("method", "method"),
            *(Column(name, RUNG_HEADS[name], ".3f") for name in RUNGS),
        ),
        tuple(rows),
        note="Of the theorem's runs, means over seeds; here with the D that was seen. (a) f is convex; (b) "
        "telescoped, the distance at the end dropped; (c) D for all distances; (d) tr for λ_max; (e) the sum of ⟨G, "
        "X⁻¹G⟩ by the full matrix; (f) the full matrix by X_T. Of diagonal Adagrad (c) and (d) are one.",
    )


def _mean(values: Tensor) -> float | None:
    mean = float(values.mean())
    return None if math.isnan(mean) else mean


def sizes(chains: Mapping[str, Tensor]) -> Sheet:
    """Traces on the same gradients."""
    names = ("full", "order1", "caspr", "order3", "shampoo")
    rows = []
    for problem, found in chains.items():
        row: dict[str, Any] = {"problem": problem}
        row |= {name: float(found[:, i].mean()) for i, name in enumerate(names)}
        ratios = found[:, 2] / found[:, 4]
        rows.append(row | {"ratio": float(ratios.mean()), "least": float(ratios.min())})
    heads = ("tr F~^½", "tr X₁", "tr X₂ (CASPR)", "tr X₃", "tr X_Shampoo")
    return Sheet(
        "traces",
        "Traces of all preconditioners on the gradients that CASPR saw",
        (
            Column("problem", "problem"),
            *(Column(name, head, ".4g") for name, head in zip(names, heads, strict=True)),
            Column("ratio", "tr X₂ / tr X_Shampoo", ".4f"),
            Column("least", "least over seeds", ".4f"),
        ),
        tuple(rows),
        note="Means over seeds, with the theorem's step. F~ has the 1/r.",
    )


def departures(departed: Sequence[Played]) -> Sheet:
    """CASPR with what the theorem does not allow."""
    own = {p.problem.name: fmean(p.regret) for p in departed if p.method.name == "caspr"}
    rows = [
        {
            "problem": p.problem.name,
            "method": p.method.label,
            "regret": fmean(p.regret),
            "ratio": fmean(p.regret) / own[p.problem.name],
            "shrank": float((p.ladder.growth < -1e-8).double().mean()),
            "sums": float(p.ladder.sums.max()),
            "share": max(p.share),
        }
        for p in departed
    ]
    return Sheet(
        "departures",
        "CASPR with old roots and moving averages, which the theorem does not allow",
        (
            Column("problem", "problem"),
            Column("method", "statistics and roots"),
            Column("regret", "regret, best step", ".4g"),
            Column("ratio", "of fresh sums", ".4g"),
            Column("shrank", "rounds where X did not grow", ".0%"),
            Column("sums", "Σ⟨G, X⁻¹G⟩ / 2r tr F~^½", ".3g"),
            Column("share", "regret / bound", ".3g"),
        ),
        tuple(rows),
        note="Regret at the best step of the grid, mean over seeds; the rest of runs with the theorem's step, in the "
        "ball: the last two columns are the largest over seeds, and theorems would have them at most 1. A moving "
        "average is taken t times, so that its steps shrink as those of a sum.",
    )


def forgotten(example: Sequence[tuple[Method, Runs]]) -> Sheet:
    """The sequence on which moving averages fail."""
    rounds = example[0][1].regret.shape[-1]
    marks = [rounds // 8, rounds // 4, rounds // 2, rounds]
    rows = [
        {
            "method": method.label, "rounds": t, "rate": rate(runs, t),
            "share": float(runs.regret[0, 0, t - 1] / limits(runs)[0, t - 1]),
        }
        for method, runs in example
        for t in marks
    ]  # fmt: skip
    return Sheet(
        "forgetting",
        "A sequence on which a moving average learns the wrong thing (one number, W in a ball)",
        (
            Column("method", "statistics"),
            Column("rounds", "rounds", ","),
            Column("rate", "regret a round", ".3f"),
            Column("share", "regret / bound", ".3f"),
        ),
        tuple(rows),
        note="f_t(w) = 60 w in every 51st round and -w in the others, w in [-1, 1]: after Reddi, Kale, Kumar (ICLR "
        "2018). Of one number all preconditioners of this page but gradient descent are the same.",
    )


# ---- figures -----------------------------------------------------------------------------------------------------


def _curve(label: str, values: Tensor, after: int = 0) -> panels.Line:
    """Of values ``[S, T]``, at some rounds."""
    rounds = values.shape[1]
    marks = [t for t in MARKS if after <= t < 0.45 * rounds] + [rounds]
    at = values[:, [t - 1 for t in marks]]
    sd = at.std(0) if len(at) > 1 else torch.zeros(len(marks))
    return panels.Line(label, marks, at.mean(0).tolist(), sd.tolist())


def _panels(played: Sequence[Played], lines: Any) -> dict[str, list[panels.Line]]:
    found: dict[str, list[panels.Line]] = {}
    for p in played:
        found.setdefault(p.problem.name, []).extend(lines(p))
    return found


def _alt(title: str, shown: Mapping[str, Sequence[panels.Line]]) -> str:
    ends = (
        f"{name}: " + ", ".join(f"{line.label} {line.mean[-1]:.3g}" for line in lines) for name, lines in shown.items()
    )
    return f"{title} At the end, {'; '.join(ends)}."


def regret_figure(played: Sequence[Played]) -> Figure:
    title = (
        "Regret up to each round in units of CASPR's, each method at the best step of the grid: mean over seeds, band "
        "± one standard deviation."
    )
    own = {p.problem.name: p.grid.regret[:, p.chosen] for p in played if p.method.name == "caspr"}

    def lines(p: Played) -> list[panels.Line]:
        return [_curve(p.method.label, p.grid.regret[:, p.chosen] / own[p.problem.name], after=CALM)]

    shown = _panels(played, lines)
    alt = _alt(title, shown)
    svg = panels.drawn(shown, STYLES, name="regret", alt=alt, y="regret / CASPR's", x="round")
    return Figure("regret", title, svg, alt)


def bound_figure(played: Sequence[Played]) -> Figure:
    title = "Regret with the theorem's step (lines) and the bound √(2r) D tr X_t beside it (dotted)."
    chosen = {"full": "amber", "caspr": "blue", "shampoo": "vermilion", "diagonal": "grey"}
    styles = {}
    for method in METHODS:
        if method.name in chosen:
            styles[method.label] = look.Style(chosen[method.name], look.SOLID)
            styles[f"{method.label}, bound"] = look.Style(chosen[method.name], look.DOTTED)

    def lines(p: Played) -> list[panels.Line]:
        if p.method.name not in chosen:
            return []
        return [
            _curve(p.method.label, p.theorem.regret[:, 0]),
            _curve(f"{p.method.label}, bound", limits(p.theorem)),
        ]

    shown = _panels(played, lines)
    alt = _alt(title, shown)

    def finish(axes: Axes) -> None:
        panels.logarithmic(axes)
        least = min(line.mean[-1] for lines in shown.values() for line in lines)
        axes.set_ylim(bottom=least / 30)

    svg = panels.drawn(shown, styles, name="bound", alt=alt, y="regret", x="round", finish=finish, legend_columns=2)
    return Figure("bound", title, svg, alt)


def ladder_figure(played: Sequence[Played]) -> Figure:
    title = "What each inequality of the proof multiplies, from regret (1) to bound, mean over seeds."
    chosen = ("full", "caspr", "shampoo")
    places = list(range(len(RUNGS)))

    def lines(p: Played) -> list[panels.Line]:
        if p.method.name not in chosen:
            return []
        ratios = [float((p.ladder.rungs[name] / p.ladder.rungs["regret"]).mean()) for name in RUNGS]
        return [panels.Line(p.method.label, places, ratios, [0.0] * len(RUNGS))]

    shown = _panels(played, lines)
    alt = _alt(title, shown)

    def finish(axes: Axes) -> None:
        panels.logarithmic(axes)
        axes.set_xticks(places, ["–", "a", "b", "c", "d", "e", "f"])

    styles = {m.label: STYLES[m.label] for m in METHODS if m.name in chosen}
    svg = panels.drawn(
        shown, styles, name="ladder", alt=alt, y="over the regret", x="step of the proof", log=False, finish=finish
    )
    return Figure("ladder", title, svg, alt)
