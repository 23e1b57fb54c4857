"""One engine for the family: statistics, roots, combination, graft, momentum, decay.

The functions that do the mathematics are in the modules of those names; this class holds the state and the
order of things.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from caspr_cli.optim.blocks import Layout, merge_axes
from caspr_cli.optim.combine import apply_roots, root_exponent
from caspr_cli.optim.graft import (
    diagonal_step,
    direction,
    needs_second_moment,
    transfer_length,
    update_second_moment,
)
from caspr_cli.optim.options import SMALLEST_EPS_FLOAT32, Group, validate
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
        self._layouts: dict[Tensor, Layout] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stacks, self._layouts = {}, {}

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            validate(group)
            for p in group["params"]:
                if p.is_complex():
                    raise ValueError(f"{type(self).__name__} does not support complex parameters")
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but statistics and roots keep the type they were saved with.

        torch casts every floating tensor of the state to its parameter's type (pytorch issue 43706), which
        would round float32 factors of a bfloat16 parameter.
        """
        super().load_state_dict(state_dict)
        saved = (i for group in state_dict["param_groups"] for i in group["params"])
        mine = (p for group in self.param_groups for p in group["params"])
        for i, p in zip(saved, mine, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if name.startswith(("statistics_", "root_", "scale")):
                    self.state[p][name] = value.to(p.device)
        self._stacks, self._layouts = {}, {}

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
        if p not in self._layouts:
            self._layouts[p] = Layout.of(tuple(p.shape), group["merge"], group["block_size"])
        return self._layouts[p]

    def stacks(self, index: int) -> list[Stack]:
        """The stacks of a param group; none before its first gradient."""
        return self._stacks.get(index, [])

    def correction(self, stack: Stack, group: Group) -> Tensor:
        """Bias correction of a stack's statistics as they are now, ``[K]``."""
        return bias_correction(stack, group, {p: int(self.state[p]["step"]) for p in stack.rows})

    def _init_state(self, p: Tensor, group: Group) -> None:
        if cast(Tensor, p.grad).is_sparse:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)  # on the CPU, as in torch: reading it costs no synchronization
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if needs_second_moment(group["graft"]):
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def _stacks_of(self, index: int, group: Group, params: list[Tensor]) -> list[Stack]:
        """The group's stacks, rebuilt when a parameter has its first gradient."""
        stacks = self.stacks(index)
        known = {p for stack in stacks for p in stack.rows}
        if not known.issuperset(params):
            members = [p for p in group["params"] if p in known or p in set(params)]
            layouts = {p: self.layout(p, group) for p in members}
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
        for p in work.inputs:
            shape, dtype = self.layout(p, group).shape, factor_dtype(p, group)
            work.updates[p] = torch.empty(shape, dtype=dtype, device=p.device)
        for stack in self._stacks_of(index, group, list(work.steps)):
            with full_precision(stack.scale.device.type):
                self._step_stack(stack, work)
        if work.inputs:
            self._finish(work)

    def _step_stack(self, stack: Stack, work: Work) -> None:
        """Statistics of all blocks that have a gradient, roots of those that are due, U of those that are ready."""
        group = work.group
        params = [p for p in stack.rows if p in work.steps]
        if not params:
            return
        with self.phase("statistics"):
            part, index = stack.take(params)
            part.fill(self._layouts, {p: work.grads[p] for p in params})
            ema = group["statistics"] == "ema"
            beta, weight = (group["betas"][1], 1 - group["betas"][1]) if ema else (1.0, 1.0)
            accumulate(part.S, part.scale, part.buffer, beta=beta, weight=weight)
            stack.put(part, index)
        if due := [p for p in params if p in work.due]:
            with self.phase("roots"):
                part, index = stack.take(due)
                refresh_roots(part, group, bias_correction(part, group, work.steps))
                stack.put(part, index)
        if ready := [p for p in params if p in work.inputs]:
            with self.phase("apply"):
                part, _ = stack.take(ready)
                part.fill(self._layouts, {p: work.inputs[p] for p in ready})
                U = precondition(part, group["order"])
                for p in ready:
                    blocks = U[part.rows[p]]
                    if blocks.shape[1:] == work.updates[p].shape:  # one block: no copy
                        work.updates[p] = blocks[0]
                    else:
                        targets = self._layouts[p].views(work.updates[p], tuple(U.shape[1:]))
                        torch._foreach_copy_(targets, list(blocks.unbind()))

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
            torch._foreach_mul_(exp_avg, [float(age > 1) for age in ages])
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


def refresh_roots(stack: Stack, group: Group, correction: Tensor) -> None:
    """New roots for every block, from its statistics divided by ``correction`` ``[K]``."""
    unit = torch.where(stack.scale > 0, stack.scale, 1)
    p = root_exponent(group["order"], len(stack.S))
    for S_i, A_i in zip(stack.S, stack.A, strict=True):
        A_i.copy_(inverse_root(S_i, unit, correction, p=p, eps=group["eps"], damping=group["damping"]))
    # Under relative damping a block without statistics has no scale yet; see precondition().
    stack.root_scale.copy_(stack.scale if group["damping"] == "relative" else unit)


def bias_correction(stack: Stack, group: Group, steps: dict[Tensor, int]) -> Tensor:
    """``[K]``: 1 - betas[1]^t after t updates of the block's parameter, or 1 for a sum."""
    beta2 = group["betas"][1]
    corrections = [
        1 - beta2 ** steps[p] if group["statistics"] == "ema" else 1.0
        for p, rows in stack.rows.items()
        for _ in range(rows.start, rows.stop)
    ]
    return torch.tensor(corrections, dtype=stack.scale.dtype, device=stack.scale.device)


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
