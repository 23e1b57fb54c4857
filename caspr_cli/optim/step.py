"""One rank's step of one param group, from top to bottom in the order in which a gradient goes through it.

gradients -> :func:`add_statistics` -> :func:`drop_broken` -> :func:`refresh_roots` -> :func:`update_moments`
-> :func:`preconditioned` -> :func:`finish` -> weights
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from caspr_cli.optim.blocks import Layout
from caspr_cli.optim.combine import precondition
from caspr_cli.optim.eigenbasis import measure
from caspr_cli.optim.finite import Finite
from caspr_cli.optim.fsdp import local, locals_of
from caspr_cli.optim.graft import (
    RMS,
    are_alike,
    diagonal_step,
    direction,
    frobenius,
    fusible,
    graft_of,
    look_ahead,
    needs_second_moment,
    rate,
    torch_adamw,
    transfer_length,
    update_second_moment,
)
from caspr_cli.optim.masked import Mask
from caspr_cli.optim.momentum import Pieces, averaged, forget_updates
from caspr_cli.optim.options import Group
from caspr_cli.optim.plan import Plan
from caspr_cli.optim.precision import full_precision
from caspr_cli.optim.refresh import refresh
from caspr_cli.optim.scatter import Rows, Workspace, add, fill, placed
from caspr_cli.optim.stacks import Stack, outgrown
from caspr_cli.optim.state import counter
from caspr_cli.optim.statistics import accumulate, per_block


@dataclass(frozen=True)
class Inputs:
    """The step of a param group, before it is known which of its gradients are finite."""

    group: Group
    plan: Plan
    state: Any  # of the optimizer
    stacks: list[Stack]
    shares: dict[Tensor, Layout]  # of each parameter of the plan the blocks that are this rank's
    shared: bool  # whether ranks share the work
    grads: dict[Tensor, Tensor]  # the part of each gradient that is on this rank
    steps: dict[Tensor, int]  # the number of this step, for each parameter of the plan that has a gradient
    seen: dict[Tensor, int]  # for each of these, the number of this gradient among those in its statistics
    finite: Finite
    masked: bool  # whether it is known on the device alone which are finite
    workspace: Workspace
    phase: Callable[[str], AbstractContextManager[None]]

    @property
    def device_type(self) -> str:
        return next((p.device.type for p in self.steps), "cpu")


@dataclass(frozen=True)
class Active(Inputs):
    """The same with finite gradients only, and who is preconditioned in this step."""

    layouts: dict[Tensor, Layout]  # of the parameters that are past ``start_step``, or have a polar factor before it
    early: bool  # whether some of these have no roots yet
    rest: list[Tensor]  # those that the graft method takes
    broken: list[Tensor]  # those left out for the first time: a gradient is not finite
    mask: Mask | None  # of those that are left out, where the host does not know it

    @property
    def complete(self) -> bool:
        """Whether all parameters that have a stack are preconditioned now: they have a gradient, and have started."""
        return len(self.layouts) == len(self.plan.layouts)

    def members(self, stack: Stack) -> list[Tensor]:
        """Return the stack's parameters that are preconditioned in this step."""
        return stack.members if self.complete else [p for p in stack.members if p in self.layouts]


def add_statistics(x: Inputs, received: Rows) -> None:
    """Add the gradients, here or ``received``, to the statistics of all blocks that have one."""
    if not x.steps:
        return
    group, due = x.group, [p for p in x.seen if p in x.grads]
    beta, weight = (group["betas"][1], 1 - group["betas"][1]) if group["statistics"] == "ema" else (1.0, 1.0)
    everyone = len(due) == len(x.plan.layouts)
    with full_precision(x.device_type, tf32=group["statistics_tf32"]), x.phase("statistics"):
        for stack in x.stacks:
            if not stack.axes:
                continue
            present = stack.members if everyone else [p for p in stack.members if p in x.grads]
            for members, rows in stack.chunks(present):
                X, out = x.workspace.blocks(stack, rows)
                _fill(X, stack, members, x, [x.grads[p] for p in members], received)
                owners = _owners(members, stack)
                numbers = [math.sqrt(p.numel()) for p in owners]
                size = (x.finite.norms(owners) / _constants(numbers, X.device, x)).to(X.dtype)
                S = [S_i[rows] for S_i in stack.S]
                scale, total = stack.scale[rows], stack.total[rows]
                keep = accumulate(S, stack.axes, scale, total, X, size, beta=beta, weight=weight)
                if stack.V is not None:
                    measure(stack, rows, X, out, keep, weight, group)


