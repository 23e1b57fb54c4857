"""The momentum of updates, which ``precondition="gradient"`` has in place of that of gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from caspr_cli.optim.blocks import Layout, Shape
from caspr_cli.optim.fsdp import local
from caspr_cli.optim.masked import Mask
from caspr_cli.optim.options import Group
from caspr_cli.optim.scatter import placed

Pieces = dict[Tensor, dict[Shape, Tensor]]  # a parameter's U by block shape, [blocks, d_1, ..., d_k]


def forget_updates(states: list[Any]) -> None:
    """Begin momenta of gradients anew where they are of updates, which are 100 times as long."""
    for state in states:
        if (count := state.get("updates")) is None:
            continue
        if count.device.type != "cpu":  # where nobody asks
            local(state["exp_avg"]).mul_(count == 0)
            count.zero_()
        elif count > 0:
            local(state["exp_avg"]).zero_()
            count.zero_()


def averaged(
    pieces: Pieces, layouts: dict[Tensor, Layout], state: Any, group: Group, mask: Mask | None
) -> list[Tensor]:
    """Add these updates to their momenta, and return the momenta, their bias corrected, as this rank has them.

    Until its first update a momentum was the diagonal method's, of raw gradients: it begins anew.
    """
    beta1 = group["betas"][0]
    exp_avg = {p: local(state[p]["exp_avg"]) for p in pieces}
    counters = [state[p]["updates"] for p in pieces]
    bias: list[Any]
    if mask is None:
        torch._foreach_add_(counters, 1)
        ages = [int(n.item()) for n in counters]
        if fresh := [m for m, age in zip(exp_avg.values(), ages, strict=True) if age == 1]:
            torch._foreach_zero_(fresh)
        bias = [1 - beta1**age for age in ages]
    else:
        kept, bias = mask.count_updates(counters, list(pieces), beta1)
        torch._foreach_mul_(list(exp_avg.values()), kept)
    targets, sources = placed(pieces, layouts, exp_avg)
    sources = [u.to(m.dtype) for u, m in zip(sources, targets, strict=True)]
    if mask is None:
        torch._foreach_lerp_(targets, sources, 1 - beta1)
    else:
        torch._foreach_add_(targets, sources, alpha=1 - beta1)
    ahead = exp_avg
    if group["nesterov"]:
        ahead = {p: beta1 * m for p, m in exp_avg.items()}
        targets, sources = placed(pieces, layouts, ahead)
        torch._foreach_add_(targets, sources, alpha=1 - beta1)
    return list(torch._foreach_div(list(ahead.values()), bias))
