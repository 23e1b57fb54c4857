"""``caspr-verify roots``: how exact are inverse roots, what do they cost, and which damping do they need?

One table each for complexity, stability, the choice of damping, and low precision.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import geometric_mean
from typing import Any

import torch
from pandas import DataFrame, concat

from caspr_cli.report.answer import Answer, Figure, judged, table
from caspr_cli.report.style import DASHED, DOTTED, SOLID, Style
from caspr_cli.theory import panels
from caspr_cli.theory.choices import Seeds
from caspr_cli.theory.gradients import Log
from caspr_cli.theory.precision import TF32, roundoff
from caspr_cli.theory.rounding import SMALL, cases, constants_of, cost_of, moved
from caspr_cli.theory.solvers import BY_NAME, OURS, SOLVERS, Matrix, P, threads

QUESTION = "Are inverse roots in float32 within 1 % wherever the default damping lets a condition be?"
CONDITIONS, QUICK_CONDITIONS = tuple(10.0**k for k in range(1, 13)), (1e1, 1e2, 1e4, 1e6, 1e8)
EXPONENTS = (2, 4, 6)  # of order 1, of CASPR and Shampoo, and of order 3
ROWS, QUICK_ROWS = 128, 48
DAMPINGS = tuple(10.0**k for k in range(-12, -1))
ILL = 1e8  # the condition at which dampings are compared
SCALES = tuple(10.0**k for k in (-12, -8, -4, 0, 4))  # of largest eigenvalues, for absolute damping
ABSOLUTE = 1e-6
DEFAULT = 1e-6  # the library's damping, relative
SIZES, QUICK_SIZES = (16, 32, 64, 128, 256, 512, 1024), (16, 32, 64)
SIZED_CONDITION = 1e6
GOOD = 1e-2  # an error that an update does not notice
LEAST = 1e-12  # the smallest error that float64, in which roots are compared, can show
WITHIN = 2.0  # a factor
NAMES = tuple(solver.name for solver in SOLVERS)
STORED, EIGH, NEWTON = "stored in float32", "eigh, float32", "newton, float32"
CONDITION, LIBRARY, DAMPING, SCALE = "conditions", "default", "dampings", "scales"

# ---- measurement -------------------------------------------------------------------------------------------------


def measured(quick: bool, seeds: Sequence[int], log: Log) -> tuple[DataFrame, DataFrame]:
    """Return all errors and all costs, on one thread, as each matrix has in the optimizer."""
    conditions, d = (QUICK_CONDITIONS, QUICK_ROWS) if quick else (CONDITIONS, ROWS)
    scales = [ABSOLUTE / scale for scale in SCALES]
    plans: dict[str, tuple[Sequence[float], Sequence[float], Sequence[int]]]
    plans = {CONDITION: (conditions, (0.0,), EXPONENTS), LIBRARY: (conditions, (DEFAULT,), (P,))}
    plans |= {DAMPING: ((ILL,), DAMPINGS, (P,)), SCALE: ((ILL,), scales, (P,))}
    rows: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    with threads(1):
        for name, plan in plans.items():
            log(f"errors: {name}")
            rows += ({"set": name} | row for row in cases(d, *plan, seeds))
        for size in QUICK_SIZES if quick else SIZES:
            log(f"time and memory: {size} rows")
            matrix = Matrix.drawn(size, SIZED_CONDITION, seeds[0])
            costs += (cost_of(solver, matrix, DEFAULT, P) for solver in OURS)
    return DataFrame(rows), DataFrame(costs)


# ---- answer ------------------------------------------------------------------------------------------------------


def answer(choice: Seeds, log: Log = lambda text: None) -> Answer:
    """Return errors, steps, seconds and bytes of all solvers; each seed is another basis."""
    found, costs = measured(choice.quick, list(choice.all_seeds), log)
    bare, default = found[found["set"] == CONDITION], found[found["set"] == LIBRARY]
    constants = constants_of(bare)
    return Answer(
        name="roots",
        question=QUESTION,
        formula="error ≤ (δκ / p) (1 − δκ)^(−1−1/p),   δ = ‖E‖₂ / ‖S‖₂",
        verdict=judged([far >= 1 / DEFAULT for far in reach(default).values()]),
        finding=finding(default),
        tables={
            "limits": _limits(found),
            "checks": _checks(found),
            "stability": _stability(bare),
            "exponents": _exponents(bare),
            "law": _law(constants),
            "damping": _damping(found[found["set"] == DAMPING]),
            "absolute": _absolute(found[found["set"] == SCALE]),
            "precision": _precision(default),
            "complexity": _complexity(costs),
            "roots": _everything(found, constants),
        },
        figures=(*_figures(bare, found[found["set"] == DAMPING]), _cost_figure(costs)),
        claims=_claims(found, costs),
        counterexamples=tuple(_counterexamples(bare)),
    )


def slope(bare: DataFrame, p: int) -> float:
    """Return the power of the condition with which the error of storing in float32 grows, between 1e2 and 1e6."""
    own = bare[(bare["solver"] == STORED) & (bare["p"] == p) & bare["condition"].between(1e2, 1e6)]
    errors = own.groupby("condition")["error"].agg(geometric_mean)
    return math.log(errors.iloc[-1] / errors.iloc[0]) / math.log(errors.index[-1] / errors.index[0])


def reach(cases: DataFrame) -> dict[str, float]:
    """Return the largest condition up to which the errors of each solver are good; NaN if there is none."""
    errors = cases[cases["p"] == P].groupby(["condition", "solver"])["error"].agg(geometric_mean).unstack()
    good = (errors <= GOOD).cummin()
    return {name: float(good.index[good[name]].max()) if good[name].any() else math.nan for name in NAMES}


def finding(default: DataFrame) -> str:
    far = {name: f"{k:.0e}" if k == k else "no condition" for name, k in reach(default).items()}
    return (
        f"With the default damping of {DEFAULT:g}, float32 roots are within {GOOD:.0%} up to a condition of "
        f"{far[NEWTON]} by Newton and {far[EIGH]} by eigh."
    )


def _exact_newton(found: DataFrame) -> DataFrame:
    return found[found["steps"].notna() & (found["solver"].map(lambda name: BY_NAME[name].bits != TF32))]


def _claims(found: DataFrame, costs: DataFrame) -> tuple[tuple[str, bool], ...]:
    predicted = found[found["predicted"].between(LEAST, SMALL)]
    storing = (predicted["error"] / predicted["predicted"]).between(1 / WITHIN, WITHIN).all()
    newton, large = _exact_newton(found), costs[costs["d"] >= 128]
    steps = (newton["steps"] <= newton["forecast"]).all()
    held = (large["mb"] / large["predicted_mb"] - 1).abs().le(0.1).all()
    near = f"within a factor of {WITHIN:g} of what a first order predicts, without any fit"
    worst = (found["ratio"] <= 1).all()
    counted = "was counted in their code (within 10 %, d of 128 or more)"
    return (
        (f"storing: measured errors are {near}", bool(storing)),
        ("the error in the 2-norm is at most (δκ/p)(1 − δκ)^(−1−1/p), δ = ‖E‖₂/‖S‖₂", bool(worst)),
        ("Newton takes no more steps than are forecast from condition and p", bool(steps)),
        (f"solvers hold as many d × d matrices as {counted}", bool(held)),
    )


def _counterexamples(bare: DataFrame) -> Iterator[str]:
    powers = ", ".join(f"{slope(bare, p):.2f} for p = {p}" for p in EXPONENTS)
    yield f"errors grow as κ^(1/p), the condition of the root: they grow as κ to the power {powers}"
    own = bare[(bare["solver"] == NEWTON) & (bare["coupled"] > 0) & (bare["error"] <= 1)]
    worst = own.loc[(own["error"] / own["coupled"]).idxmax()]
    yield (
        f"Newton's own max|M − I| shows the error of its root: it was {worst['coupled']:.0e} where the error is "
        f"{worst['error']:.0e} (condition {worst['condition']:.0e}, p = {worst['p']})"
    )


# ---- tables ------------------------------------------------------------------------------------------------------

FORMATS = {
    **dict.fromkeys((*NAMES, "predicted", "bfloat16", "bias"), ".1e"),
    **dict.fromkeys(("condition", "eps", "coupled", "residual", "largest", "bare", "default", "damping"), ".0e"),
    **dict.fromkeys(("steps", "cubes", "count"), ".0f"),
    **dict.fromkeys(("ms", "predicted_ms", "mb", "predicted_mb", "floor"), ".3g"),
    **dict.fromkeys(("middle", "least", "most", "ratio"), ".2f"),
    **dict.fromkeys(("accepted", "damped"), ".0%"),
    "cosine": ".4f",
    "eigh": ".2g",
}
HEADS = {"predicted": f"predicted: {STORED}", "damped": "eigenvalues below it", "bias": "root moved by"}
shown = partial(table, formats=FORMATS)


def _errors(cases: DataFrame, index: list[str]) -> DataFrame:
    """Return geometric means of errors over seeds: a column for each solver; nothing where a root is not finite."""
    found = cases.groupby([*index, "solver"], sort=False)["error"].agg(geometric_mean).unstack(sort=False)
    return found[list(NAMES)].replace(math.inf, math.nan)


def _summary(cases: DataFrame, index: list[str]) -> DataFrame:
    """Return errors, the predicted errors of storing S, and the course of Newton's iteration, over seeds."""
    predicted = {
        name: cases[cases["solver"] == f"stored in {name}"].groupby(index)["predicted"].mean()
        for name in ("float32", "bfloat16")
    }
    how = {"coupled": "median", "residual": "median", "steps": "max", "forecast": "first", "accepted": "mean"}
    newton = cases[cases["solver"] == NEWTON].groupby(index).agg(how)
    found = _errors(cases, index).assign(predicted=predicted["float32"], bfloat16=predicted["bfloat16"])
    return found.join(newton).reset_index()