def drop_broken(x: Inputs) -> Active:
    """Return the step without parameters whose gradients are not finite. This waits for the device, or makes a mask.

    Counts gradients, and those that were skipped.
    """
    group, state, grads, broken, mask = x.group, x.state, dict(x.grads), [], None
    if x.masked:
        params = list(grads)
        mask = Mask.of(x.finite.norms(params) < math.inf, params, state, list(x.seen), group["betas"], x.workspace)
    for p in x.finite.others():
        del grads[p]
        if "skipped" not in state[p]:
            state[p]["skipped"] = counter()
        if state[p]["skipped"] == 0:  # as one that was saved on a GPU is
            broken.append(p)
        state[p]["skipped"] += 1
    if (seen := [p for p in x.seen if p in grads]) and mask is None:
        torch._foreach_add_([state[p]["gradients"] for p in seen], 1)
    start, waits, whole = group["start_step"], x.plan.waits, x.plan.layouts
    rooted = [p for p in seen if x.seen[p] >= start + waits[p]]
    ready = seen if group["polar"] else rooted
    layouts = whole if len(ready) == len(whole) else {p: whole[p] for p in ready}
    early = len(rooted) < len(ready)
    rest = [p for p in grads if p not in layouts] if len(layouts) < len(grads) else []
    forget_updates([state[p] for p in (rest if group["precondition"] == "gradient" else grads)])
    return Active(**vars(x) | {"grads": grads}, layouts=layouts, early=early, rest=rest, broken=broken, mask=mask)


def refresh_roots(x: Active) -> None:
    """Compute the roots of the blocks whose turn it is, or whose statistics have outgrown the roots."""
    if not x.seen or max(x.seen.values()) < x.group["start_step"]:
        return
    due = []
    stacks = [stack for stack in x.stacks if stack.axes]
    for stack, grown in zip(stacks, outgrown(stacks), strict=True):
        if rows := _due(stack, grown, x):
            due.append((stack, rows))
    if due:
        with x.phase("roots"):
            refresh(due, x.group)


def _due(stack: Stack, grown: list[bool], x: Active) -> list[int]:
    """Return the rows of a stack that get new roots in this step."""
    start, seen = x.group["start_step"], set(x.seen.values())
    if x.complete and len(seen) == 1 and len(stack.rooted) == len(stack.members) and min(seen) > start:
        age = min(seen) - start  # as in most steps
        return [row for row, yes in enumerate(grown) if yes or stack.is_due(row, age)]
    due: list[int] = []
    for p, rows in stack.rows.items():
        age = x.seen.get(p, 0) - start
        if age < 0 or p not in x.grads:
            continue
        # First roots that are many come at their turns. A state that has no roots although their turns are over, such
        # as that of another optimizer, gets all of them at once.
        wait = x.plan.waits[p]
        first = age == wait == 0 or (age >= wait and p not in stack.rooted)
        due += [row for row in range(rows.start, rows.stop) if first or grown[row] or stack.is_due(row, age)]
        if age >= wait or age <= min(stack.refresh_offset[rows]):
            stack.rooted.add(p)
    return due


def update_rest(x: Active) -> None:
    """Take the graft method's step for the parameters that are not preconditioned now."""
    for waits in (True, False):  # those that are not past ``start_step``, and those that are left to it for good
        params = [p for p in x.rest if waits == (p in x.plan.layouts)]
        if params:
            graft, nesterov = graft_of(x.group, preconditioned=waits), x.group["nesterov"] and waits
            step = diagonal_step if x.mask is None else x.mask.diagonal_step
            step(params, [x.grads[p] for p in params], x.state, x.group, graft, nesterov=nesterov)


def update_weights(x: Active) -> None:
    """Take the step of the preconditioned parameters, a chunk at a time, where this rank has all of their blocks."""
    for device in dict.fromkeys(p.device for p in x.layouts):
        _update_weights_on(device, x)


