"""What follows from a group's options and the shapes of its parameters: the same in every step, on every rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from caspr_cli.optim.blocks import Layout, Shape, is_vector
from caspr_cli.optim.family import SMALLEST_EPS_FLOAT32
from caspr_cli.optim.fsdp import is_sharded
from caspr_cli.optim.options import Group
from caspr_cli.optim.schedule import AT_ONCE as AT_ONCE
from caspr_cli.optim.schedule import EIGH_FLOPS, phases
from caspr_cli.optim.stacks import Storage

_layout = lru_cache(maxsize=4096)(Layout.of)


def layout_of(p: Tensor, group: Group) -> Layout:
    """Return how p is merged and cut."""
    axes = group["axes"] if group["exponent"] else "none"
    return _layout(tuple(p.shape), group["merge"], group["block_size"], axes, int(group["batch_axes"]))


def is_preconditioned(p: Tensor, group: Group) -> bool:
    """Whether p is preconditioned from ``start_step`` on, or left to the graft method for good."""
    if group["precondition"] is False or p.numel() == 0:
        return False
    vector = is_vector(p.shape[int(group["batch_axes"]) :])
    return not vector or bool(group["precondition_1d"]) or group["merge"] == "flatten"


@dataclass(frozen=True)
class Plan:
    """The blocks of all parameters that a group may ever precondition, and when each block has new roots.

    A parameter that is frozen for a while, a run that was cut off, or the number of ranks changes none of it.
    """

    key: tuple[Any, ...]  # what it was made of
    params: tuple[Tensor, ...]  # of the group: their ids in the key stay theirs as long as they live
    layouts: dict[Tensor, Layout]
    storages: dict[Tensor, Storage]
    refresh_offsets: dict[tuple[Tensor, Shape], list[int]]  # the step of the interval at which each block has new roots
    waits: dict[Tensor, int]  # steps from ``start_step`` until all blocks of a parameter have had their first roots
    scattered: list[Tensor]  # parameters with blocks of several shapes
    sharded: bool  # whether a parameter of the group is a DTensor

    @classmethod
    def of(cls, group: Group, key: tuple[Any, ...]) -> Plan:
        """Return the plan of a group; ``key`` is its :func:`plan_key`."""
        layouts = {p: layout_of(p, group) for p in group["params"] if is_preconditioned(p, group)}
        storages = {p: Storage.of(p, group) for p in layouts}
        blocks = [(p, s) for p, layout in layouts.items() for s, cuts in layout.blocks.items() for _ in cuts]
        costs = [float(sum(d**3 for d in layouts[p].sizes(shape))) for p, shape in blocks]
        offsets: dict[tuple[Tensor, Shape], list[int]] = defaultdict(list)
        for block, offset in zip(blocks, phases(costs, group["interval"]), strict=True):
            offsets[block].append(offset)
        waits = dict.fromkeys(layouts, 0)
        if EIGH_FLOPS * sum(costs) > AT_ONCE:
            for (p, _), steps in offsets.items():
                waits[p] = max(waits[p], *steps)
        scattered = [p for p, layout in layouts.items() if len(layout.shapes) > 1]
        params = tuple(group["params"])
        return cls(key, params, layouts, storages, offsets, waits, scattered, any(map(is_sharded, params)))


def plan_key(group: Group) -> tuple[Any, ...]:
    """Return all that a group's plan depends on."""
    return (
        *(group[name] for name in ("merge", "block_size", "axes", "batch_axes", "precondition_1d", "interval")),
        *(group[name] for name in ("root_dtype", "factor_dtype", "apply_dtype", "polar", "pack_roots", "damping")),
        group["measured"] > 0,
        *(group["eps"] < SMALLEST_EPS_FLOAT32, group["precondition"] is False, group["exponent"] == 0),
        *((id(p), p.shape, p.dtype, p.device) for p in group["params"]),
    )


def refuse_other_blocks(before: Plan | None, now: Plan, state: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Raise a :class:`ValueError` if parameters that have stepped have other blocks or axes in a new plan."""
    layouts = before.layouts if before else {}
    for p, layout in layouts.items():
        if now.layouts.get(p, layout) != layout and "step" in state.get(p, {}):
            raise ValueError(
                "axes, merge, block_size, batch_axes or exponent (0 or not) of a parameter of shape "
                f"{tuple(p.shape)} may not change after its first step"
            )
