"""``caspr-verify regret``: how much regret has CASPR on online convex problems, and how far is the bound from it?"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from pandas import DataFrame, Series, concat
from torch import Tensor

from caspr_cli.report import style
from caspr_cli.report.answer import Answer, Figure, judged, table
from caspr_cli.theory import online, panels
from caspr_cli.theory.choices import Seeds
from caspr_cli.theory.gradients import Log
from caspr_cli.theory.online import DEPARTURES, HALVINGS, METHODS, RUNGS, Method, Played, Runs
from caspr_cli.theory.problems import all_problems, forgetting

QUESTION = "Is CASPR's regret smaller than Shampoo's, as its smaller bound suggests?"
ROUNDS, QUICK_ROUNDS = 200, 16
CHAIN = {"full": "tr F~^½", "order1": "tr X₁", "caspr": "tr X₂ (CASPR)", "order3": "tr X₃", "shampoo": "tr X_Shampoo"}
ORDERS = [1.0, 2.0, 3.0, math.inf]  # of the chain, without the first
ROUNDING = 1e-8  # relative: below this no inequality is asked for
EXAMPLE = (Method("sum", "sum", 2), Method("average", "moving average, beta 0.9", 2, beta=0.9))
EXAMPLE_ROUNDS = 2040
RUNG_HEADS = dict(zip(RUNGS, ("regret", "(a) linear", "(b) distances", "(c) D² λ_max", "(d) D² tr X", "(e) tr F~^½",
                              "(f) bound"), strict=True))  # fmt: skip
MARKS = (1, 3, 10, 30, 100, 300)  # rounds at which curves are drawn, and the last
CALM = 10  # rounds before which regret is the luck of a few samples
STYLES = {
    "full-matrix Adagrad": style.KNOWN["full_adagrad"],
    "order 1": style.Style("green", style.DASHED),
    "CASPR": style.KNOWN["caspr"],
    "order 3": style.Style("purple", style.DASHDOT),
    "Shampoo": style.KNOWN["shampoo"],
    "diagonal Adagrad": style.Style("grey", style.SOLID),
    "gradient descent": style.Style("ink", style.DOTTED),
}

Example = Sequence[tuple[Method, Runs]]


def answer(choice: Seeds, log: Log = lambda text: None) -> Answer:
    log("problems: the best W of each")
    problems = all_problems(rounds=QUICK_ROUNDS if choice.quick else ROUNDS, seeds=list(choice.all_seeds))
    played = [online.play_all(problem, method, log) for problem in problems for method in METHODS]
    departed = [online.play_all(problem, method, log) for problem in problems for method in DEPARTURES]
    chains = {problem.name: online.traces(problem, ORDERS) for problem in problems}
    log("a sequence on which moving averages fail")
    hard = forgetting(EXAMPLE_ROUNDS // 8 if choice.quick else EXAMPLE_ROUNDS)
    example = [(method, online.play(hard, method, *online.of_theorem(hard, method))) for method in EXAMPLE]
    seen, others, claims = frame(played), frame(departed), claims_of(played, chains)
    return Answer(
        name="regret",
        question=QUESTION,
        formula="regret ≤ √(2r) D tr X_T",
        verdict=judged(list(ratios(seen) < 1)),
        finding=finding(seen, all(held for _, held in claims)),
        tables={
            "problems": _problems(played),
            "practice": _practice(seen),
            "comparison": _comparison(seen, chains),
            "theorem": _theorem(seen),
            "methods": _methods(seen),
            "ladder": _ladder(seen),
            "traces": _traces(chains),
            "departures": _departures(others),
            "forgetting": _forgetting(example),
        },
        figures=(_regret_figure(played), _bound_figure(played), _ladder_figure(seen)),
        claims=claims,
        counterexamples=tuple(_counterexamples(departed, example)),
    )


def frame(played: Sequence[Played]) -> DataFrame:
    """Return a row for each problem, method and seed."""
    found = []
    for p in played:
        limits = p.theorem.limits()[:, -1]
        columns = {
            "regret": p.grid.at_end[:, p.chosen],
            "theorem": p.theorem.at_end[:, 0],
            "bound": limits,
            "share": p.theorem.at_end[:, 0] / limits,
            "trace": p.theorem.sizes[:, 0, -1],
            "strayed": p.strayed,
            "shrank": (p.ladder.growth < -ROUNDING).double().mean(1),
            "sums": p.ladder.sums,
            **{f"rung {name}": p.ladder.rungs[name] for name in RUNGS},
        }
        own = DataFrame({name: values.tolist() for name, values in columns.items()}).rename_axis("seed").reset_index()
        edge = "edge" if p.chosen in (HALVINGS[0], HALVINGS[-1]) else ""
        found.append(own.assign(problem=p.problem.name, method=p.method.label, step=0.5**p.chosen, edge=edge))
    return concat(found, ignore_index=True)


def ordered(values: Sequence[Tensor]) -> bool:
    """Return whether each is at most the next, up to rounding; what is not a number is left out."""
    known = [value for value in values if not bool(torch.isnan(value).any())]
    return all(bool((a <= b + ROUNDING * b.abs()).all()) for a, b in pairwise(known))


def claims_of(played: Sequence[Played], chains: Mapping[str, Tensor]) -> tuple[tuple[str, bool], ...]:
    ladders = [p.ladder for p in played]
    grid = all(ordered([p.grid.at_end, p.grid.bound()[..., -1]]) for p in played)
    ball = all(ordered([p.theorem.regret[:, 0], p.theorem.limits()]) for p in played)
    proof = all(ordered([ladder.rungs[name] for name in RUNGS]) for ladder in ladders)
    grows = all(float(ladder.growth.min()) >= -ROUNDING for ladder in ladders)
    sums = all(float(ladder.sums.max()) <= 1 + ROUNDING for ladder in ladders)
    order = all(ordered(list(found.unbind(1))) for found in chains.values())
    return (
        ("Regret ≤ (D²/2η + ηr) tr X_T, at every step size of the grid", grid),
        ("Regret ≤ √(2r) D tr X_T, with η = D/√(2r) and W kept in a ball", ball),
        ("every inequality on the way to the bound", proof),
        ("sums: X_t ⪰ X_{t−1}, in every round", grows),
        ("Σ⟨G_t, X_t⁻¹G_t⟩ ≤ 2r tr F~_T^½", sums),
        ("tr F~^½ ≤ tr X₁ ≤ tr X₂ ≤ tr X₃ ≤ tr X_Shampoo, of the same gradients", order),
    )


def _counterexamples(departed: Sequence[Played], example: Example) -> Iterator[str]:
    growth = torch.cat([p.ladder.growth.flatten() for p in departed if p.method.beta is not None])
    sums = torch.cat([p.ladder.sums for p in departed if p.method.interval > 1])
    runs = example[1][1]
    ratio = float(runs.regret[0, 0, -1] / runs.limits()[0, -1])
    shrank = int((growth < -ROUNDING).sum())
    yield f"X_t ⪰ X_(t−1) for moving averages: false in {shrank:,} of {growth.numel():,} rounds"
    yield (
        f"Σ⟨G, X⁻¹G⟩ ≤ 2r tr F~^½ with old roots: false in {int((sums > 1).sum())} of {len(sums)} runs (at most "
        f"{float(sums.max()):.3g} times the right side)"
    )
    yield (
        "Regret ≤ √(2r) D tr X_T for moving averages, W in a ball: on a sequence made for it, the regret is "
        f"{ratio:.2g} times the right side"
    )


def _by(seen: DataFrame, column: str) -> DataFrame:
    """Return the means over seeds: problems by methods."""
    return seen.groupby(["problem", "method"], sort=False)[column].mean().unstack(sort=False)


def ratios(seen: DataFrame) -> Series:
    """Return by problem the regret of CASPR over that of Shampoo."""
    regret = _by(seen, "regret")
    return regret["CASPR"] / regret["Shampoo"]


def finding(seen: DataFrame, held: bool) -> str:
    if not held:
        return "A bound or a step of its proof failed: see the statements."
    ratio, share = ratios(seen), seen.loc[seen["method"] == "CASPR", "share"]
    return (
        f"CASPR's regret is {ratio.min():.2f} to {ratio.max():.2f} of Shampoo's; the bound holds everywhere, and is "
        f"{1 / share.max():.0f} to {1 / share.min():.0f} times CASPR's regret."
    )


# ---- tables ------------------------------------------------------------------------------------------------------


def _problems(played: Sequence[Played]) -> DataFrame:
    rows = [
        {"problem": p.name, "about": p.about, "m": p.best.shape[1], "n": p.best.shape[2], "rank": p.rank,
         "rounds": p.rounds, "seeds": len(p.best), "radius": float(torch.linalg.matrix_norm(p.best).mean())}
        for p in {p.problem.name: p.problem for p in played}.values()
    ]  # fmt: skip
    return table(
        rows,
        "The problems",
        heads={"about": "what it is", "rank": "r", "radius": "‖W*‖"},
        formats={"rounds": ",", "radius": ".3g"},
        note="W is m x n; r: no gradient has a larger rank; W*: the best fixed W in hindsight, by Newton's method to "
        "1e-10 of the loss. Labels of the two problems of real data are smoothed by a tenth, so that there is one.",
    )


def _means(seen: DataFrame, **how: str) -> DataFrame:
    """Return columns over seeds, each by its own aggregation, for each problem and method."""
    return seen.groupby(["problem", "method"], sort=False).agg(how).reset_index()


def _practice(seen: DataFrame) -> DataFrame:
    found = _means(seen.assign(sd=seen["regret"]), regret="mean", sd="std", step="first", edge="first")
    found.insert(4, "ratio", found["regret"] / found.groupby("problem")["regret"].transform("min"))
    return table(
        found,
        f"Regret at the best of {len(HALVINGS)} step sizes, the same for all",
        heads={"sd": "± sd", "ratio": "of the least", "step": "η / ‖W*‖", "edge": "of the grid"},
        formats={"regret": ".4g", "sd": ".2g", "ratio": ".3f", "step": ".3g"},
        note="Mean and standard deviation over seeds; the step is the one whose mean is least.",
    )


def _comparison(seen: DataFrame, chains: Mapping[str, Tensor]) -> DataFrame:
    regret, theorem, kept = _by(seen, "regret"), _by(seen, "theorem"), torch.cat(list(chains.values()))
    pairs = seen.pivot(index=["problem", "seed"], columns="method", values="regret")
    smaller = int((pairs["CASPR"] < pairs["Shampoo"]).sum())
    said = f"CASPR's regret over Shampoo's (smaller in {smaller} of {len(pairs)} pairs)"
    ratios = {
        said: regret["CASPR"] / regret["Shampoo"],
        "regret of the worst method over the least": regret.max(axis=1) / regret.min(axis=1),
        "CASPR's regret at the best step over that at the theorem's": regret["CASPR"] / theorem["CASPR"],
        "tr X₂ over Shampoo's trace, of the same gradients": kept[:, 2] / kept[:, -1],
        "tr X₂ over tr F~^½, of the same gradients": kept[:, 2] / kept[:, 0],
    }
    rows = [{"ratio": name, "least": float(r.min()), "most": float(r.max())} for name, r in ratios.items()]
    return table(rows, "CASPR against others, over problems", formats={"least": ".3f", "most": ".3f"})


def _theorem(seen: DataFrame) -> DataFrame:
    return table(
        _means(seen, theorem="mean", bound="mean", share="mean", trace="mean", strayed="max"),
        "Regret and bound with the theorem's step η = D/√(2r), D = 2‖W*‖, W in the ball of radius ‖W*‖",
        heads={"theorem": "regret", "bound": "√(2r) D tr X_T", "share": "regret / bound", "trace": "tr X_T",
               "strayed": "distance without the ball / D"},
        formats={"theorem": ".4g", "bound": ".4g", "share": ".3f", "trace": ".4g", "strayed": ".3g"},
        note="Means over seeds; of the last column the largest. For full-matrix Adagrad, diagonal Adagrad and "
        "gradient descent r is 1; for diagonal Adagrad distances are those of the largest entry; for gradient descent "
        "tr X_T is max ‖G_t‖ √T.",
    )  # fmt: skip


def _methods(seen: DataFrame) -> DataFrame:
    """Return how tight the bound is, and where on the way to it what is lost."""
    rows = []
    for method, own in seen.groupby("method", sort=False):
        heights = own[[f"rung {name}" for name in RUNGS]]
        positive = heights[(heights > 0).all(axis=1)]  # a regret may be negative
        logs = [math.nan] * len(RUNGS) if positive.empty else positive.map(math.log).mean().tolist()
        row = {"method": method, "least": own["share"].min(), "most": own["share"].max()}
        row |= {"beyond": int((own["strayed"] > 1).sum()), "runs": len(own), "farthest": own["strayed"].max()}
        row |= {name: math.exp(b - a) for name, (a, b) in zip(RUNGS[1:], pairwise(logs), strict=True)}
        rows.append(row | {"together": math.exp(logs[-1] - logs[0])})
    return table(
        rows,
        "How much of its bound each method's regret is, and which step of the proof loses the rest",
        heads={"least": "regret / bound, least", "beyond": "beyond D without a ball", "runs": "of",
               "farthest": "at most"} | {name: RUNG_HEADS[name][:3] for name in RUNGS[1:]},
        formats={"least": ".1%", "most": ".1%", "farthest": ".2g"} | dict.fromkeys((*RUNGS[1:], "together"), ".2f"),
        note="Over problems and seeds, with the theorem's step; factors (a) to (f) are geometric means: (a) "
        "convexity; (b) the distance at the end, and the gain of projections; (c) D for all distances; (d) tr for "
        "λ_max; (e) tr F~^½ in place of the sum of ⟨G, X⁻¹G⟩; (f) tr X_T in place of tr F~^½. Without a ball around W, "
        "some runs with the theorem's step come further than D, and the theorem says nothing of them.",
    )  # fmt: skip


def _ladder(seen: DataFrame) -> DataFrame:
    found = seen[["problem", "method"]].copy()
    for name in RUNGS:
        found[name] = seen[f"rung {name}"] / seen["rung bound"]
    return table(
        found.groupby(["problem", "method"], sort=False).mean().reset_index(),
        "From regret to bound: each inequality of the proof, in units of its end",
        heads=RUNG_HEADS,
        formats=dict.fromkeys(RUNGS, ".3f"),
        note="Of the theorem's runs, means over seeds; here with the D that was seen. (a) f is convex; (b) "
        "telescoped, the distance at the end dropped; (c) D for all distances; (d) tr for λ_max; (e) the sum of ⟨G, "
        "X⁻¹G⟩ by the full matrix; (f) the full matrix by X_T. For diagonal Adagrad (c) and (d) are one.",
    )


def _traces(chains: Mapping[str, Tensor]) -> DataFrame:
    found = DataFrame({problem: own.mean(0).tolist() for problem, own in chains.items()}, index=list(CHAIN)).T
    ratios = {problem: own[:, 2] / own[:, 4] for problem, own in chains.items()}
    found["ratio"], found["least"] = ([float(how(r)) for r in ratios.values()] for how in (torch.mean, torch.min))
    return table(
        found.rename_axis("problem").reset_index(),
        "Traces of all preconditioners on the gradients that CASPR saw",
        heads=CHAIN | {"ratio": "tr X₂ / tr X_Shampoo", "least": "least over seeds"},
        formats=dict.fromkeys(CHAIN, ".4g") | {"ratio": ".4f", "least": ".4f"},
        note="Means over seeds, with the theorem's step. F~ has the 1/r.",
    )


def _departures(others: DataFrame) -> DataFrame:
    found = _means(others, regret="mean", shrank="mean", sums="max", share="max")
    own = found["problem"].map(found[found["method"] == DEPARTURES[0].label].set_index("problem")["regret"])
    found.insert(3, "ratio", found["regret"] / own)
    return table(
        found,
        "CASPR with old roots and moving averages, which the theorem does not allow",
        heads={"method": "statistics and roots", "regret": "regret, best step", "ratio": "of fresh sums",
               "shrank": "rounds where X did not grow", "sums": "Σ⟨G, X⁻¹G⟩ / 2r tr F~^½", "share": "regret / bound"},
        formats={"regret": ".4g", "ratio": ".4g", "shrank": ".0%", "sums": ".3g", "share": ".3g"},
        note="Regret at the best step of the grid, mean over seeds; the rest is from runs with the theorem's step, in "
        "the ball: the last two columns are the largest over seeds, and theorems would have them at most 1. A moving "
        "average is taken t times, so that its steps shrink as those of a sum.",
    )  # fmt: skip


def _forgetting(example: Example) -> DataFrame:
    T = example[0][1].regret.shape[-1]
    rows = [
        {"method": method.label, "rounds": t, "rate": float(runs.regret[0, 0, t - 1]) / t,
         "share": float(runs.regret[0, 0, t - 1] / runs.limits()[0, t - 1])}
        for method, runs in example
        for t in (T // 8, T // 4, T // 2, T)
    ]  # fmt: skip
    return table(
        rows,
        "A sequence on which a moving average learns the wrong thing (one number, W in a ball)",
        heads={"method": "statistics", "rate": "regret a round", "share": "regret / bound"},
        formats={"rounds": ",", "rate": ".3f", "share": ".3f"},
        note="f_t(w) = 60 w in every 51st round and -w in the others, w in [-1, 1]: after Reddi, Kale, Kumar (ICLR "
        "2018). For one number all preconditioners of this page but gradient descent are the same.",
    )


# ---- figures -----------------------------------------------------------------------------------------------------

LINES = ("problem", "method", "round", "regret")  # panel, line, x and y


def _curve(p: Played, line: str, values: Tensor, after: int = 0) -> DataFrame:
    """Return values ``[S, T]`` at some rounds, as rows."""
    marks = [t for t in MARKS if after <= t < 0.45 * values.shape[1]] + [values.shape[1]]
    at = values[:, [t - 1 for t in marks]].flatten().tolist()
    return DataFrame({"problem": p.problem.name, "method": line, "round": marks * len(values), "regret": at})


def _regret_figure(played: Sequence[Played]) -> Figure:
    regret = {(p.problem.name, p.method.label): p.grid.regret[:, p.chosen] for p in played}
    ratios = {key: own / regret[key[0], "CASPR"] for key, own in regret.items()}
    data = concat(_curve(p, p.method.label, ratios[p.problem.name, p.method.label], CALM) for p in played)
    title = (
        "Regret up to each round in units of CASPR's, each method at the best step of the grid: mean over seeds, band "
        "± one standard deviation."
    )
    return panels.figure("regret", title, data, STYLES, LINES, unit="regret / CASPR's")


def _bound_figure(played: Sequence[Played]) -> Figure:
    hues = {"full-matrix Adagrad": "amber", "CASPR": "blue", "Shampoo": "vermilion", "diagonal Adagrad": "grey"}
    styles: dict[str, style.Style] = {}
    for label, hue in hues.items():
        styles |= {label: style.Style(hue, style.SOLID), f"{label}, bound": style.Style(hue, style.DOTTED)}
    shown = [p for p in played if p.method.label in hues]
    lines = [_curve(p, p.method.label, p.theorem.regret[:, 0]) for p in shown]
    lines += [_curve(p, f"{p.method.label}, bound", p.theorem.limits()) for p in shown]
    least = min(float(p.theorem.regret[:, 0, -1].mean()) for p in shown)
    title = "Regret with the theorem's step (lines) and the bound √(2r) D tr X_t beside it (dotted)."
    finish = panels.logarithmic(ylim=(least / 30, None))
    return panels.figure("bound", title, concat(lines), styles, LINES, finish=finish, legend_columns=2)


def _ladder_figure(seen: DataFrame) -> Figure:
    styles = {label: STYLES[label] for label in ("full-matrix Adagrad", "CASPR", "Shampoo")}
    x, columns = "step of the proof", {f"rung {name}": place for place, name in enumerate(RUNGS)}
    heights = seen[list(columns)].div(seen["rung regret"], axis=0).rename(columns=columns)
    means = heights.groupby([seen["problem"], seen["method"]], sort=False).mean()  # a band would hide the others
    title = "What each inequality of the proof multiplies, from regret (1) to bound, mean over seeds."
    data, shown = means.reset_index().melt(["problem", "method"], var_name=x), ("problem", "method", x, "value")
    finish = panels.logarithmic(xticks=range(len(RUNGS)), xticklabels=["–", "a", "b", "c", "d", "e", "f"])
    return panels.figure("ladder", title, data, styles, shown, unit="over the regret", log=False, finish=finish)
