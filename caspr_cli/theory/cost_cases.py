"""What ``caspr-verify cost`` looks at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from caspr_cli.bench.floor import recorded
from caspr_cli.optim.caspr import CASPR
from caspr_cli.theory.cost_runs import Dealt, Model, Run, Say, dealt, layer, model_of, one_thread, run, stand_ins
from caspr_cli.theory.decoders import DECODERS, GPUS, Assumed, Scaled, scaled
from caspr_cli.theory.work import work_of

WIDTHS, QUICK_WIDTHS = (64, 128, 256, 512), (32, 64)
BLOCKS, INTERVALS, ORDERS = (64, 128, 256, 512), (1, 5, 10, 50), (1, 2, 3, math.inf)
SWEPT, QUICK_SWEPT = 256, 32  # width at which options are changed
RANKS, RANKED, LAYERS = (1, 2, 4, 8, 16, 32, 64), 1024, 12  # ranks; and what they share
COUNTED = 256  # width of the layer whose products are counted


@dataclass(frozen=True)
class Found:
    """All that is measured and predicted."""

    widths: list[Run]
    blocks: list[Run]
    intervals: list[Run]
    orders: list[Run]
    model: Model
    ranks: list[Dealt]
    scale: list[Scaled]
    assumed: Assumed
    called: float  # FLOPs of products in a step without a refresh, over those of the formula


def measured(quick: bool, task: str, batch: int | None, assumed: Assumed, say: Say) -> Found:
    """On one thread."""
    say(f"{task}: shapes of its model")
    model = model_of(task, batch)
    width = QUICK_SWEPT if quick else SWEPT

    def runs(name: str, values: Sequence[float], widths: Sequence[int] | None = None) -> list[Run]:
        made = []
        for value in values:
            say(f"a layer of width {int(value) if widths else width}" + ("" if widths else f", {name} {value:g}"))
            made.append(run(int(value)) if widths else run(width, **{name: value}))
        return made

    with one_thread():
        chosen = QUICK_WIDTHS if quick else WIDTHS
        return Found(
            runs("width", chosen, chosen),
            runs("block_size", BLOCKS[:2] if quick else BLOCKS),
            runs("interval", INTERVALS[:2] if quick else INTERVALS),
            runs("order", ORDERS),
            model,
            [dealt(_layers(), ranks) for ranks in RANKS],
            [made for decoder in DECODERS for gpus in GPUS[decoder.name] for made in scaled(decoder, gpus, assumed)],
            assumed,
            _called(),
        )


def _layers() -> CASPR:
    """What ranks share, on the "meta" device."""
    return CASPR(stand_ins([torch.empty(shape, device="meta") for shape in layer(RANKED) * LAYERS]))


def _called() -> float:
    """FLOPs of the products that a step calls, over those of the formula; on the "meta" device."""
    matrices = stand_ins([torch.empty(shape, device="meta") for shape in layer(COUNTED)])
    optimizer = CASPR(matrices, start_step=1, interval=1000)
    for _ in range(2):  # the first has roots to make
        calls = recorded(optimizer)
    return sum(call.flops for call in calls) / work_of(optimizer).products
