"""Diagnostics: functions of an optimizer's state, computed when asked for and never on the way of a step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from caspr_cli.optim.combine import precondition, root_exponent
from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.fsdp import is_sharded
from caspr_cli.optim.graft import direction, look_ahead, needs_second_moment
from caspr_cli.optim.options import Group
from caspr_cli.optim.precision import full_precision
from caspr_cli.optim.refresh import damping_of
from caspr_cli.optim.roots import damping_shift, eigendecomposition
from caspr_cli.optim.scatter import fill
from caspr_cli.optim.stacks import Stack
from caspr_cli.optim.statistics import per_block

AT_ONCE = 2**22  # numbers in the statistics that are decomposed at once: bounds the memory
LOWEST = -16.0  # decades: about the rounding of float64


@torch.no_grad()
def diagnose(optimizer: KroneckerOptimizer) -> dict[str, Tensor]:
    """Return what the statistics and roots look like now.

    For all stacked blocks and their axes with statistics (1-D, float64):
        ``condition``: of the damped statistics, lambda_max / lambda_min.
        ``damping_share``: part of the trace of the damped statistics that is damping.
        ``residual``: ``||A^p S~ - I||_F / sqrt(d)`` recomputed from the root in use and the statistics of now: the
            solver's error and the root's age together.
        ``spectrum``: log10 of each eigenvalue of the damped statistics over the largest of its block and axis, at
            least ``LOWEST``.
    and for all tensors that have roots:
        ``graft_ratio``: the length of the graft's step over that of U.
        ``adam_cosine``: between U and the step of Adam (where the graft keeps a second moment).

    Empty before the first preconditioned step. Where ranks share the work, of the blocks that this rank owns, and of
    the tensors that it owns all blocks of and that are no DTensors. Cost: one eigendecomposition of each statistic.
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


@torch.no_grad()
def counters(optimizer: KroneckerOptimizer) -> dict[str, int]:
    """Return counts of what was refused since the optimizer was made: roots, of the blocks that this rank owns.

    Returns:
        ``rejected_roots``: new roots that were not finite or whose residual was too large, and were not used.
        ``skipped_gradients``: gradients of a tensor that were not finite, and moved nothing.
    """
    entries = [entry for state in optimizer.state.values() for entry in state.items()]
    rejected = sum(int(value.sum()) for name, value in entries if name.startswith("rejected."))
    return {"rejected_roots": rejected, "skipped_gradients": sum(int(n) for name, n in entries if name == "skipped")}


def _factors(stack: Stack, group: Group) -> dict[str, Tensor]:
    """Return the values that belong to axes, of all blocks whose roots are of a gradient."""
    seen, units, damping = stack.known.nonzero().flatten(), stack.unit(group), damping_of(stack, group)
    p = root_exponent(group["order"], len(stack.axes), group["exponent"])
    values: dict[str, list[Tensor]] = {"condition": [], "damping_share": [], "residual": [], "spectrum": []}
    parts = [(i, d, at) for i, d in enumerate(stack.sizes) for at in seen.split(max(1, AT_ONCE // (d * d)))]
    for place, d, at in parts:
        unit, eps, root_scale = units[at], damping[at], stack.root_scale[at]
        S, A = stack.statistics(place, at, group), stack.root(place, at, torch.float64)
        if stack.values:  # A has eigenvectors
            A = A * stack.values[place][at].double().pow(-1 / p).unsqueeze(1) @ A.mT
        eigenvalues, _ = eigendecomposition(S)
        lam = eigenvalues.double().clamp(min=0)
        shift = damping_shift(lam[:, -1], unit, eps, group["damping"])
        damped = lam + shift.unsqueeze(1)
        values["condition"].append(damped[:, -1] / damped[:, 0])
        values["damping_share"].append(shift * d / damped.sum(1))
        some = damped[damped[:, -1] > 0]  # a matrix of zeros has no spectrum
        values["spectrum"].append((some / some[:, -1:]).log10().clamp(min=LOWEST).flatten())
        # S~ in the units in which A was computed
        ratio = (unit.double() / root_scale.double()).square().view(-1, 1, 1)
        identity = torch.eye(d, dtype=torch.float64, device=S.device)
        product = torch.linalg.matrix_power(A, p) @ ((S.double() + shift.view(-1, 1, 1) * identity) * ratio)
        values["residual"].append((product - identity).norm(dim=(1, 2)) / d**0.5)
    return {name: torch.cat(v) for name, v in values.items()}


def _directions(optimizer: KroneckerOptimizer, stacks: list[Stack], group: Group) -> dict[str, Tensor]:
    """Return length and angle of U against the graft's step, for tensors that fill a block or more in one stack."""
    if group["graft"] == "none":
        return {}
    beta1, beta2 = group["betas"]
    known = [(stack, stack.known.tolist()) for stack in stacks]  # waits for the device once a stack
    seen = [p for stack, rooted in known for p, rows in stack.rows.items() if any(rooted[rows])]
    layouts = {p: optimizer.layout(p, group) for p in seen}
    params = [p for p, layout in layouts.items() if len(layout.blocks) == 1 and optimizer.share(p, group) == layout]
    without_gradient = group["precondition"] == "momentum" and not group["nesterov"]
    params = [p for p in params if (without_gradient or p.grad is not None) and not is_sharded(p)]
    if not params:
        return {}
    states = [optimizer.state[p] for p in params]
    steps = [int(s["step"]) for s in states]
    inputs = grads = [-p.grad if group["maximize"] else p.grad for p in params if p.grad is not None]
    if group["precondition"] == "momentum":
        exp_avg = [s["exp_avg"] for s in states]
        momenta = look_ahead(exp_avg, grads, beta1) if group["nesterov"] else exp_avg
        inputs = [M / (1 - beta1**t) for M, t in zip(momenta, steps, strict=True)]
    moments = [s["exp_avg_sq"] for s in states] if needs_second_moment(group["graft"]) else []
    graft = direction(group["graft"], inputs, moments, steps, beta2, group["graft_eps"])
    ratios, cosines = [], []
    for stack in stacks:
        scale = stack.input_scale(group)
        for p, M, D in zip(params, inputs, graft, strict=True):
            if p not in stack.rows:
                continue
            rows = stack.rows[p]
            X = scale.new_empty(rows.stop - rows.start, *stack.shape)
            fill(X, [p], layouts, [M])
            X.div_(per_block(scale[rows], X))
            u = precondition(X, torch.empty_like(X), stack, rows, group).double().flatten().clone()
            fill(X, [p], layouts, [D])
            d = X.double().flatten()
            ratios.append(d.norm() / u.norm())
            cosines.append(F.cosine_similarity(u, d, dim=0))
    result = {"graft_ratio": torch.stack(ratios)}
    if needs_second_moment(group["graft"]):
        result["adam_cosine"] = torch.stack(cosines)
    return result