def _limits(found: DataFrame) -> DataFrame:
    errors = _errors(found[found["set"] == DAMPING], ["eps"])
    rows = DataFrame({name: reach(found[found["set"] == name]) for name in (CONDITION, LIBRARY)})
    rows["damping"] = [errors.index[errors[name] <= GOOD].min() for name in rows.index]
    return shown(
        rows.set_axis(["bare", "default", "damping"], axis=1).rename_axis("solver").reset_index(),
        f"The largest condition up to which roots S^(-1/{P}) are within {GOOD:.0%}, and the damping that they need",
        heads={"bare": "without damping", "default": f"with {DEFAULT:g}", "damping": f"needed at {ILL:.0e}"},
        note=f"{found['d'].max()} rows, conditions of at most {found['condition'].max():.0e}; damping is relative to "
        "the largest eigenvalue. A dash: none of those that were tried.",
    )


def _checks(found: DataFrame) -> DataFrame:
    every = found[found["set"] != SCALE]
    lost = every[every["solver"].isin([solver.name for solver in OURS]) & (every["error"] > 0.1)]
    damped, newton = lost[lost["eps"] >= DEFAULT], _exact_newton(every)
    predicted = found[(found["set"] == CONDITION) & (found["predicted"] <= SMALL)]
    ratios = predicted["error"] / predicted["predicted"]
    counts = {
        "roots": len(every),
        "roots that are not finite": int((~every["finite"]).sum()),
        "float32 roots that are off by more than 10 %": len(lost),
        "of these, accepted by the optimizer's test of the residual": int(lost["accepted"].sum()),
        f"of these, with a damping of {DEFAULT:g} or more": len(damped),
        "of those, accepted": int(damped["accepted"].sum()),
        "least and most steps of Newton": f"{newton['steps'].min():.0f} to {newton['steps'].max():.0f}",
        "steps beyond the forecast, at most": int(max((newton["steps"] - newton["forecast"]).max(), 0)),
        "error of storing over its prediction": f"{ratios.min():.2f} to {ratios.max():.2f} in {len(ratios)} cases",
    }
    return table(
        [{"what": name, "value": str(value)} for name, value in counts.items()],
        "Stability in numbers",
        note="At high conditions the test asks no more of a residual than rounding lets it be.",
    )


