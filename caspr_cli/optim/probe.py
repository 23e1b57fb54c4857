"""Diagnostics: functions of an optimizer's state, computed when asked for and never on the way of a step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from caspr_cli.optim.combine import root_exponent
from caspr_cli.optim.engine import KroneckerOptimizer, bias_correction, precondition
from caspr_cli.optim.graft import direction, needs_second_moment
from caspr_cli.optim.options import Group
from caspr_cli.optim.precision import full_precision
from caspr_cli.optim.roots import damped_eigenvalues, eigendecomposition
from caspr_cli.optim.stacks import Stack


@torch.no_grad()
def diagnose(optimizer: KroneckerOptimizer) -> dict[str, Tensor]:
    """What the statistics and roots look like now.

    Returns, for all stacked blocks and axes (1-D, float64):
        ``condition``: of the damped statistics, lambda_max / lambda_min.
        ``damping_share``: part of the trace of the damped statistics that is damping.
        ``residual``: ``||A^p S~ - I||_F / sqrt(d)`` recomputed from the root in use and the statistics of now: the
            solver's error and the root's age together.
    and for all preconditioned tensors:
        ``graft_ratio``: the length of the graft's step over that of U.
        ``adam_cosine``: between U and the step of Adam (where the graft keeps a second moment).

    Empty before the first preconditioned step. Cost: one eigendecomposition of each statistic.
    """
    found: dict[str, list[Tensor]] = {}
    for index, group in enumerate(optimizer.param_groups):
        stacks = [s for s in optimizer.stacks(index) if bool((s.root_scale > 0).any())]
        for stack in stacks:
            with full_precision(stack.scale.device.type):
                for name, values in _factors(stack, group).items():
                    found.setdefault(name, []).append(values)
        if stacks:
            for name, values in _directions(optimizer, stacks, group).items():
                found.setdefault(name, []).append(values)
    return {name: torch.cat([v.flatten() for v in values]) for name, values in found.items()}


def _factors(stack: Stack, group: Group) -> dict[str, Tensor]:
    """Of all blocks that have had a gradient."""
    seen = stack.scale > 0
    correction, unit, root_scale = bias_correction(stack, group)[seen], stack.scale[seen], stack.root_scale[seen]
    p = root_exponent(group["order"], len(stack.S))
    values: dict[str, list[Tensor]] = {"condition": [], "damping_share": [], "residual": []}
    for S_i, A_i in zip(stack.S, stack.A, strict=True):
        S, A = S_i[seen] / correction.view(-1, 1, 1), A_i[seen]
        eigenvalues, _ = eigendecomposition(S)
        damped = damped_eigenvalues(eigenvalues, unit, group["eps"], group["damping"])
        shift = damped[:, 0] - eigenvalues[:, 0].double().clamp(min=0)
        d = S.shape[-1]
        values["condition"].append(damped[:, -1] / damped[:, 0])
        values["damping_share"].append(shift * d / damped.sum(1))
        # S~ in the units in which A was computed
        ratio = (unit.double() / root_scale.double()).square().view(-1, 1, 1)
        damped_S = (S.double() + shift.view(-1, 1, 1) * torch.eye(d, dtype=torch.float64, device=S.device)) * ratio
        product = torch.linalg.matrix_power(A.double(), p) @ damped_S
        identity = torch.eye(d, dtype=torch.float64, device=S.device)
        values["residual"].append((product - identity).norm(dim=(1, 2)) / d**0.5)
    return {name: torch.cat(v) for name, v in values.items()}


def _directions(optimizer: KroneckerOptimizer, stacks: list[Stack], group: Group) -> dict[str, Tensor]:
    """Length and angle of U against the graft's step, for tensors that fill a block or more in one stack."""
    if group["graft"] == "none":
        return {}
    beta1, beta2 = group["betas"]
    params = [p for stack in stacks for p in stack.rows if len(optimizer.layout(p, group).blocks) == 1]
    params = [p for p in params if group["precondition"] == "momentum" or p.grad is not None]
    if not params:
        return {}
    states = [optimizer.state[p] for p in params]
    steps = [int(s["step"]) for s in states]
    if group["precondition"] == "momentum":
        inputs = [s["exp_avg"] / (1 - beta1**t) for s, t in zip(states, steps, strict=True)]
    else:
        inputs = [p.grad for p in params if p.grad is not None]
    moments = [s["exp_avg_sq"] for s in states] if needs_second_moment(group["graft"]) else []
    graft = direction(group["graft"], inputs, moments, steps, beta2, group["graft_eps"])
    ratios, cosines = [], []
    for stack in stacks:
        chosen = [i for i, p in enumerate(params) if p in stack.rows]
        if not chosen:
            continue
        layouts = {params[i]: optimizer.layout(params[i], group) for i in chosen}
        stack.buffer.zero_()
        stack.fill(layouts, {params[i]: inputs[i] for i in chosen})
        U = precondition(stack, group["order"])
        stack.fill(layouts, {params[i]: graft[i] for i in chosen})
        for i in chosen:
            rows = stack.rows[params[i]]
            u, d = U[rows].double().flatten(), stack.buffer[rows].double().flatten()
            ratios.append(d.norm() / u.norm())
            cosines.append(F.cosine_similarity(u, d, dim=0))
    result = {"graft_ratio": torch.stack(ratios)}
    if needs_second_moment(group["graft"]):
        result["adam_cosine"] = torch.stack(cosines)
    return result
