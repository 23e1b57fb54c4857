"""What an optimizer step costs, from shapes alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from caspr_cli.optim.blocks import Shape
from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.options import Group, apply_dtype, factor_dtype
from caspr_cli.optim.polar import flops as polar_flops
from caspr_cli.optim.solve import root_flops
from caspr_cli.optim.symmetric import packed_length


def blocks_of(optimizer: KroneckerOptimizer) -> list[tuple[Group, Tensor, Shape, Shape, int]]:
    """Return for all that is preconditioned: group, parameter, lengths of a block's axes that have statistics, shape
    of the block, number of such blocks."""
    return [
        (group, p, layout.sizes(shape), shape, len(blocks))
        for group in optimizer.param_groups
        for p in group["params"]
        if optimizer.preconditions(p, group)
        for layout in [optimizer.layout(p, group)]
        for shape, blocks in layout.blocks.items()
    ]


def products_dtype(optimizer: Optimizer, device: torch.device) -> torch.dtype | None:
    """Return the lowest type of the products with the roots and of polar factors on a device; None without any."""
    found = blocks_of(optimizer) if isinstance(optimizer, KroneckerOptimizer) else []
    types = (apply_dtype(factor_dtype(p, group), device, group) for group, p, *_ in found)
    return min(types, key=lambda dtype: dtype.itemsize, default=None)


def passes(group: Group, axes: int) -> int:
    """Return how often all roots are applied: q times for the sum; once for the product or one root. With ``measured``
    the momentum goes to the eigenbases and back."""
    if group["measured"]:
        return 2
    return 1 if math.isinf(group["order"]) or axes == 1 else int(group["order"])


def step_flops(optimizer: KroneckerOptimizer, device: torch.device | None = None) -> dict[str, float]:
    """Return the FLOPs of an average step (2 per multiply-add): ``statistics``, ``roots``, ``apply``.

    For an m x n block 2 m n (m + n) for the statistics, less the triangles that are not computed; 2 m n (m + n) times
    q for the application (once for a product), and the polar factor; and c (m^3 + n^3) / interval for the roots, with c
    of :func:`root_flops`: 25 on a CPU, 72 on a GPU. An axis without statistics adds nothing to the sums. With
    ``measured`` as much again as one application goes to the statistics, and to the roots as much as turns the second
    moment.

    Args:
        device: where the steps are taken; None: where the parameters are.
    """
    flops = {"statistics": 0.0, "roots": 0.0, "apply": 0.0}
    for group, p, sizes, shape, count in blocks_of(optimizer):
        place = device or p.device
        size = 2.0 * count * math.prod(shape)
        flops["statistics"] += size * sum(packed_length(d) / d for d in sizes)
        flops["apply"] += passes(group, len(sizes)) * size * sum(sizes)
        if group["measured"]:
            flops["statistics"] += size * sum(sizes)
            flops["roots"] += (size * sum(sizes) + 2.0 * count * sum(d**3 for d in sizes)) / group["interval"]
        if group["polar"]:
            dtype = apply_dtype(factor_dtype(p, group), place, group)
            flops["apply"] += count * polar_flops(shape, group["polar_steps"], dtype)

        if sizes:
            roots = count * sum(d**3 for d in sizes) / group["interval"]
            flops["roots"] += root_flops(group, len(sizes), place) * roots
    return flops


def called_flops(optimizer: Optimizer) -> float:
    """Take a step and return the FLOPs of the matrix products that it called; those of other threads are not seen."""
    aten = torch.ops.aten
    # Torch's own counter leaves these out.
    more = {aten.addmm_: _added_product, aten.baddbmm_: _added_product, aten.linalg_solve_triangular: _solve}
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        optimizer.step()
    return float(counter.get_total_flops())


def _added_product(total: Shape, left: Shape, right: Shape, *, out_shape: Shape, **options: float) -> int:
    return 2 * math.prod(out_shape) * left[-1]


def _solve(A: Shape, B: Shape, *, out_shape: Shape, **options: bool) -> int:
    return math.prod(B) * A[-1]


def state_bytes(state: Any) -> int:
    """Return the bytes of an optimizer's state, views of one storage counted once each."""
    return sum(_bytes(value) for entries in state.values() for value in entries.values())


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0
