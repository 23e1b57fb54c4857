"""One engine for the family: statistics, roots, combination, graft, momentum, decay.

The functions that do the mathematics are in the modules of those names; this class holds the state and the
order of things.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from caspr_cli.optim.blocks import Layout, Shape, merge_axes
from caspr_cli.optim.combine import apply_roots, root_exponent
from caspr_cli.optim.graft import (
    diagonal_step,
    direction,
    needs_second_moment,
    transfer_length,
    update_second_moment,
)
from caspr_cli.optim.options import OPTIONS, SMALLEST_EPS_FLOAT32, Group, validate
from caspr_cli.optim.precision import full_precision
from caspr_cli.optim.roots import inverse_root
from caspr_cli.optim.stacks import Stack, build_stacks
from caspr_cli.optim.statistics import accumulate, per_block


class KroneckerOptimizer(Optimizer):
    """The engine under :class:`CASPR`, :class:`Shampoo` and :class:`FullAdagrad`; see there for the options."""

    #: A context entered around each part of a step ("statistics", "roots", "apply"), for timing from outside.
    phase: Callable[[str], AbstractContextManager[None]] = staticmethod(lambda name: nullcontext())

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        validate(defaults)
        self._stacks: dict[int, list[Stack]] = {}  # group index -> stacks; derived from state, never saved
        self._layouts: dict[tuple[Shape, str, int], Layout] = {}
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy, with factors of their own: a view would take its whole stack along."""
        content: dict[str, Any] = super().__getstate__()
        state = {p: {k: v.clone() if is_factor(k) else v for k, v in s.items()} for p, s in self.state.items()}
        return content | {"state": defaultdict(dict, state)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stacks, self._layouts = {}, {}
        for group in self.param_groups:  # a state_dict of AdamW has fewer options
            for name in OPTIONS:
                group.setdefault(name, self.defaults[name])

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            validate(group)
            for p in group["params"]:
                if not p.is_floating_point():
                    raise ValueError(f"{type(self).__name__} takes real floating-point parameters but got {p.dtype}")
        except Exception:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but statistics and roots keep the type they were saved with.

        torch casts every floating tensor of the state to its parameter's type (pytorch issue 43706), which
        would round float32 factors of a bfloat16 parameter. Hooks of the user see what they see in torch: this
        acts on what the last of their pre-hooks gives, and before the first of their post-hooks.
        """
        given: list[dict[str, Any]] = []

        def restore(_: Optimizer) -> None:
            saved = (i for group in given[-1]["param_groups"] for i in group["params"])
            mine = (p for group in self.param_groups for p in group["params"])
            for i, p in zip(saved, mine, strict=True):
                for name, value in given[-1]["state"].get(i, {}).items():
                    if is_factor(name):
                        self.state[p][name] = value.to(p.device)

        handles = [
            self.register_load_state_dict_pre_hook(lambda _, content: given.append(content)),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform a single optimization step.

        Args:
            closure: re-evaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse()
        for index, group in enumerate(self.param_groups):
            grads = {p: -p.grad if group["maximize"] else p.grad for p in group["params"] if p.grad is not None}
            for p in grads:
                self._init_state(p, group)
            work = self._plan(group, grads)
            if work.steps:
                self._precondition(index, work)
            if rest := [p for p in grads if p not in work.inputs]:
                diagonal_step(rest, [grads[p] for p in rest], self.state, group)
        return loss

    @staticmethod
    def preconditions(p: Tensor, group: Group) -> bool:
        """Whether p is preconditioned from ``start_step`` on, or left to the graft method for good."""
        if group["precondition"] is False or p.numel() == 0:
            return False
        axes = len(merge_axes(tuple(p.shape), group["merge"]))
        return axes > 1 or bool(group["precondition_1d"]) or group["merge"] == "flatten"

    def layout(self, p: Tensor, group: Group) -> Layout:
        """How p is merged and cut."""
        key = tuple(p.shape), group["merge"], group["block_size"]
        if key not in self._layouts:
            self._layouts[key] = Layout.of(*key)
        return self._layouts[key]

    def stacks(self, index: int) -> list[Stack]:
        """The stacks of a param group; none before its first gradient."""
        return self._stacks.get(index, [])

    def _refuse_sparse(self) -> None:
        """Before anything has moved."""
        for group in self.param_groups:
            if any(p.grad is not None and p.grad.is_sparse for p in group["params"]):
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")

    def _init_state(self, p: Tensor, group: Group) -> None:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)  # on the CPU, as in torch: reading it costs no synchronization
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if "exp_avg_sq" not in state and needs_second_moment(group["graft"]):
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def _stacks_of(self, index: int, group: Group, params: list[Tensor]) -> list[Stack]:
        """The group's stacks; rebuilt from the state when a parameter is new or gone, or the state was replaced."""
        stacks, now, wanted = self.stacks(index), set(group["params"]), set(params)
        known = {p for stack in stacks for p in stack.rows}
        layouts = {p: self.layout(p, group) for p in group["params"] if p in known or p in wanted}
        intact = all(
            p in now and tuple(stack.buffer.shape[1:]) in layouts[p].blocks and stack.is_in(self.state, p, layouts[p])
            for stack in stacks
            for p in stack.rows
        )
        if not intact or not wanted <= known:
            members = [p for p in layouts if p in wanted or "step" in self.state.get(p, {})]
            dtypes = {p: factor_dtype(p, group) for p in members}
            stacks = self._stacks[index] = build_stacks(members, layouts, dtypes, self.state)
        return stacks

    def _plan(self, group: Group, grads: dict[Tensor, Tensor]) -> Work:
        """What this step does to each matrix that has a gradient."""
        steps = {p: int(self.state[p]["step"].item()) + 1 for p in grads if self.preconditions(p, group)}
        ages = {p: t - group["start_step"] for p, t in steps.items() if t >= group["start_step"]}
        due = {p for p, age in ages.items() if age % group["interval"] == 0}
        inputs = self._inputs(group, list(ages), grads, steps) if ages else {}
        return Work(group, grads, steps, due, inputs)

    def _inputs(
        self, group: Group, params: list[Tensor], grads: dict[Tensor, Tensor], steps: dict[Tensor, int]
    ) -> dict[Tensor, Tensor]:
        """What is preconditioned: the bias-corrected momentum, or the gradient. Updates the moments."""
        beta1, beta2 = group["betas"]
        G = [grads[p] for p in params]
        if needs_second_moment(group["graft"]):
            update_second_moment([self.state[p]["exp_avg_sq"] for p in params], G, beta2)
        if group["precondition"] == "gradient":
            return dict(zip(params, G, strict=True))
        exp_avg = [self.state[p]["exp_avg"] for p in params]
        torch._foreach_lerp_(exp_avg, G, 1 - beta1)
        return dict(zip(params, torch._foreach_div(exp_avg, [1 - beta1 ** steps[p] for p in params]), strict=True))

    def _precondition(self, index: int, work: Work) -> None:
        """Statistics of all, and the whole step of those that are past ``start_step``."""
        group = work.group
        for stack in self._stacks_of(index, group, list(work.steps)):
            with full_precision(stack.scale.device.type):
                self._step_stack(stack, work)
        if work.inputs:
            self._finish(work)

    def _step_stack(self, stack: Stack, work: Work) -> None:
        """Statistics of all blocks that have a gradient, roots of those that are due, U of those that are ready."""
        group = work.group
        layouts = {p: self.layout(p, group) for p in stack.rows}
        params = [p for p in stack.rows if p in work.steps]
        ready = [p for p in params if p in work.inputs]
        with self.phase("statistics"):
            ema = group["statistics"] == "ema"
            beta, weight = (group["betas"][1], 1 - group["betas"][1]) if ema else (1.0, 1.0)
            for part in stack.parts(params):
                part.fill(layouts, {p: work.grads[p] for p in part.rows})
                accumulate(part.S, part.scale, part.total, part.buffer, beta=beta, weight=weight)
        if due := [p for p in ready if p in work.due or p not in stack.rooted]:
            with self.phase("roots"):
                for part in stack.parts(due):
                    refresh_roots(part, group)
                stack.rooted.update(due)
        with self.phase("apply"):
            for part in stack.parts(ready):
                part.fill(layouts, {p: work.inputs[p] for p in part.rows})
                U = precondition(part, group["order"])
                for p, rows in part.rows.items():
                    _collect(work.updates, p, layouts[p], U[rows])

    def _finish(self, work: Work) -> None:
        """Graft, momentum where it comes after, decay, weights."""
        group, params = work.group, list(work.inputs)
        (beta1, beta2), lr, graft = group["betas"], float(group["lr"]), group["graft"]
        U = [work.updates[p].view(p.shape) for p in params]
        if graft != "none":
            moments = [self.state[p]["exp_avg_sq"] for p in params] if needs_second_moment(graft) else []
            steps, inputs = [work.steps[p] for p in params], list(work.inputs.values())
            transfer_length(U, direction(graft, inputs, moments, steps, beta2, group["graft_eps"]))
        if group["precondition"] == "gradient":
            # Until start_step this buffer was the diagonal method's momentum, of raw gradients: begin anew.
            exp_avg = [self.state[p]["exp_avg"] for p in params]
            ages = [work.steps[p] - group["start_step"] + 1 for p in params]
            if fresh := [m for m, age in zip(exp_avg, ages, strict=True) if age == 1]:
                torch._foreach_zero_(fresh)
            torch._foreach_lerp_(exp_avg, [u.to(m.dtype) for u, m in zip(U, exp_avg, strict=True)], 1 - beta1)
            U = list(torch._foreach_div(exp_avg, [1 - beta1**age for age in ages]))
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, U, alpha=-lr)
        torch._foreach_add_([self.state[p]["step"] for p in params], 1)