def _stability(bare: DataFrame) -> DataFrame:
    first = ["predicted", STORED, EIGH, NEWTON, "coupled", "residual", "steps", "forecast", "accepted"]
    own = bare[bare["p"] == P]
    return shown(
        _summary(own, ["condition"])[["condition", *first, *(name for name in NAMES if name not in first)]],
        f"Stability: error of S^(-1/{P}) by condition, without damping",
        heads=HEADS | {"coupled": "max|M−I| of the last", "residual": "its residual", "steps": "its steps"},
        note=f"Relative, Frobenius norm, geometric means over seeds; {own['d'].max()} rows with eigenvalues from 1 to "
        "1/condition, evenly spaced in the logarithm. Stored: the exact root of S as the type has it.",
    )


def _exponents(bare: DataFrame) -> DataFrame:
    columns = ["condition", "p", "predicted", STORED, EIGH, NEWTON, "newton, float64", "steps", "forecast"]
    return shown(
        _summary(bare, ["condition", "p"])[columns],
        "Exponents: errors of S^(-1/p), without damping",
        heads=HEADS | {"steps": "steps of newton, float32"},
        note="p is 2q for order q, 4 for CASPR and Shampoo.",
    )


def _law(constants: DataFrame) -> DataFrame:
    return shown(
        constants.rename_axis("solver").reset_index(),
        "Solvers: c, the backward error ‖E‖₂ in units of u‖S‖₂ that explains their errors at all conditions and "
        "exponents",
        heads={"middle": "c, median", "count": "roots", "floor": "error / u at the least condition"},
        note="From conditions of 1e3 on, where the error is below 2 %. Below that the rounding of the result decides. "
        "TF32: u is that of its 11 bits.",
    )


