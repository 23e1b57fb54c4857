"""``caspr-verify cost``: what does a step cost, how does that grow, and what would it be for large models?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from matplotlib.axes import Axes
from pandas import DataFrame

from caspr_cli.optim.caspr import CASPR
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.report import style
from caspr_cli.report.answer import Answer, Figure, table
from caspr_cli.theory import cost_runs, panels
from caspr_cli.theory.cost_runs import PARTS, Divided, Model, Run, layer
from caspr_cli.theory.gradients import Log
from caspr_cli.theory.work import DECODERS, GPUS, NODE, Assumed, Scaled, scaled, stand_ins

QUESTION = (
    "What does a step of CASPR cost, how does that grow, and what would it be for models of 1B to 70B parameters?"
)
WIDTHS, QUICK_WIDTHS = (64, 128, 256, 512), (32, 64)
BLOCKS, INTERVALS, ORDERS = (64, 128, 256, 512), (1, 5, 10, 50), (1, 2, 3, math.inf)
SWEPT, QUICK_SWEPT = 256, 32  # width at which options are changed
RANKS, RANKED, LAYERS = (1, 2, 4, 8, 16, 32, 64), 1024, 12  # ranks; and what they share
SHARES = ("efficiency", "mfu")  # assumptions that are at most 1


@dataclass(frozen=True)
class Choice(Assumed):
    """Options of the question.

    Args:
        quick: small layers: seconds.
        seed: changes nothing; numbers are the same for any.
        model, batch: the task whose model is costed, at its sample scale, and samples in its step.
    """

    quick: bool = False
    seed: int = 0
    model: str = "c4_lm"
    batch: int | None = None


def answer(choice: Choice, log: Log = lambda text: None) -> Answer:
    """Return FLOPs, bytes and seconds of a step, predicted from shapes, and measured where that runs here.

    Raises:
        ConfigError: no such task, or a number that is not above 0.
    """
    for name in (f.name for f in fields(Assumed)):
        value = getattr(choice, name)
        if not 0 < value < math.inf or (name in SHARES and value > 1):
            limits = "above 0 and at most 1" if name in SHARES else "above 0"
            raise ConfigError(f"--{name} {value:g}: should be {limits}")
    log(f"{choice.model}: shapes of its model")
    model = cost_runs.model_of(choice.model, choice.batch)
    runs = _runs(choice.quick, log)
    ranks = [cost_runs.divided(CASPR(stand_ins(layer(RANKED) * LAYERS)), count) for count in RANKS]
    large = [one for decoder in DECODERS for gpus in GPUS[decoder.name] for one in scaled(decoder, gpus, choice)]
    states = [(one.state, one.work.state) for of in runs.values() for one in of] + [(model.state, model.work.state)]
    state = all(abs(measured / predicted - 1) < 1e-3 for measured, predicted in states)
    called = abs(cost_runs.called_products() - 1) < 1e-9
    shared = all(one.most <= one.bound * (1 + 1e-9) for one in ranks)
    return Answer(
        name="cost",
        question=QUESTION,
        finding=finding(model, large),
        tables={name: _table(name, of) for name, of in runs.items()}
        | {"model": _model(model), "ranks": _ranks(ranks), "scale": _scale(large, choice), "decoders": _decoders()},
        figures=(_width_figure(runs["width"]), _options_figure(runs), _scale_figure(large)),
        claims=(
            ("bytes of state are those of the formula (within 0.1 %, which are counters)", state),
            ("the products that a step calls have the FLOPs of the formula, exactly", called),
            ("no rank has more than its part and one block, refreshed", shared),
        ),
    )


def _runs(quick: bool, log: Log) -> dict[str, list[Run]]:
    """Measure layers by width and by option, on one thread."""
    width = QUICK_SWEPT if quick else SWEPT
    plans: dict[str, Sequence[float]] = {"width": QUICK_WIDTHS if quick else WIDTHS, "block_size": BLOCKS}
    plans |= {"interval": INTERVALS, "order": ORDERS}
    found: dict[str, list[Run]] = {}
    with cost_runs.one_thread():
        for name, values in plans.items():
            for value in values[:2] if quick and name != "order" else values:
                log(f"a layer, {name} {value:g}")
                one = cost_runs.run(int(value)) if name == "width" else cost_runs.run(width, **{name: value})
                found.setdefault(name, []).append(one)
    return found


def finding(model: Model, large: Sequence[Scaled]) -> str:
    """Return the answer in one sentence."""
    flops = model.work.products + model.work.roots
    plain = [100 * one.share for one in large if one.variant == large[0].variant]
    return (
        f"A step of CASPR has {100 * flops / (flops + model.training):.1f} % of the FLOPs of training {model.task} "
        f"here; on paper it takes {min(plain):.0f} to {max(plain):.0f} % of a step for 1B to 70B parameters."
    )


# ---- tables ------------------------------------------------------------------------------------------------------

TITLES = {
    "width": "By width: a transformer's layer, blocks of at most 1024, roots every 10 steps",
    "block_size": "By block size",
    "interval": "By interval between roots",
    "order": "By order",
}


def _table(name: str, runs: Sequence[Run]) -> DataFrame:
    rows = []
    for r in runs:
        row: dict[str, Any] = {"width": r.width}
        if name in r.options:
            row[name] = "Shampoo" if r.options[name] == math.inf else r.options[name]
        row |= {
            "parameters": r.work.parameters,
            "flops": r.work.products + r.work.roots,
            "traffic": r.work.traffic + r.work.entries,
            "bytes": r.state / r.work.parameters,
            "total": r.milliseconds,
            "total_predicted": sum(r.predicted.values()),
            "ratio": r.ratio,
        }
        for part in PARTS:
            row |= {part: r.measured[part], f"{part}_predicted": r.predicted[part]}
        rows.append(row)
    times = [*PARTS, *(f"{part}_predicted" for part in (*PARTS, "total")), "total"]
    return table(
        rows,
        TITLES[name],
        heads={"block_size": "block size", "flops": "FLOPs a step", "traffic": "bytes moved", "total": "all, ms",
               "bytes": "state, bytes a parameter", "ratio": "predicted / measured"}
        | {part: f"{part}, ms" for part in PARTS} | {f"{part}_predicted": "predicted" for part in (*PARTS, "total")},
        formats=dict.fromkeys(("flops", "traffic", *times), ".3g")
        | {"parameters": ",.0f", "bytes": ".1f", "ratio": ".2f"},
        note="Matrices 3w x w, w x w, 4w x w and w x 4w in float32, one thread, seconds of the processor, an average "
        "over an interval. Predicted: FLOPs at the rate of a product of this size, bytes at that of a copy, both "
        f"measured just before; a root at 25 d³.{_note(name, runs)}",
    )  # fmt: skip


def _note(name: str, runs: Sequence[Run]) -> str:
    """Return what the rows of a table come to."""
    if name == "width":
        a, b = runs[-2:]

        def power(of_a: float, of_b: float) -> float:
            return math.log(of_b / of_a) / math.log(b.width / a.width)

        expected = power(sum(a.predicted.values()), sum(b.predicted.values()))
        return (
            f" Between the last two, time grows as width to the power {power(a.milliseconds, b.milliseconds):.2f} "
            f"(predicted {expected:.2f}), parameters as width to the power 2."
        )
    by = {r.options[name]: r for r in runs}
    if name != "order":
        return ""
    caspr, shampoo = by[2], by[math.inf]
    apply = caspr.measured["apply"] / shampoo.measured["apply"]
    return (
        f" CASPR over Shampoo: application {apply:.2f} (FLOPs {caspr.work.apply / shampoo.work.apply:.2f}), whole step "
        f"{caspr.milliseconds / shampoo.milliseconds:.2f}, state {caspr.state / shampoo.state:.3f}."
    )


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


def _ranks(ranks: Sequence[Divided]) -> DataFrame:
    keys = ("ranks", "most", "bound", "speedup", "balance", "received", "factors")
    return table(
        [{key: getattr(one, key) for key in keys} for one in ranks],
        f"By ranks: FLOPs of the busiest in its longest step, and what is sent ({LAYERS} layers of width {RANKED}, "
        f"{ranks[-1].blocks} blocks)",
        heads={"most": "FLOPs of the busiest", "balance": "average / busiest", "received": "bytes received a step",
               "factors": "bytes of factors, average"},
        formats=dict.fromkeys(("most", "bound", "received", "factors"), ".3g")
        | dict.fromkeys(("speedup", "balance"), ".2f"),
        note="Blocks as the optimizer divides them. What is received are all updates, in float32; `caspr-bench "
        "--ranks` measures it.",
    )  # fmt: skip


def _scale(large: Sequence[Scaled], assumed: Assumed) -> DataFrame:
    rows = []
    for s in large:
        row: dict[str, Any] = {"model": s.decoder.name, "gpus": s.gpus, "mode": s.mode, "variant": s.variant}
        row |= {"training": s.training, "total": s.seconds.total, "share": s.share, "gigabytes": s.gigabytes}
        row |= {"fits": "yes" if s.fits else "no"} | {f"s_{name}": value for name, value in vars(s.seconds).items()}
        rows.append(row)
    parts = [key for key in rows[0] if key.startswith("s_")]
    return table(
        rows,
        "At scale, on paper: seconds of a step on H100s",
        heads={"gpus": "GPUs", "mode": "under", "variant": "options", "total": "optimizer", "gigabytes": "GB a GPU"}
        | {key: key[2:] for key in parts},
        formats={"gpus": ",", "training": ".3g", "total": ".3g", "share": ".1%", "gigabytes": ".3g"}
        | dict.fromkeys(parts, ".2g"),
        note=f"Assumed: {assumed.tokens:.0e} tokens a step, 6 FLOPs a parameter and token at {assumed.mfu:g} of "
        f"{assumed.bfloat16:g} TFLOP/s; products and roots (Newton) in float32 at {assumed.efficiency:g} of "
        f"{assumed.float32:g}, passes over memory at as much of {assumed.memory:g} TB/s; a link of "
        f"{assumed.network:g} GB/s for each GPU, {NODE} in a node; {assumed.machine().capacity / 1e9:.0f} GB. Nothing "
        "overlaps. GB: weights and gradients in float32 and the optimizer's state, without activations. The faster "
        "links within a node are not counted. The share is of training and optimizer together.",
    )


def _decoders() -> DataFrame:
    rows = []
    for d in DECODERS:
        work = d.work()
        row = {key: getattr(d, key) for key in ("width", "layers", "hidden", "keys", "vocabulary", "parameters")}
        row |= {"preconditioned": work.parameters, "factors": work.factors / work.parameters}
        rows.append({"model": d.name} | row)
    return table(
        rows,
        "The shapes that are assumed, of published models",
        heads={"factors": "factors, bytes a parameter"},
        formats=dict.fromkeys(("width", "layers", "hidden", "keys", "vocabulary"), ",")
        | {"parameters": ".4g", "preconditioned": ".4g", "factors": ".1f"},
        note="TinyLlama, LLaMA 7B and Llama 2 70B. Blocks of at most 1024. Embeddings and the head are left to AdamW.",
    )


# ---- figures -----------------------------------------------------------------------------------------------------

MEASURED = {"measured": style.Style("blue", style.SOLID), "predicted": style.Style("blue", style.DOTTED)}


def _pair(x: Sequence[float], measured: Sequence[float], predicted: Sequence[float]) -> list[panels.Line]:
    return [panels.Line("measured", x, measured), panels.Line("predicted", x, predicted)]


def _width_figure(runs: Sequence[Run]) -> Figure:
    x = [r.width for r in runs]
    shown = {part: _pair(x, [r.measured[part] for r in runs], [r.predicted[part] for r in runs]) for part in PARTS}
    title = "Milliseconds of a layer's step by width, by part, measured and predicted; one thread of this CPU."
    return panels.figure("width", title, shown, MEASURED, y="ms", x="width", finish=panels.logarithmic)


def _options_figure(runs: dict[str, list[Run]]) -> Figure:
    shown = {
        name.replace("_", " "): _pair(
            [r.options[name] for r in runs[name]],
            [r.milliseconds for r in runs[name]],
            [sum(r.predicted.values()) for r in runs[name]],
        )
        for name in ("block_size", "interval")
    }
    width = runs["interval"][0].width
    title = f"Milliseconds of a step by block size and by interval, width {width}, measured and predicted."
    return panels.figure("options", title, shown, MEASURED, y="ms", x="", finish=lambda axes: axes.set_ylim(bottom=0))


def _scale_figure(large: Sequence[Scaled]) -> Figure:
    hues = dict(zip((d.name for d in DECODERS), ("green", "blue", "vermilion"), strict=True))
    dashes = dict(zip(dict.fromkeys(s.variant for s in large), (style.SOLID, style.DOTTED), strict=True))
    styles = {
        f"{name}, {variant}": style.Style(hue, dash) for name, hue in hues.items() for variant, dash in dashes.items()
    }
    shown: dict[str, list[panels.Line]] = {}
    for mode in dict.fromkeys(s.mode for s in large):
        for label in styles:
            rows = [s for s in large if s.mode == mode and f"{s.decoder.name}, {s.variant}" == label]
            line = panels.Line(label, [s.gpus for s in rows], [100 * s.share for s in rows])
            shown.setdefault(mode, []).append(line)

    def finish(axes: Axes) -> None:
        panels.logarithmic(axes)
        axes.set_yticks([0.1, 0.3, 1, 3, 10, 30, 100], ["0.1", "0.3", "1", "3", "10", "30", "100"])
        axes.minorticks_off()
        axes.set_ylim(0.2, 100)

    title = "Share of a training step that CASPR takes, on paper: decoders on H100s, by GPUs."
    return panels.figure("scale", title, shown, styles, y="share, %", x="GPUs", finish=finish, legend_columns=2)
