"""What an optimizer step costs, from shapes alone."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.options import Group
from caspr_cli.optim.schedule import EIGH_FLOPS
from caspr_cli.optim.symmetric import packed_length


def blocks_of(optimizer: KroneckerOptimizer) -> list[tuple[Group, Tensor, tuple[int, ...], int]]:
    """(group, parameter, block shape, number of such blocks) for all that is preconditioned."""
    return [
        (group, p, shape, len(blocks))
        for group in optimizer.param_groups
        for p in group["params"]
        if optimizer.preconditions(p, group)
        for shape, blocks in optimizer.layout(p, group).blocks.items()
    ]


def step_flops(optimizer: KroneckerOptimizer) -> dict[str, float]:
    """FLOPs of an average step (2 per multiply-add): ``statistics``, ``roots``, ``apply``.

    For an m x n block 2 m n (m + n) for the statistics, less the triangles that are not computed; 2 m n (m + n) times
    q for the application (once for a product); and ``EIGH_FLOPS`` (m^3 + n^3) / interval for the roots.
    """
    flops = {"statistics": 0.0, "roots": 0.0, "apply": 0.0}
    for group, _, shape, count in blocks_of(optimizer):
        size = 2.0 * count * math.prod(shape)
        passes = 1 if math.isinf(group["order"]) or len(shape) == 1 else group["order"]
        flops["statistics"] += size * sum(packed_length(d) / d for d in shape) / group["statistics_interval"]
        flops["apply"] += passes * size * sum(shape)
        flops["roots"] += EIGH_FLOPS * count * sum(d**3 for d in shape) / group["interval"]
    return flops


def state_bytes(state: Any) -> int:
    """Bytes of an optimizer's state, views of one storage counted once each."""
    return sum(_bytes(value) for entries in state.values() for value in entries.values())


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0