def _damped(cases: DataFrame) -> DataFrame:
    """Return the errors by damping, and the effect of damping on the root and on an update."""
    values = torch.logspace(0, -math.log10(ILL), int(cases["d"].max()), dtype=torch.float64)
    found = _summary(cases, ["eps"])
    return found.join(DataFrame([moved(values, eps) for eps in found["eps"]]))


def _damping(cases: DataFrame) -> DataFrame:
    names = [name for name in NAMES if not name.endswith("float64")]
    return shown(
        _damped(cases)[["eps", "damped", "cosine", "bias", "predicted", *names]],
        f"Damping, relative to the largest eigenvalue: its effect, and the error that is left (condition {ILL:.0e})",
        heads=HEADS,
        note="Cosine: of (S + eps λ I)^(-1/2) G to S^(-1/2) G, for G of covariance S; moved: ‖S~^(-1/4) − S^(-1/4)‖ / "
        "‖S^(-1/4)‖; both exact. Errors are those of S~^(-1/4), with the damping.",
    )


def _absolute(cases: DataFrame) -> DataFrame:
    found = _damped(cases).assign(largest=lambda rows: ABSOLUTE / rows["eps"])
    return shown(
        found[["largest", "eps", "damped", "cosine", STORED, EIGH, NEWTON]],
        "Damping, absolute: 1e-6 added whatever the gradients",
        heads=HEADS | {"largest": "largest eigenvalue", "eps": "relative to it"},
        note="Where the cosine is near that of no preconditioning at all, the update is the gradient.",
    )


def _precision(cases: DataFrame) -> DataFrame:
    found = _summary(cases, ["condition"]).rename(columns={"predicted": "float32"})
    return shown(
        found[["condition", "float32", "bfloat16", *NAMES]],
        f"Low precision: errors with the default damping of {DEFAULT:g}",
        heads={name: f"predicted: stored in {name}" for name in ("float32", "bfloat16")},
        formats=FORMATS | {"float32": ".1e"},
        note="Predictions are of first order: one above a tenth means that the root is lost. TF32 is emulated: "
        "operands of products are rounded to 11 bits, and the rest is float32, as on a GPU; none was used.",
    )


def _complexity(costs: DataFrame) -> DataFrame:
    found = costs.assign(ratio=costs["ms"] / costs["predicted_ms"], cubes=costs["flops"] / costs["d"] ** 3)
    found["eigh"] = found["ms"] / found["d"].map(found[found["solver"] == "eigh"].set_index("d")["ms"])
    return shown(
        found[["d", "solver", "ms", "predicted_ms", "ratio", "eigh", "cubes", "steps", "mb", "predicted_mb"]],
        "Complexity: a root S^(-1/4) in float32, condition 1e6, damping 1e-6, one thread",
        heads={"d": "rows", "predicted_ms": "predicted", "eigh": "of eigh's", "cubes": "FLOPs / d³", "mb": "MB held",
               "predicted_mb": "predicted"},
        note="Predicted times: FLOPs at the rate of a product of this size, measured just before. FLOPs of eigh: as "
        "long as 25 d³ of products take. MB: beside S.",
    )  # fmt: skip