@dataclass
class Work:
    """One step of one param group, for the parameters that the engine preconditions."""

    group: Group
    grads: dict[Tensor, Tensor]
    steps: dict[Tensor, int]  # the number of this step, for each of them
    due: set[Tensor]  # whose roots are refreshed
    inputs: dict[Tensor, Tensor]  # what is preconditioned; the others are not past start_step yet
    updates: dict[Tensor, Tensor] = field(default_factory=dict)  # U, in merged shape


def is_factor(name: str) -> bool:
    """Whether an entry of the state is a view into a stack, of a type of its own."""
    return name.partition(".")[0] in ("scale", "root_scale", "total") or name.startswith(("statistics_", "root_"))


def _collect(updates: dict[Tensor, Tensor], p: Tensor, layout: Layout, blocks: Tensor) -> None:
    """Put p's blocks of one shape, ``[n, d_1, ..., d_k]``, where they belong in its update."""
    shape = tuple(blocks.shape[1:])
    if shape == layout.shape:  # one block: no copy
        updates[p] = blocks[0]
        return
    if p not in updates:
        updates[p] = torch.empty(layout.shape, dtype=blocks.dtype, device=blocks.device)
    torch._foreach_copy_([updates[p][cut] for cut in layout.blocks[shape]], list(blocks.unbind()))


