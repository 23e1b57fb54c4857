"""``caspr-verify cost``: what does a step cost, how does that grow, and what would it be for large models?"""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from pandas import DataFrame, concat

from caspr_cli.bench.baselines import Settings
from caspr_cli.bench.shapes import MODELS, layer
from caspr_cli.bench.workload import TRAINING_FLOPS
from caspr_cli.optim.caspr import CASPR
from caspr_cli.optim.cost import blocks_of
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.report import style
from caspr_cli.report.answer import Answer, Figure, judged, table
from caspr_cli.theory import cost_runs, panels
from caspr_cli.theory.choices import Assumed, Costs
from caspr_cli.theory.cost_runs import PARTS, Model
from caspr_cli.theory.gradients import Log
from caspr_cli.theory.scale import GPUS, NODE, on_paper
from caspr_cli.theory.solvers import threads
from caspr_cli.theory.work import FLOAT, stand_ins

SMALL = 0.1  # of a training step
QUESTION = "Does a step of CASPR take less than a tenth of a training step, here and for 1B to 70B parameters?"
WIDTHS, QUICK_WIDTHS = (64, 128, 256, 512), (32, 64)
BLOCKS, INTERVALS, ORDERS = (64, 128, 256, 512), (1, 5, 10, 50), (1, 2, 3, math.inf)
SWEPT, QUICK_SWEPT = 256, 32  # width at which options are changed
RANKS, RANKED, LAYERS = (1, 2, 4, 8, 16, 32, 64), 1024, 12  # ranks; and what they share
SHARES = ("efficiency", "mfu")  # assumptions that are at most 1
LARGE = {"llama-1.1b": (8, 64), "llama-7b": (64, 256), "llama-70b": (256, 1024, 4096)}  # models, and numbers of GPUs
H100, CAPACITY = GPUS["h100"], 80e9  # bytes


def answer(choice: Costs, log: Log = lambda text: None) -> Answer:
    """Return FLOPs, bytes and seconds of a step, predicted from shapes, and measured where that runs here.

    Raises ConfigError for an unknown task, or a number that is not above 0.
    """
    for name in (f.name for f in fields(Assumed)):
        value = getattr(choice, name)
        if not 0 < value < math.inf or (name in SHARES and value > 1):
            limits = "above 0 and at most 1" if name in SHARES else "above 0"
            raise ConfigError(f"--{name} {value:g}: should be {limits}")
    log(f"{choice.model}: shapes of its model")
    model = cost_runs.model_of(choice.model, choice.batch)
    runs = _runs(choice.quick, log)
    ranks = _ranks()
    large = _large(choice, log)
    states = [(float(model.state), model.work.state)]
    states += [pair for own in runs.values() for pair in zip(own["state"], own["state_predicted"], strict=True)]
    state = all(abs(measured / predicted - 1) < 1e-3 for measured, predicted in states)
    called = abs(cost_runs.called_products() - 1) < 1e-9
    shared = bool((ranks["most"] <= ranks["bound"] * (1 + 1e-9)).all())
    return Answer(
        name="cost",
        question=QUESTION,
        formula="FLOPs = 2mn (t_m + t_n) + 2q mn (m + n) + c (m³ + n³) / interval",
        verdict=judged([share < SMALL for share in shares(model, large)]),
        finding=finding(model, large),
        tables={name: _table(name, own) for name, own in runs.items()}
        | {"model": _model(model), "ranks": ranks, "scale": _scale(large, choice)},
        figures=(_width_figure(runs["width"]), _options_figure(runs), _scale_figure(large)),
        claims=(
            ("bytes of state are those of the formula (within 0.1 %, which are counters)", state),
            ("the products that a step calls have the FLOPs of the formula, exactly", called),
            ("no rank has more than its part and one block, refreshed", shared),
        ),
    )


def _runs(quick: bool, log: Log) -> dict[str, DataFrame]:
    """Measure layers by width and by option, on one thread."""
    width = QUICK_SWEPT if quick else SWEPT
    widths = QUICK_WIDTHS if quick else WIDTHS
    plans: dict[str, Sequence[Any]]
    plans = {"width": widths, "block_size": BLOCKS, "interval": INTERVALS, "order": ORDERS}
    found = {}
    with threads(1):
        for name, values in plans.items():
            rows = []
            for value in values[:2] if quick and name != "order" else values:
                log(f"a layer, {name} {value:g}")
                rows.append(cost_runs.run(**{"width": width, name: value}))
            found[name] = DataFrame(rows)
    return found