def _everything(found: DataFrame, constants: DataFrame) -> DataFrame:
    middle, floor = (found["solver"].map(constants[name]) for name in ("middle", "floor"))
    units = found["solver"].map(lambda name: roundoff(BY_NAME[name].bits))
    own = ((middle * found["amplified"]) ** 2 + (floor * units) ** 2) ** 0.5
    kept = found.assign(predicted=found["predicted"].fillna(own)).replace(math.inf, math.nan)
    keys = ["solver", "p", "d", "condition", "eps", "seed", "error", "predicted", "roundings", "residual", "coupled",
            "steps", "forecast", "accepted"]  # fmt: skip
    return table(
        kept[keys],
        "Every root",
        note="Predicted: of storing from the spectrum alone; of solvers with their two constants of the table above.",
        shown=0,
    )


# ---- figures -----------------------------------------------------------------------------------------------------

STYLES = {
    STORED: Style("blue", SOLID), "predicted for float32": Style("blue", DOTTED),
    "stored in bfloat16": Style("purple", SOLID), "predicted for bfloat16": Style("purple", DOTTED),
    "eigh, float64": Style("ink", SOLID), "newton, float64": Style("ink", DASHED),
    EIGH: Style("vermilion", SOLID), NEWTON: Style("vermilion", DASHED),
    "newton, TF32 products": Style("amber", DASHED),
}  # fmt: skip


def _error_figure(name: str, title: str, cases: DataFrame, panel: str, x: str, powers: range) -> Figure:
    """Return the errors of solvers, and predictions of what is stored, over ``condition`` or ``eps``."""
    drawn = cases[cases["finite"]]
    predicted = drawn[drawn["solver"].isin([solver.name for solver in SOLVERS if solver.exact])]
    predicted = predicted.assign(
        solver=predicted["solver"].str.replace("stored in", "predicted for"), error=predicted["predicted"]
    )
    lines = {*cases["solver"], *predicted["solver"]}
    ticks = {"xticks": [10.0**k for k in powers], "xticklabels": [f"1e{k}" for k in powers], "ylim": (1e-6, 30)}
    if x == "condition":
        ticks |= {"ylim": (1e-16, 30), "yticks": [1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 1]}
        ticks |= {"xlim": (None, cases["condition"].max())}
    styles = {label: look for label, look in STYLES.items() if label in lines}
    columns, finish = (panel, "solver", x, "error"), panels.logarithmic(**ticks)
    data = concat([drawn, predicted])
    return panels.figure(name, title, data, styles, columns, unit="relative error", form=".0e", finish=finish)


def _figures(bare: DataFrame, damped: DataFrame) -> Iterator[Figure]:
    exponents = bare.assign(panel=bare["p"].map("p = {}".format))
    title = "Error of S^(-1/p) by condition, without damping: mean over seeds, band ± one standard deviation."
    yield _error_figure("conditions", title, exponents, "panel", "condition", range(2, 13, 2))
    low = damped[~damped["solver"].str.endswith("float64")]
    low = low.assign(panel=low["solver"].str.endswith("float32").map({True: "float32", False: "lower"}))
    title = f"Error of S~^(-1/4) by damping, relative to the largest eigenvalue, at a condition of {ILL:.0e}."
    yield _error_figure("damping", title, low, "panel", "eps", range(-12, -1, 2))


def _cost_figure(costs: DataFrame) -> Figure:
    styles: dict[str, Style] = {}
    lines = []
    for method, hue in {"eigh": "vermilion", "newton": "blue"}.items():
        styles |= {method: Style(hue, SOLID), f"{method}, predicted": Style(hue, DOTTED)}
        own = costs[costs["solver"] == method].rename(columns={"d": "rows"})
        for unit, key in (("milliseconds", "ms"), ("megabytes", "mb")):
            lines += [own.assign(unit=unit, line=method, value=own[key])]
            lines += [own.assign(unit=unit, line=f"{method}, predicted", value=own[f"predicted_{key}"])]
    title = "Milliseconds and megabytes of a root by its rows, measured and predicted, one thread, float32."
    columns, finish = ("unit", "line", "rows", "value"), panels.logarithmic()
    return panels.figure("costs", title, concat(lines), styles, columns, form=".0e", finish=finish)
