"""The tables and figures of ``caspr-verify cost``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from caspr_cli.report import look
from caspr_cli.report.answer import Column, Figure, Sheet
from caspr_cli.theory import panels
from caspr_cli.theory.cost_cases import Found
from caspr_cli.theory.cost_runs import Dealt, Model, Run
from caspr_cli.theory.decoders import DECODERS, NODE, Assumed, Scaled

PARTS = ("statistics", "roots", "apply", "rest")


def sheets(found: Found) -> tuple[Sheet, ...]:
    return (
        _runs("width", "By width: a transformer's layer, blocks of at most 1024, roots every 10 steps", found.widths),
        _runs("block_size", "By block size", found.blocks),
        _runs("interval", "By interval between roots", found.intervals),
        _runs("order", "By order", found.orders),
        _model(found.model),
        _ranks(found.ranks),
        _scale(found.scale, found.assumed),
        _decoders(),
    )


def figures(found: Found) -> tuple[Figure, ...]:
    return width_figure(found.widths), options_figure(found), scale_figure(found.scale)


def _runs(name: str, title: str, runs: Sequence[Run]) -> Sheet:
    rows = []
    for r in runs:
        row: dict[str, Any] = {"width": r.width}
        if name in r.options:
            row[name] = "Shampoo" if r.options[name] == math.inf else r.options[name]
        row |= {
            "parameters": r.work.parameters,
            "flops": r.work.products + r.work.roots,
            "traffic": r.work.traffic + r.work.entries,
        }
        row |= {part: r.measured[part] for part in PARTS} | {f"{part}_predicted": r.predicted[part] for part in PARTS}
        row |= {"total": r.milliseconds, "total_predicted": sum(r.predicted.values()), "ratio": r.ratio}
        rows.append(row | {"bytes": r.state / r.work.parameters})
    own = () if name == "width" else (Column(name, name.replace("_", " ")),)
    times = [
        Column(key, head, ".3g")
        for part in PARTS
        for key, head in ((part, f"{part}, ms"), (f"{part}_predicted", "predicted"))
    ]
    return Sheet(
        name,
        title,
        (
            Column("width", "width"),
            *own,
            Column("parameters", "parameters", ",.0f"),
            Column("flops", "FLOPs a step", ".3g"),
            Column("traffic", "bytes moved", ".3g"),
            Column("bytes", "state, bytes a parameter", ".1f"),
            Column("total", "all, ms", ".3g"),
            Column("total_predicted", "predicted", ".3g"),
            Column("ratio", "predicted / measured", ".2f"),
            *times,
        ),
        tuple(rows),
        note="Matrices 3w x w, w x w, 4w x w and w x 4w in float32, one thread, seconds of the processor, an average "
        "over an interval. Predicted: FLOPs at the rate of a product of this size, bytes at that of a copy, both "
        "measured just before; a root at 25 d³.",
    )


def _model(model: Model) -> Sheet:
    flops = {"statistics": model.work.statistics, "roots": model.work.roots, "application": model.work.apply}
    total = sum(flops.values()) + model.training
    rows = [{"part": part, "flops": value, "share": value / total} for part, value in flops.items()]
    rows.append({"part": "training", "flops": model.training, "share": model.training / total})
    return Sheet(
        "model",
        f"The model of {model.task}, FLOPs of a step",
        (Column("part", "part"), Column("flops", "FLOPs", ".3g"), Column("share", "share", ".1%")),
        tuple(rows),
        note=f"{model.parameters:,} parameters; {model.state:,} bytes of state for {model.work.parameters:,.0f} of "
        "them.",
    )


def _ranks(ranks: Sequence[Dealt]) -> Sheet:
    keys = ("ranks", "most", "bound", "speedup", "balance", "received", "factors")
    rows = tuple({key: getattr(one, key) for key in keys} for one in ranks)
    return Sheet(
        "ranks",
        "By ranks: FLOPs of the busiest in its longest step, and what is sent",
        (
            Column("ranks", "ranks"),
            Column("most", "FLOPs of the busiest", ".3g"),
            Column("bound", "bound", ".3g"),
            Column("speedup", "speedup", ".2f"),
            Column("balance", "average / busiest", ".2f"),
            Column("received", "bytes received a step", ".3g"),
            Column("factors", "bytes of factors, average", ".3g"),
        ),
        rows,
        note="Blocks as the optimizer deals them out. What is received are all updates, in float32; `caspr-bench "
        "--ranks` measures it.",
    )


def _scale(scale: Sequence[Scaled], assumed: Assumed) -> Sheet:
    rows = []
    for s in scale:
        row: dict[str, Any] = {"model": s.decoder.name, "gpus": s.gpus, "mode": s.mode, "variant": s.variant}
        row |= {"training": s.training} | {f"s_{name}": value for name, value in vars(s.seconds).items()}
        row |= {"total": s.seconds.total, "share": s.share, "gigabytes": s.gigabytes, "fits": "yes" if s.fits else "no"}
        rows.append(row)
    parts = ("statistics", "roots", "apply", "traffic", "communication")
    return Sheet(
        "scale",
        "At scale, on paper: seconds of a step on H100s",
        (
            Column("model", "model"),
            Column("gpus", "GPUs", ","),
            Column("mode", "under"),
            Column("variant", "options"),
            Column("training", "training", ".3g"),
            Column("total", "optimizer", ".3g"),
            Column("share", "share", ".1%"),
            Column("gigabytes", "GB a GPU", ".3g"),
            Column("fits", "fits"),
            *(Column(f"s_{name}", name, ".2g") for name in parts),
        ),
        tuple(rows),
        note=f"Assumed: {assumed.tokens:.0e} tokens a step, 6 FLOPs a parameter and token at {assumed.mfu:g} of "
        f"{assumed.bfloat16:g} TFLOP/s; products and roots (Newton) in float32 at {assumed.efficiency:g} of "
        f"{assumed.float32:g}, passes over memory at as much of {assumed.memory:g} TB/s; a link of "
        f"{assumed.network:g} GB/s for each GPU, {NODE} in a node. Nothing overlaps. GB: weights and gradients in "
        "float32 and the optimizer's state, without activations. The faster links within a node are not counted. The "
        "share is of training and optimizer together.",
    )


def _decoders() -> Sheet:
    rows = tuple(
        {
            "model": d.name, "width": d.width, "layers": d.layers, "hidden": d.hidden, "keys": d.keys,
            "vocabulary": d.vocabulary, "parameters": d.parameters, "preconditioned": d.work().parameters,
            "factors": d.work().factors / d.work().parameters,
        }
        for d in DECODERS
    )  # fmt: skip
    return Sheet(
        "decoders",
        "The shapes that are assumed, of published models",
        (
            Column("model", "model"),
            *(Column(key, key, ",") for key in ("width", "layers", "hidden", "keys", "vocabulary")),
            Column("parameters", "parameters", ".4g"),
            Column("preconditioned", "preconditioned", ".4g"),
            Column("factors", "factors, bytes a parameter", ".1f"),
        ),
        rows,
        note="TinyLlama, LLaMA 7B and Llama 2 70B. Blocks of at most 1024. Embeddings and the head are left to AdamW.",
    )


# ---- figures -----------------------------------------------------------------------------------------------------

HUES = {"statistics": "green", "roots": "vermilion", "apply": "blue", "rest": "grey"}


def _line(label: str, x: Sequence[float], y: Sequence[float]) -> panels.Line:
    return panels.Line(label, x, y, [0.0] * len(x))


def _measured_and_predicted() -> dict[str, look.Style]:
    return {"measured": look.Style("blue", look.SOLID), "predicted": look.Style("blue", look.DOTTED)}


def _alt(title: str, found: Mapping[str, Sequence[panels.Line]]) -> str:
    said = (
        f"{name}: " + ", ".join(f"{line.label} from {line.mean[0]:.3g} to {line.mean[-1]:.3g}" for line in lines)
        for name, lines in found.items()
    )
    return f"{title} {'; '.join(said)}."


def width_figure(runs: Sequence[Run]) -> Figure:
    title = "Milliseconds of a layer's step by width, by part, measured and predicted; one thread of this CPU."
    x = [r.width for r in runs]
    found = {
        part: [
            _line("measured", x, [r.measured[part] for r in runs]),
            _line("predicted", x, [r.predicted[part] for r in runs]),
        ]
        for part in PARTS
    }
    alt = _alt(title, found)
    styles = _measured_and_predicted()
    svg = panels.drawn(found, styles, name="cost width", alt=alt, y="ms", x="width", finish=panels.logarithmic)
    return Figure("width", title, svg, alt)


def options_figure(found: Found) -> Figure:
    title = (
        f"Milliseconds of a step by block size and by interval, width {found.blocks[0].width}, measured and predicted."
    )
    shown = {}
    for name, runs in (("block_size", found.blocks), ("interval", found.intervals)):
        x = [r.options[name] for r in runs]
        shown[name.replace("_", " ")] = [
            _line("measured", x, [r.milliseconds for r in runs]),
            _line("predicted", x, [sum(r.predicted.values()) for r in runs]),
        ]
    alt = _alt(title, shown)

    def finish(axes: Axes) -> None:
        axes.set_ylim(bottom=0)

    styles = _measured_and_predicted()
    svg = panels.drawn(shown, styles, name="cost options", alt=alt, y="ms", x="", finish=finish)
    return Figure("options", title, svg, alt)


def scale_figure(scale: Sequence[Scaled]) -> Figure:
    title = "Share of a training step that CASPR takes, on paper: decoders on H100s, by GPUs."
    hues = dict(zip((d.name for d in DECODERS), ("green", "blue", "vermilion"), strict=True))
    dashes = dict(zip(dict.fromkeys(s.variant for s in scale), (look.SOLID, look.DOTTED), strict=True))
    styles = {
        f"{name}, {variant}": look.Style(hue, dash) for name, hue in hues.items() for variant, dash in dashes.items()
    }
    found: dict[str, list[panels.Line]] = {}
    for mode in dict.fromkeys(s.mode for s in scale):
        for name in hues:
            for variant in dashes:
                rows = [s for s in scale if (s.mode, s.decoder.name, s.variant) == (mode, name, variant)]
                line = _line(f"{name}, {variant}", [s.gpus for s in rows], [100 * s.share for s in rows])
                found.setdefault(mode, []).append(line)
    alt = _alt(title, found)

    def finish(axes: Axes) -> None:
        panels.logarithmic(axes)
        axes.set_yticks([0.1, 0.3, 1, 3, 10, 30, 100], ["0.1", "0.3", "1", "3", "10", "30", "100"])
        axes.minorticks_off()
        axes.set_ylim(0.2, 100)

    labels: dict[str, Any] = {"y": "share, %", "x": "GPUs", "legend_columns": 2}
    svg = panels.drawn(found, styles, name="cost scale", alt=alt, finish=finish, **labels)
    return Figure("scale", title, svg, alt)