def shares(model: Model, large: DataFrame) -> list[float]:
    """Return the part of a training step that is CASPR's: of this model's FLOPs, and of the time of each large one."""
    flops = model.work.products + model.work.roots
    return [flops / (flops + model.training), *large["share"]]


def finding(model: Model, large: DataFrame) -> str:
    here, *paper = (100 * share for share in shares(model, large))
    return (
        f"A step of CASPR has {here:.1f} % of the FLOPs of training {model.task} "
        f"here; on paper it takes {min(paper):.0f} to {max(paper):.0f} % of a step for 1B to 70B parameters."
    )


# ---- tables ------------------------------------------------------------------------------------------------------

TITLES = {
    "width": "By width: a transformer's layer, blocks of at most 1024, roots every 10 steps",
    "block_size": "By block size",
    "interval": "By interval between roots",
    "order": "By order",
}


def _table(name: str, runs: DataFrame) -> DataFrame:
    predicted = [f"{part}_predicted" for part in (*PARTS, "total")]
    found = runs.drop(columns=["apply_flops", "state", "state_predicted"])
    if name == "order":
        found[name] = ["Shampoo" if order == math.inf else int(order) for order in found[name]]
    return table(
        found,
        TITLES[name],
        heads={"block_size": "block size", "flops": "FLOPs a step", "traffic": "bytes moved", "total": "all, ms",
               "bytes": "state, bytes a parameter", "ratio": "predicted / measured"}
        | {part: f"{part}, ms" for part in PARTS} | dict.fromkeys(predicted, "predicted"),
        formats=dict.fromkeys(("flops", "traffic", "total", *PARTS, *predicted), ".3g")
        | {"parameters": ",.0f", "bytes": ".1f", "ratio": ".2f"},
        note="Matrices 3w x w, w x w, 4w x w and w x 4w in float32, one thread, seconds of the processor, an average "
        "over an interval. Predicted: FLOPs at the rate of a product of this size, bytes at that of a copy, both "
        f"measured just before; a root at 25 d³.{_note(name, runs)}",
    )  # fmt: skip


def _note(name: str, runs: DataFrame) -> str:
    if name == "width":
        a, b = (runs.iloc[-k] for k in (2, 1))
        power = {key: math.log(b[key] / a[key]) / math.log(b["width"] / a["width"]) for key in runs if "total" in key}
        return (
            f" Between the last two, time grows as width to the power {power['total']:.2f} (predicted "
            f"{power['total_predicted']:.2f}), parameters as width to the power 2."
        )
    if name == "order":
        of = runs.set_index("order")
        ratio = of.loc[2] / of.loc[math.inf]
        return (
            f" CASPR over Shampoo: application {ratio['apply']:.2f} (FLOPs {ratio['apply_flops']:.2f}), whole step "
            f"{ratio['total']:.2f}, state {ratio['state']:.3f}."
        )
    return ""


def _model(model: Model) -> DataFrame:
    parts = {"statistics": model.work.statistics, "roots": model.work.roots, "application": model.work.apply}
    parts["training"] = model.training
    return table(
        [{"part": part, "flops": flops, "share": flops / sum(parts.values())} for part, flops in parts.items()],
        f"The model of {model.task}, FLOPs of a step",
        heads={"flops": "FLOPs"},
        formats={"flops": ".3g", "share": ".1%"},
        note=f"{model.parameters:,} parameters; {model.state:,} bytes of state for {model.work.parameters:,.0f} of "
        f"them, {model.state / model.work.parameters:.1f} for each.",
    )


def _ranks() -> DataFrame:
    optimizer = CASPR(stand_ins(layer(RANKED) * LAYERS))
    blocks = sum(count for *_, count in blocks_of(optimizer))
    return table(
        [cost_runs.divided(optimizer, n) for n in RANKS],
        f"By ranks: FLOPs of the busiest in its longest step, and what is sent ({LAYERS} layers of width {RANKED}, "
        f"{blocks} blocks)",
        heads={"most": "FLOPs of the busiest", "balance": "average / busiest", "received": "bytes received a step",
               "factors": "bytes of factors, average"},
        formats=dict.fromkeys(("most", "bound", "received", "factors"), ".3g")
        | dict.fromkeys(("speedup", "balance"), ".2f"),
        note="Blocks as the optimizer divides them. What is received are all updates, in float32; `caspr-bench "
        "--ranks` measures it.",
    )  # fmt: skip