def _update_weights_on(device: torch.device, x: Active) -> None:
    """Do so for those on one device: the lengths of tensors on two cannot be in one vector."""
    with full_precision(device.type):
        scattered = [p for p in x.plan.scattered if p in x.layouts and p.device == device]
        lengths = update_moments(scattered, x)
        pieces: Pieces = {p: {} for p in scattered}
        for stack in (stack for stack in x.stacks if stack.scale.device == device):
            scale = stack.input_scale(x.group)
            for members, rows in stack.chunks(x.members(stack)):
                if stack.whole and x.group["precondition"] == "momentum":
                    own = _lengths(members, x)
                    _finish_whole(members, preconditioned(stack, members, rows, scale, x, {}), own, x)
                    continue
                whole = [p for p in members if p not in pieces]
                lengths |= update_moments(whole, x)
                U = preconditioned(stack, members, rows, scale, x, {})
                at = {p: U[stack.rows[p].start - rows.start : stack.rows[p].stop - rows.start] for p in members}
                finish({p: {stack.shape: at[p]} for p in whole}, lengths, x, x.layouts)
                for p in members:
                    if p in pieces:
                        pieces[p][stack.shape] = at[p].clone()
        finish(pieces, lengths, x, x.layouts)


def update_moments(params: list[Tensor], x: Active) -> dict[Tensor, Tensor]:
    """Count the step, update the moments, and return how long the graft's steps are; nothing without a graft."""
    lengths = _lengths(params, x) if params else None
    return {} if lengths is None else dict(zip(params, lengths.unbind(), strict=True))


def _lengths(params: list[Tensor], x: Active) -> Tensor | None:
    """Do the work of :func:`update_moments`, and return the lengths ``[n]``, or None without a graft."""
    if len(types := {p.dtype for p in params}) != 1:  # torch's kernel takes one type at a time
        found: dict[Tensor, Tensor] = {}
        for t in types:
            found |= update_moments([p for p in params if p.dtype == t], x)
        return torch.stack([found[p] for p in params]) if found else None
    group, mask, states, sharded = x.group, x.mask, [x.state[p] for p in params], x.plan.sharded
    (beta1, beta2), graft, first = group["betas"], group["graft"], group["precondition"] == "momentum"
    grads, steps = [x.grads[p] for p in params], [s["step"] for s in states]
    moments = locals_of([s["exp_avg_sq"] for s in states], sharded) if needs_second_moment(graft) else []
    exp_avg = locals_of([s["exp_avg"] for s in states], sharded)
    here = locals_of(params, sharded)
    can_fuse = fusible if mask is None else are_alike
    if graft == "adam" and first and not group["nesterov"] and can_fuse(here, grads, exp_avg, moments):
        out = x.workspace.like("graft", here)  # zeros, on which a kernel takes the step of Adam
        if mask is None:
            torch_adamw(out, grads, exp_avg, moments, steps, group, lr=1.0, weight_decay=0.0, fused=True)
        else:
            mask.fused_adamw(params, out, grads, exp_avg, moments, x.state, group, lr=1.0, weight_decay=0.0)
        return frobenius(out)
    if mask is not None:
        mask.update_moments(params, grads, exp_avg if first else [], moments, group["betas"])
    else:
        torch._foreach_add_(steps, 1)
        if moments:
            update_second_moment(moments, grads, beta2)
        if first:
            torch._foreach_lerp_(exp_avg, grads, 1 - beta1)
    if not has_lengths(group):
        return None
    if graft == "rms":
        numbers, device = [RMS * math.sqrt(p.numel()) for p in here], here[0].device
        if mask is None:
            return x.workspace.constant(numbers, torch.float64, device)
        lengths = _constants(numbers, device, x)
    elif mask is None:
        T = [x.steps[p] for p in params]
        ahead = list(torch._foreach_div(momenta(params, x), [1 - beta1**t for t in T])) if first else grads
        return frobenius(direction(graft, ahead, moments, T, beta2, group["graft_eps"]))
    else:
        ahead = mask.corrected(momenta(params, x), params, beta1) if first else grads
        lengths = frobenius(mask.direction(params, ahead, moments, group, graft))
    return torch.where(mask.is_finite(params), lengths, 0)


def has_lengths(group: Group) -> bool:
    """Whether U gets the length of a graft's step: not without a graft, nor where its polar factor has it already."""
    return group["graft"] != "none" and not (group["graft"] == "rms" and group["polar"])


def momenta(params: list[Tensor], x: Active) -> list[Tensor]:
    """Return what is preconditioned in ``precondition="momentum"``, without bias correction, as this rank has it.

    Where there is a mask, Nesterov's are not finite where the gradient is not.
    """
    exp_avg = locals_of([x.state[p]["exp_avg"] for p in params], x.plan.sharded)
    if not x.group["nesterov"]:
        return exp_avg
    return look_ahead(exp_avg, [x.grads[p] for p in params], x.group["betas"][0])


def inputs_of(params: list[Tensor], x: Active) -> list[Tensor]:
    """Return what is preconditioned, momenta without bias correction or gradients, as this rank has it.

    Where there is a mask, some may not be finite.
    """
    return momenta(params, x) if x.group["precondition"] == "momentum" else [x.grads[p] for p in params]