def refresh_roots(stack: Stack, group: Group) -> None:
    """New roots for every block, from its statistics."""
    unit, correction = torch.where(stack.scale > 0, stack.scale, 1), bias_correction(stack, group)
    p = root_exponent(group["order"], len(stack.S))
    for S_i, A_i in zip(stack.S, stack.A, strict=True):
        A_i.copy_(inverse_root(S_i, unit, correction, p=p, eps=group["eps"], damping=group["damping"]))
    # Under relative damping a block without statistics has no scale yet; see precondition().
    stack.root_scale.copy_(stack.scale if group["damping"] == "relative" else unit)


def bias_correction(stack: Stack, group: Group) -> Tensor:
    """``[K]``: what statistics are divided by, the weights in a moving average or 1 for a sum."""
    if group["statistics"] == "accumulate":
        return torch.ones_like(stack.total)
    return torch.where(stack.total > 0, stack.total, 1)


def precondition(stack: Stack, order: float) -> Tensor:
    """U of what is in the buffer, for all blocks: ``[K, d_1, ..., d_k]``."""
    # A block whose gradient has been zero until after its last refresh has identity roots and takes today's scale.
    scale = torch.where(stack.root_scale > 0, stack.root_scale, stack.scale)
    scale = torch.where(scale > 0, scale, 1)
    return apply_roots(stack.buffer / per_block(scale, stack.buffer), stack.A, order)


def factor_dtype(p: Tensor, group: Group) -> torch.dtype:
    """The type of statistics and roots: float64 where the parameter, the user or a small eps asks for it."""
    if group["factor_dtype"] is not None:
        return cast(torch.dtype, group["factor_dtype"])
    small = group["damping"] == "relative" and group["eps"] < SMALLEST_EPS_FLOAT32
    return torch.float64 if p.dtype == torch.float64 or small else torch.float32