def _large(choice: Costs, log: Log) -> DataFrame:
    """Return a step of large models on many GPUs, from shapes and data sheets, beside what training takes."""
    rows, sheet = [], replace(H100, rates=choice)
    for model, counts in LARGE.items():
        log(f"{model}, on paper")
        parameters = sum(math.prod(shape) for shape in MODELS[model][0]) + MODELS[model][1]
        for row in on_paper(model, counts[:1] if choice.quick else counts, sheet, "caspr_sum", Settings()):
            each = 1e12 * choice.bfloat16 * choice.mfu
            training = TRAINING_FLOPS * parameters * choice.tokens / (row.gpus * each)
            total = row.compute_seconds + row.exchange_seconds
            weights = 2.0 * FLOAT * parameters / (1 if row.mode == "DDP" else row.gpus)  # and gradients
            rows.append({
                "model": model, "parameters": parameters, "gpus": row.gpus, "mode": row.mode, "training": training,
                "compute": row.compute_seconds, "exchange": row.exchange_seconds, "total": total,
                "share": total / (total + training), "gigabytes": (weights + row.state_bytes) / 1e9,
                "fits": "yes" if weights + row.state_bytes <= CAPACITY else "no",
            })  # fmt: skip
    return DataFrame(rows)


def _scale(large: DataFrame, assumed: Assumed) -> DataFrame:
    return table(
        large,
        "At scale, on paper: seconds of a step on H100s",
        heads={"gpus": "GPUs", "mode": "under", "total": "optimizer", "gigabytes": "GB a GPU"},
        formats={"parameters": ".4g", "gpus": ",", "training": ".3g", "total": ".3g", "share": ".1%",
                 "gigabytes": ".3g", "compute": ".2g", "exchange": ".2g"},
        note=f"The models are TinyLlama, LLaMA 7B and Llama 2 70B, steps those of `caspr-bench --model`, in float32 "
        f"with an interval of 10. Assumed: {assumed.tokens:.0e} tokens a step, 6 FLOPs a parameter and token at "
        f"{assumed.mfu:g} of {assumed.bfloat16:g} TFLOP/s; products and roots (Newton) at {assumed.efficiency:g} of "
        f"{assumed.float32:g}, passes over memory at as much of {assumed.memory:g} TB/s; a link of "
        f"{assumed.network:g} GB/s for each GPU, {NODE} in a node; {CAPACITY / 1e9:.0f} GB. Nothing overlaps. GB: "
        "weights and gradients in float32 and the optimizer's state, without activations. The share is of training "
        "and optimizer together.",
    )  # fmt: skip


# ---- figures -----------------------------------------------------------------------------------------------------

MEASURED = {"measured": style.Style("blue", style.SOLID), "predicted": style.Style("blue", style.DOTTED)}


def _measured(runs: DataFrame, part: str, x: str, name: str) -> DataFrame:
    """Return a panel ``name``: milliseconds of a part of a step over the column ``x``, measured and predicted."""
    found = runs[[x, part, f"{part}_predicted"]].astype(float).set_axis(["x", *MEASURED], axis=1)
    return found.melt("x", var_name="line", value_name="ms").assign(part=name)


def _width_figure(runs: DataFrame) -> Figure:
    data = concat([_measured(runs, part, "width", part) for part in PARTS]).rename(columns={"x": "width"})
    title = "Milliseconds of a layer's step by width, by part, measured and predicted; one thread of this CPU."
    columns = ("part", "line", "width", "ms")
    return panels.figure("width", title, data, MEASURED, columns, finish=panels.logarithmic())


def _options_figure(runs: dict[str, DataFrame]) -> Figure:
    swept = [_measured(runs[name], "total", name, name.replace("_", " ")) for name in ("block_size", "interval")]
    data, width = concat(swept).rename(columns={"x": ""}), runs["interval"]["width"][0]
    title = f"Milliseconds of a step by block size and by interval, width {width}, measured and predicted."
    columns = ("part", "line", "", "ms")
    return panels.figure("options", title, data, MEASURED, columns, finish=lambda axes: axes.set(ylim=(0, None)))


def _scale_figure(large: DataFrame) -> Figure:
    ticks, columns = [0.1, 0.3, 1, 3, 10, 30, 100], ("mode", "model", "GPUs", "percent")
    data = large.assign(percent=100 * large["share"]).rename(columns={"gpus": "GPUs"})
    styles = {m: style.Style(hue, style.SOLID) for m, hue in zip(LARGE, ("green", "blue", "vermilion"), strict=False)}
    title = "Share of a training step that CASPR takes, on paper: decoders on H100s, by GPUs."
    finish = panels.logarithmic(yticks=ticks, yticklabels=[f"{tick:g}" for tick in ticks], ylim=(0.2, 100))
    return panels.figure("scale", title, data, styles, columns, unit="share, %", finish=finish)
