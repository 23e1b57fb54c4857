"""``debug=plan``: what an optimizer will do to each tensor, and at what cost; nothing is trained."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from caspr_cli import tasks
from caspr_cli.common.format import size
from caspr_cli.common.format import table as aligned
from caspr_cli.optim.blocks import TIMES, Layout
from caspr_cli.optim.cost import called_flops, state_bytes, step_flops
from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.registry import TAKES, build
from caspr_cli.recipe.compose import options
from caspr_cli.recipe.schema import Recipe
from caspr_cli.training.begin import naming_the_key


@dataclass
class Row:
    """Tensors that are alike: same place in repeated layers, same shape, same treatment."""

    tensor: str  # its name, layer numbers as *
    count: int
    shape: tuple[int, ...]
    blocks: str  # "4 of 512 x 512"; "-" where nothing is preconditioned
    treatment: str
    reason: str
    state: int  # bytes of optimizer state
    flops: float  # of an average step


@dataclass
class Plan:
    """The rows of the table, and the numbers of the lines under it."""

    rows: list[Row]
    parameters: int
    preconditioned: int
    model_flops: float  # forward and backward of one global batch


def plan(recipe: Recipe) -> Plan:
    """Return the cost of each tensor. Data are read only if the model's shape depends on them.

    The state and products of an optimizer are those of real steps on the "meta" device, which has shapes and no
    numbers; :mod:`caspr_cli.optim.cost` has the roots of the Kronecker family on the device of a run.
    """
    task = tasks.load(recipe.task, recipe.seed)
    model = task.model()
    plain = task.plain(model)
    names = {p: name for name, p in model.named_parameters()}
    rows: dict[Any, Row] = {}
    with naming_the_key(recipe):
        for group in task.param_groups(model):
            for p in group["params"]:
                row = _row(names[p], p, group, plain.get(names[p]), recipe)
                key = row.tensor, row.shape, row.treatment
                if key in rows:
                    rows[key].count += 1
                else:
                    rows[key] = row
    order = [_pattern(name) for name in names.values()]
    sizes = {name: p.numel() for p, name in names.items()}
    return Plan(
        sorted(rows.values(), key=lambda row: order.index(row.tensor)),
        parameters=sum(sizes.values()),
        preconditioned=sum(n for name, n in sizes.items() if name not in plain),
        model_flops=task.train_flops(model),
    )


def _pattern(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)


def _device() -> torch.device:
    """Return where a run would train."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _row(name: str, p: Tensor, group: dict[str, Any], reason: str | None, recipe: Recipe) -> Row:
    stand_in = nn.Parameter(torch.empty_like(p, device="meta"))
    settings = options(recipe.optim)
    if "start_step" in settings:
        settings["start_step"] = 1  # it preconditions from the first step on
    optimizer = build(recipe.optim.name, [group | {"params": [stand_in]}], settings)
    for _ in range(2):  # some optimizers only make their state in the first
        stand_in.grad = torch.empty_like(stand_in)
        flops = called_flops(optimizer)
    own, blocks = recipe.optim.name, "-"
    other = "NAdam" if own == "caspr_author" else "AdamW"
    reason = reason or ("matrix" if p.ndim == 2 else "tensor")
    if isinstance(optimizer, KroneckerOptimizer):
        (only,) = optimizer.param_groups
        chosen, flops = optimizer.preconditions(stand_in, only), sum(step_flops(optimizer, _device()).values())
        if chosen:
            layout = optimizer.layout(stand_in, only)
            blocks = _blocks(layout)
            if layout.shape != stand_in.shape:
                reason += f", seen as {_times(layout.shape)}"
            if layout.long:
                short = _times(tuple(layout.shape[axis] for axis in layout.axes))
                reason += f"; statistics of the axis of {short} alone: the other is more than {TIMES} times as long"
        elif only["precondition"] is not False:
            reason += " of one axis"
    elif own in TAKES:
        chosen = group["precondition"] and TAKES[own](p)
    else:
        chosen, other = group["precondition"] and p.ndim >= 2, own
    scale = settings.get("adamw_lr_scale", 1.0)
    other += f", lr x {scale:g}" if scale != 1 else ""
    state = state_bytes(optimizer.state)
    return Row(_pattern(name), 1, tuple(p.shape), blocks, own if chosen else other, reason, state, flops)


def _blocks(layout: Layout) -> str:
    return " + ".join(f"{len(cuts)} of {_times(shape)}" for shape, cuts in layout.blocks.items())


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def table(found: Plan) -> list[str]:
    total = found.model_flops + sum(row.count * row.flops for row in found.rows)
    heads = ["tensor", "count", "shape", "blocks", "treatment", "reason", "state", "FLOPs/step", "share"]
    cells = []
    for row in found.rows:
        flops, state = row.count * row.flops, size(row.count * row.state)
        work = [size(flops, "").strip(), f"{100 * flops / total:.1f} %"] if flops else ["-", "-"]
        what = [row.tensor, str(row.count), _times(row.shape) or "scalar", row.blocks, row.treatment, row.reason]
        cells.append([*what, state, *work])
    spent = total - found.model_flops
    return [
        *aligned([heads, *cells], right=[head in ("count", "state", "FLOPs/step", "share") for head in heads]),
        "",
        f"model    {found.parameters:,} parameters, {found.preconditioned:,} of them preconditioned; "
        f"{size(found.model_flops, 'FLOPs')} forward and backward",
        f"optim    {size(sum(row.count * row.state for row in found.rows))} of state; {size(spent, 'FLOPs')} a step, "
        f"{100 * spent / total:.1f} % of the whole, on average (products and roots; without elementwise operations)",
    ]