def preconditioned(
    stack: Stack, members: list[Tensor], rows: slice, scale: Tensor, x: Active, received: Rows
) -> Tensor:
    """Return U of these parameters' blocks ``[k, d_1, ..., d_k]``: of bias-corrected momentum, or of the gradient.

    Where a gradient is not finite, U is zero, or its length will be.

    Args:
        scale: the stack's :meth:`Stack.input_scale`.
        received: rows of these inputs.
    """
    group = x.group
    with x.phase("apply"):
        X, out = x.workspace.blocks(stack, rows)
        first = group["precondition"] == "momentum"
        _fill(X, stack, members, x, inputs_of(members, x), received)
        owners, factor = _owners(members, stack), scale[rows].reciprocal()
        if x.mask is not None and not (first and not group["nesterov"] and has_lengths(group)):
            # Nesterov's momentum has the gradient in it, and without lengths nothing else makes U zero.
            X.masked_fill_(per_block(x.mask.of_params(x.mask.broken, owners), X), 0)
        if first and x.mask is not None:
            factor = factor / x.mask.bias_of(group["betas"][0], owners).to(factor.dtype)
        elif first:
            bias = _constants([1 - group["betas"][0] ** x.steps[p] for p in owners], factor.device, x)
            factor = factor / bias.to(factor.dtype)
        X.mul_(per_block(factor, X))
        return precondition(X, out, stack, rows, group, early=x.early)


def _fill(X: Tensor, stack: Stack, members: list[Tensor], x: Inputs, tensors: list[Tensor], received: Rows) -> None:
    """Copy the tensors of these parameters, or their rows from other ranks, to X ``[k, d_1, ..., d_k]``."""
    if stack.whole and not received:
        torch.stack([t if t.shape == stack.shape else t.reshape(stack.shape) for t in tensors], out=X)  # in one call
    else:
        fill(X, members, x.shares, [received.get(p, t) for p, t in zip(members, tensors, strict=True)])


def _finish_whole(members: list[Tensor], U: Tensor, lengths: Tensor | None, x: Active) -> None:
    """Do as :func:`finish` for parameters that are one block each, in few calls however many they are."""
    group, lr, decay = x.group, rate(x.group), x.group["weight_decay"]
    if lengths is not None:
        have = frobenius(U.unbind())
        U.mul_(per_block(torch.where(have > 0, lengths / have, 0).to(U.dtype), U))
    if decay:
        torch._foreach_mul_(members, 1 - lr * decay if x.mask is None else x.mask.decay(group, members))
    updates = [u if u.shape == p.shape else u.view(p.shape) for p, u in zip(members, U.unbind(), strict=True)]
    add(members, updates, -lr)


def finish(
    pieces: Pieces,
    lengths: dict[Tensor, Tensor],
    x: Active,
    layouts: dict[Tensor, Layout],
    known: list[Tensor] | None = None,
) -> None:
    """Graft, momentum where it comes after, decay, weights.

    Args:
        pieces: U of each parameter, or its rows that are on this rank.
        lengths: of the graft's steps, which U gets.
        layouts: of what is on this rank.
        known: the norms of U, where a piece is of rows.
    """
    if not pieces:
        return
    group, params = x.group, {p: local(p) for p in pieces}
    lr = rate(group)
    if wanted := [lengths[p] for p in pieces if p in lengths]:
        transfer_length([list(U.values()) for U in pieces.values()], wanted, known)
    if group["weight_decay"]:
        kept = 1 - lr * group["weight_decay"] if x.mask is None else x.mask.decay(group, list(pieces))
        torch._foreach_mul_(list(params.values()), kept)
    if group["precondition"] == "momentum":
        add(*placed(pieces, layouts, params), -lr)
        return
    add(list(params.values()), averaged(pieces, layouts, x.state, group, x.mask), -lr)


def _owners(members: list[Tensor], stack: Stack) -> list[Tensor]:
    """Return the parameter of each block ``[k]`` that these have in a stack."""
    return [p for p in members for _ in range(stack.rows[p].start, stack.rows[p].stop)]


def _constants(values: list[float], device: torch.device, x: Inputs) -> Tensor:
    """Return ``[n]`` in float64; of equal ones one number on the CPU, for which nothing is sent to the device."""
    if len(set(values)) == 1:
        return torch.tensor(values[0], dtype=torch.float64, device="cpu")
    return x.workspace.constant(values, torch.float64, device)
