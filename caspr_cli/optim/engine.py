"""One engine for the family: statistics, roots, combination, graft, momentum, decay.

The functions that do the mathematics are in the modules of those names; this class holds the state and the
order of things.
"""

from __future__ import annotations

import math
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from caspr_cli.common.ranges import SMALLEST_EPS_FLOAT32, without_removed
from caspr_cli.optim.blocks import Layout, Shape, is_vector
from caspr_cli.optim.combine import precondition
from caspr_cli.optim.finite import Finite, norms_of_rows
from caspr_cli.optim.graft import (
    adam_length,
    diagonal_step,
    direction,
    frobenius,
    fusible,
    needs_second_moment,
    transfer_length,
    update_second_moment,
)
from caspr_cli.optim.options import (
    OPTIONS,
    Group,
    adopted,
    factor_dtype,
    is_float64_for_eps,
    root_options,
    validate,
)
from caspr_cli.optim.placing import Rows, chunks, copy, fill, fill_whole, placed
from caspr_cli.optim.precision import full_precision
from caspr_cli.optim.refresh import refresh
from caspr_cli.optim.rooms import Rooms
from caspr_cli.optim.rows import (
    Route,
    any_sharded,
    check_placements,
    distribute,
    is_counted,
    is_sharded,
    local,
    locals_of,
)
from caspr_cli.optim.schedule import AT_ONCE, EIGH_FLOPS, phases
from caspr_cli.optim.shard import Exchange, Loads, Meeting, Post, agree, collect, summed, world_size
from caspr_cli.optim.stacks import (
    Stack,
    Storage,
    build_stacks,
    check_factors,
    is_factor,
    outdated,
    outgrown,
    sent,
)
from caspr_cli.optim.statistics import accumulate, per_block
from caspr_cli.optim.work import Plan, Updates, Work

# Entries of a state that count: steps, gradients since its statistics began, updates in the momentum of
# precondition="gradient", gradients that were not finite.
COUNTERS = ("step", "gradients", "updates", "skipped")

MOST_NAMED = 8  # parameters in a warning


class KroneckerOptimizer(Optimizer):
    """The engine under :class:`CASPR`, :class:`Shampoo` and :class:`FullAdagrad`; see there for the options."""

    #: A context entered around each part of a step ("statistics", "roots", "apply", "communication"), for timing from
    #: outside.
    phase: Callable[[str], AbstractContextManager[None]] = staticmethod(lambda name: nullcontext())

    #: Options that make a class what it is: no param group and no loaded state changes them.
    fixed: Mapping[str, Any] = types.MappingProxyType({})

    #: Seconds that ``state_dict()`` waits for other ranks; read in the first step.
    patience: float = 300

    _has_warned_of_eps = False

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        validate(defaults)
        self._forget()
        self._owners: dict[Tensor, dict[Shape, list[int]]] = {}  # the rank of each block
        self._divided = 0  # ranks among which the factors in the state are divided; 0: they are whole
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """What is derived from the state, and never saved."""
        self._stacks: dict[int, list[Stack]] = {}  # group index -> stacks
        self._plans: dict[int, Plan] = {}  # group index -> plan
        self._layouts: dict[tuple[Shape, str, int, str, int], Layout] = {}
        self._rooms = Rooms()
        self._shares: dict[Tensor, Layout] = {}  # of parameters that have owners, the blocks that are this rank's
        self._posts: dict[torch.device, Post] = {}
        self._meeting: Meeting | None = None
        self._routes: dict[Tensor, Route] = {}  # of those whose rows are divided among ranks
        self._exchanges: dict[tuple[str, torch.device], Exchange] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy."""
        content: dict[str, Any] = super().__getstate__()
        return content | {"_owners": self._owners, "_divided": self._divided}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        if "_owners" not in state:  # a state_dict, which is whole
            self._owners, self._divided = {}, 0
        self.defaults.setdefault("batch_axes", 0)  # of a pickle of an older version
        self.defaults = without_removed(self.defaults)
        self.param_groups = [without_removed(group) for group in self.param_groups]
        for group in self.param_groups:
            for name in OPTIONS:
                group.setdefault(name, self.defaults[name])
            group.setdefault("roots_of", root_options(group))
            for p in group["params"]:
                self._count_as_before(p, group)

    def _count_as_before(self, p: Tensor, group: Group) -> None:
        """A state of an older version has one counter. What it did not count is of a run from the first step on."""
        state = self.state.get(p, {})
        if "gradients" not in state and (p in self._owners or any(map(is_factor, state))):
            step = counter(state.get("step", 0))
            state["gradients"] = step.clone()
            if group["precondition"] == "gradient":
                state["updates"] = (step - group["start_step"] + 1).clamp(min=0)

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            without_removed(group)
            validate(group)
            for name, value in self.fixed.items():
                if group[name] != value:
                    raise ValueError(f"{name} of {type(self).__name__} is {value} but is: {group[name]}")
            for p in group["params"]:
                if not p.is_floating_point():
                    raise ValueError(f"{type(self).__name__} takes real floating-point parameters but got {p.dtype}")
                check_placements(p, world_size())
        except Exception:
            self.param_groups.pop()
            raise
        group.setdefault("roots_of", root_options(group))
        self._warn_of_eps(group, stacklevel=6)  # who called the class

    def _warn_of_eps(self, group: Group, stacklevel: int) -> None:
        """Once, where an eps of AdamW's size changes what is computed in: it may be meant for AdamW's."""
        if self._has_warned_of_eps or not group["eps"] < SMALLEST_EPS_FLOAT32:
            return
        if any(self.preconditions(p, group) and is_float64_for_eps(p, group) for p in group["params"]):
            self._has_warned_of_eps = True
            warnings.warn(
                f"eps={group['eps']:g} is damping (relative to the largest eigenvalue of the statistics), not the eps "
                f"of AdamW, which is graft_eps. Below {SMALLEST_EPS_FLOAT32:g} statistics and roots are float64, which "
                "takes more memory and time. If this is meant, factor_dtype=torch.float64 says so without a warning",
                stacklevel=stacklevel,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but statistics and roots keep the type they were saved with.

        torch casts every floating tensor of the state to its parameter's type (pytorch issue 43706), which
        would round float32 factors of a bfloat16 parameter. Options come from the state, but for those that are not its
        to say: see :func:`caspr_cli.optim.options.adopted`. Hooks of the user see what they see in torch: this
        acts on what the last of their pre-hooks gives, and before the first of their post-hooks. Moments of a
        parameter of ``fully_shard`` may be whole: each rank takes its rows.

        Raises:
            ValueError: an option is out of its range, or a parameter has another shape or other blocks than in the
                state. Nothing has changed then.
        """
        given: list[dict[str, Any]] = []

        def take(_: Optimizer, content: dict[str, Any]) -> dict[str, Any]:
            content = self._with_own_options(content)
            self._check(content)
            given.append(self._with_own_rows(content))
            return given[-1]

        def restore(_: Optimizer) -> None:
            saved = (i for group in given[-1]["param_groups"] for i in group["params"])
            for i, p in zip(saved, self._params, strict=True):
                for name, value in given[-1]["state"].get(i, {}).items():
                    if is_factor(name):
                        self.state[p][name] = value.to(p.device)
                    elif name in COUNTERS:
                        self.state[p][name] = counter(value)

        handles = [
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        for group in self.param_groups:
            self._warn_of_eps(group, stacklevel=3)

    def _with_own_options(self, content: dict[str, Any]) -> dict[str, Any]:
        """A state_dict, with what is not its to say from the groups of now."""
        groups = list(content["param_groups"])
        for i, (saved, mine) in enumerate(zip(groups, self.param_groups, strict=False)):
            groups[i] = adopted(saved, mine, dict(self.fixed))
        return content | {"param_groups": groups}

    def _check(self, content: dict[str, Any]) -> None:
        """Refuse a state_dict with options that cannot be, or of parameters of other shapes.

        Raises:
            ValueError: names the option, or the parameter by its number in the groups.
        """
        groups = content["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            return  # which torch refuses
        for group in groups:
            validate(group)
        saved = [(i, group) for group in groups for i in group["params"]]
        for number, (p, (i, group)) in enumerate(zip(self._params, saved, strict=True)):
            state = content["state"].get(i, {})
            for shape in {tuple(state[name].shape) for name in ("exp_avg", "exp_avg_sq") if name in state}:
                if shape != tuple(p.shape):
                    raise ValueError(
                        f"parameter {number} has shape {tuple(p.shape)} here and {shape} in the state: "
                        "param groups or their parameters were in another order when it was saved"
                    )
            if self.preconditions(p, group):
                check_factors(state, p, self.layout(p, group))

    @property
    def _params(self) -> list[Tensor]:
        """In the order of a state_dict."""
        return [p for group in self.param_groups for p in group["params"]]

    def _with_own_rows(self, content: dict[str, Any]) -> dict[str, Any]:
        """A state_dict, with this rank's rows of moments that were saved whole; torch compares the groups later."""
        saved = [i for group in content["param_groups"] for i in group["params"]]
        state = dict(content["state"])
        for i, p in zip(saved, self._params, strict=False):
            if is_sharded(p):
                state[i] = {
                    name: distribute(value, p, dist.get_rank()) if is_whole(name, value, p) else value
                    for name, value in state.get(i, {}).items()
                }
        return content | {"state": state}

    def state_dict(self) -> dict[str, Any]:
        """As in torch, and whole: where ranks share the work it holds the statistics and roots of all of them.

        Then it is a collective operation, to be called on every rank. What it returns may be loaded by any number of
        ranks.

        Raises:
            RuntimeError: not all ranks have called it within ``patience``.
        """
        if not self._divided:
            return super().state_dict()
        if self._meeting is not None:
            self._meeting.wait()

        def complete(_: Optimizer, content: dict[str, Any]) -> None:
            for i, factors in self._whole_factors().items():
                content["state"][i] = {k: v for k, v in content["state"].get(i, {}).items() if not is_factor(k)}
                content["state"][i] |= factors

        handle = self.register_state_dict_post_hook(complete, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _whole_factors(self) -> dict[int, dict[str, Tensor]]:
        """Of each parameter that has owners, by its number in a state_dict."""
        layouts = {
            i: (p, self.layout(p, group))
            for i, (p, group) in enumerate((p, group) for group in self.param_groups for p in group["params"])
            if p in self._owners
        }
        mine = {i: {k: v for k, v in self.state.get(p, {}).items() if is_factor(k)} for i, (p, _) in layouts.items()}
        whole: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for owner, entries in enumerate(collect(mine, {i: p.device for i, p in enumerate(self._params)})):
            for i, named in entries.items():
                p, layout = layouts[i]
                for name, rows in named.items():
                    owners = self._owners[p][layout.parts[int(name.rpartition(".")[2])]]
                    blank = rows.new_empty(len(owners), *rows.shape[1:])
                    whole[i].setdefault(name, blank)[[j for j, r in enumerate(owners) if r == owner]] = rows
        return whole

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
        for index in [i for i in self._plans if i >= len(self.param_groups)]:
            del self._plans[index]
            self._stacks.pop(index, None)
        plans = [self._plan(index, group) for index, group in enumerate(self.param_groups)]
        self._divide(plans)
        given: dict[int, dict[Tensor, Tensor]] = {}
        for index, (group, plan) in enumerate(zip(self.param_groups, plans, strict=True)):
            grads = {p: G for p in group["params"] if (G := p.grad) is not None}
            if plan.sharded:
                grads = {p: local(G) for p, G in grads.items()}
            if grads:
                given[index] = {p: -G for p, G in grads.items()} if group["maximize"] else grads
        divided = [grads for index, grads in given.items() if plans[index].sharded]
        norms = norms_of_rows({p: G for grads in divided for p, G in grads.items() if is_sharded(p)})
        works = [self._begin(index, plans[index], grads, norms) for index, grads in given.items()]
        lengths = self._deal(works) if norms else {}
        for work in works:
            self._prepare(work)
        shared = [work for work in works if work.layouts and work.shared]
        updates = self._send(shared, lengths) if shared else None
        for work in works:
            if work.rest:
                diagonal_step(work.rest, [work.grads[p] for p in work.rest], self.state, work.group)
            if work.layouts and not work.shared:
                with full_precision(next(iter(work.layouts)).device.type):
                    self._apply(work)
        if updates is not None:
            self._receive(shared, updates)
        if broken := {p for work in works for p in work.broken}:
            self._warn_of_gradients(broken)
        return loss

    def _warn_of_gradients(self, broken: set[Tensor]) -> None:
        """That these were not finite."""
        found = [f"parameter {i} of shape {tuple(p.shape)}" for i, p in enumerate(self._params) if p in broken]
        more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        warnings.warn(
            f"a gradient is not finite: {', '.join(found[:MOST_NAMED])}{more} (numbers as in state_dict()). What has "
            'one is left out of the step. This is said once of each; state["skipped"] counts them',
            stacklevel=5,  # who called step(), which torch wraps twice
        )

    @property
    def ranks(self) -> int:
        """How many ranks share the work: each has statistics and roots of its own blocks alone."""
        return self._divided or 1

    @property
    def bytes_received(self) -> int:
        """By this rank in the last step, its own share included."""
        carriers: list[Post | Exchange] = [*self._posts.values(), *self._exchanges.values()]
        return sum(carrier.moved for carrier in carriers)

    @staticmethod
    def preconditions(p: Tensor, group: Group) -> bool:
        """Whether p is preconditioned from ``start_step`` on, or left to the graft method for good."""
        if group["precondition"] is False or p.numel() == 0:
            return False
        vector = is_vector(p.shape[group["batch_axes"] :])
        return not vector or bool(group["precondition_1d"]) or group["merge"] == "flatten"

    def layout(self, p: Tensor, group: Group) -> Layout:
        """How p is merged and cut."""
        key = tuple(p.shape), group["merge"], group["block_size"], group["axes"], group["batch_axes"]
        if key not in self._layouts:
            self._layouts[key] = Layout.of(*key)
        return self._layouts[key]

    def share(self, p: Tensor, group: Group) -> Layout:
        """The blocks of p that this rank owns: all of them but under data parallelism."""
        return self._shares.get(p) or self.layout(p, group)

    def stacks(self, index: int) -> list[Stack]:
        """The stacks of a param group, of the blocks that this rank owns; none before its first gradient."""
        return self._stacks.get(index, [])

    def _refuse_sparse(self) -> None:
        """Before anything has moved."""
        for group in self.param_groups:
            if any((G := p.grad) is not None and G.is_sparse for p in group["params"]):
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")

    def _init_state(self, p: Tensor, group: Group) -> None:
        state = self.state[p]
        needed = ("exp_avg", "exp_avg_sq") if needs_second_moment(group["graft"]) else ("exp_avg",)
        if any(name not in state for name in ("step", *needed)):  # one counter: the moments begin together
            state["step"] = counter()
            state |= {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in needed}
            state.pop("updates", None)
        for name in ("exp_avg", "exp_avg_sq"):
            if (moment := state.get(name)) is not None and moment.dtype != p.dtype:  # the model was cast
                state[name] = moment.to(p.dtype)

    @staticmethod
    def _is_shared(group: Group, plan: Plan) -> bool:
        return plan.sharded or (group["shard"] == "auto" and world_size() > 1)

    def _divide(self, plans: list[Plan]) -> None:
        """Where there are several ranks: give each block an owner, and keep of the state what this rank owns."""
        if self._divided not in (0, world_size()):
            raise RuntimeError(
                f"the state is divided among {self._divided} ranks but there are {world_size()} now: load a state_dict"
            )
        groups = [
            (i, g) for i, (g, plan) in enumerate(zip(self.param_groups, plans, strict=True)) if self._is_shared(g, plan)
        ]
        if not groups:
            return
        new = [(i, g, p) for i, g in groups for p in g["params"] if p not in self._shares and self.preconditions(p, g)]
        if not new:
            return
        self._assign([entry for entry in new if entry[2] not in self._owners], plans)
        rank = dist.get_rank()
        for _, group, p in new:
            mine = {s: [j for j, r in enumerate(ranks) if r == rank] for s, ranks in self._owners[p].items()}
            self._shares[p] = self.layout(p, group).only(mine)
            if is_sharded(p):
                self._routes[p] = Route.of(p, self.layout(p, group), self._owners[p], rank)
        if not self._divided:
            for _, group, p in new:
                self._keep_own(p, self.layout(p, group))
            self._stacks.clear()
            self._divided = world_size()
            self._meeting = self._meeting or Meeting(self.patience)

    def _assign(self, new: list[tuple[int, Group, Tensor]], plans: list[Plan]) -> None:
        """Owners of these parameters' blocks, beside what the ranks own already."""
        if not new:
            return
        agree([p for *_, p in new])
        loads = Loads(world_size())
        blocks: list[tuple[Tensor, Shape, Shape, tuple[int, int]]] = []
        for index, (group, plan) in enumerate(zip(self.param_groups, plans, strict=True)):
            for (p, shape), turns in plan.turns.items():
                sizes = self.layout(p, group).sizes(shape)
                for number, phase in enumerate(turns):
                    if p in self._owners:
                        loads.add(shape, sizes, (index, phase), self._owners[p][shape][number])
                    elif self._is_shared(group, plan):
                        blocks.append((p, shape, sizes, (index, phase)))
        for (p, shape, *_), owner in zip(blocks, loads.assign([block[1:] for block in blocks]), strict=True):
            self._owners.setdefault(p, {}).setdefault(shape, []).append(owner)

    def _keep_own(self, p: Tensor, layout: Layout) -> None:
        """Of p's factors, which are those of all its blocks."""
        state = self.state.get(p, {})
        check_factors(state, p, layout)
        for name in outdated(state, layout):
            del state[name]
        for name in [name for name in state if is_factor(name)]:
            value = state.pop(name)
            if mine := self._shares[p].numbers.get(layout.parts[int(name.rpartition(".")[2])]):
                state[name] = value[mine]

    def _plan(self, index: int, group: Group) -> Plan:
        """Of all that the group may ever precondition: a parameter that is frozen for a while, a run that was cut off,
        or the number of ranks changes nobody's turn."""
        key = (
            *(group[name] for name in ("merge", "block_size", "axes", "batch_axes", "precondition_1d", "interval")),
            *(group[name] for name in ("root_dtype", "factor_dtype", "pack_roots", "damping")),
            *(group["eps"] < SMALLEST_EPS_FLOAT32, group["precondition"] is False),
            *((id(p), p.shape, p.dtype) for p in group["params"]),
        )
        if index not in self._plans or self._plans[index].key != key:
            layouts = {p: self.layout(p, group) for p in group["params"] if self.preconditions(p, group)}
            storages = {p: Storage.of(factor_dtype(p, group), group) for p in layouts}
            blocks = [(p, s) for p, layout in layouts.items() for s, cuts in layout.blocks.items() for _ in cuts]
            costs = [float(sum(d**3 for d in layouts[p].sizes(shape))) for p, shape in blocks]
            turns: dict[tuple[Tensor, Shape], list[int]] = defaultdict(list)
            for block, phase in zip(blocks, phases(costs, group["interval"]), strict=True):
                turns[block].append(phase)
            waits = dict.fromkeys(layouts, 0)
            if EIGH_FLOPS * sum(costs) > AT_ONCE:
                for (p, _), steps in turns.items():
                    waits[p] = max(waits[p], *steps)
            scattered = [p for p, layout in layouts.items() if len(layout.parts) > 1]
            self._plans[index] = Plan(
                key, tuple(group["params"]), layouts, storages, turns, waits, scattered, any_sharded(group["params"])
            )
        return self._plans[index]

    def _stacks_of(self, index: int, group: Group, plan: Plan, params: list[Tensor]) -> list[Stack]:
        """The group's stacks; rebuilt from the state when a parameter is new or gone, or the state was replaced."""
        stacks = self.stacks(index)
        wanted = [p for p in params if self.share(p, group).blocks] if self._shares else params
        if not stacks and not wanted:
            return stacks
        intact = all(stack.plan is plan and stack.is_in(self.state) for stack in stacks)
        if not intact or not set().union(*(stack.numbers for stack in stacks)).issuperset(map(id, wanted)):
            known = {p for stack in stacks for p in stack.members} | set(wanted)
            shares = {p: self.share(p, group) for p in plan.layouts}
            members = [p for p in shares if p in known and "step" in self.state.get(p, {})]
            stacks = self._stacks[index] = build_stacks(members, shares, plan.storages, self.state)
            for stack in stacks:
                numbers = [(p, number) for p in stack.members for number in shares[p].numbers[stack.shape]]
                stack.phase = [plan.turns[p, stack.shape][number] for p, number in numbers]
                stack.interval, stack.plan = group["interval"], plan
        return stacks

    def _begin(self, index: int, plan: Plan, grads: dict[Tensor, Tensor], norms: dict[Tensor, Tensor]) -> Work:
        group = self.param_groups[index]
        for p in grads:
            self._init_state(p, group)
        finite = Finite(grads, group, norms)
        states = {p: self.state[p] for p in grads if p in plan.layouts}
        for name in ("gradients", "updates") if group["precondition"] == "gradient" else ("gradients",):
            for state in states.values():
                if name not in state:
                    state[name] = counter()
        steps, seen = (_counts(states, name) for name in ("step", "gradients"))
        stacks = self._stacks_of(index, group, plan, list(steps))
        if steps:
            self._keep_roots_of(root_options(group), group, stacks)
        return Work(group, plan, self._is_shared(group, plan), grads, steps, seen, stacks, finite)

    @staticmethod
    def _keep_roots_of(options: tuple[Any, ...], group: Group, stacks: list[Stack]) -> None:
        """Forget those of other options; a group says which its roots are of."""
        if tuple(group["roots_of"]) != options:
            for stack in stacks:
                stack.forget_roots()
        group["roots_of"] = options

    def _settle(self, work: Work) -> None:
        """Drop parameters whose gradients are not finite. This waits for the device, as does a refresh."""
        group = work.group
        for p in work.finite.others():
            del work.grads[p]
            if "skipped" not in self.state[p]:
                self.state[p]["skipped"] = counter()
                work.broken.append(p)
            self.state[p]["skipped"] += 1
        if seen := [p for p in work.seen if p in work.grads]:
            torch._foreach_add_([self.state[p]["gradients"] for p in seen], 1)
        start, waits = group["start_step"], work.plan.waits
        ready = [p for p in seen if work.seen[p] >= start + waits[p]]
        whole = work.plan.layouts
        work.layouts = whole if len(ready) == len(whole) else {p: whole[p] for p in ready}
        work.shares = {p: self.share(p, group) for p in work.layouts} if self._shares else work.layouts
        if len(work.layouts) < len(work.grads):
            work.rest = [p for p in work.grads if p not in work.layouts]
        for p in work.grads if group["precondition"] != "gradient" else work.rest:
            if self.state[p].get("updates", 0) > 0:  # which are not gradients, and 100 times as long
                local(self.state[p]["exp_avg"]).zero_()
                self.state[p]["updates"].zero_()
        work.settled = True

    def _deal(self, works: list[Work]) -> dict[Tensor, Tensor]:
        """Rows of gradients and momenta, from the ranks that hold them to those that own their blocks.

        Returns:
            how long the rows of the graft's steps are that this rank holds.
        """
        lengths: dict[Tensor, Tensor] = {}
        letters: list[tuple[dict[Tensor, Rows], Tensor, Tensor]] = []
        for work in works:
            self._settle(work)
            for chunk in chunks([p for p in work.layouts if p in self._routes]):
                lengths |= self._moments(chunk, work)
            momentum = work.group["precondition"] == "momentum"
            for p in (p for p in work.steps if p in work.grads and p in self._routes):
                letters.append((work.gradients, p, work.grads[p]))
                if p in work.layouts and momentum:
                    letters.append((work.momenta, p, local(self.state[p]["exp_avg"])))
        exchanges: dict[torch.device, Exchange] = {}
        outgoing, incoming = [], []
        for into, p, tensor in letters:
            route = self._routes[p]
            exchange = exchanges.setdefault(p.device, self._exchange("inputs", p.device))
            merged = tensor.reshape(route.layout.shape)
            outgoing += [
                (exchange, exchange.to(x.owner, x.shape, tensor.dtype), merged[x.cut])
                for x in route.held
                if x.same_copy
            ]
            arriving = [(x, exchange.of(x.holder, x.shape, tensor.dtype)) for x in route.owned if x.same_copy]
            incoming.append((into, p, exchange, arriving))
        for exchange in exchanges.values():
            exchange.open()
        copy([e.mine(parcel) for e, parcel, _ in outgoing], [rows for *_, rows in outgoing])
        with self.phase("communication"):
            for exchange in exchanges.values():
                exchange.send()
            for exchange in exchanges.values():
                exchange.wait()
        for into, p, exchange, arriving in incoming:
            into[p] = [(x, exchange.read(parcel)) for x, parcel in arriving]
        for exchange in exchanges.values():
            exchange.clear()
        return lengths

    def _exchange(self, use: str, device: torch.device) -> Exchange:
        return self._exchanges.setdefault((use, device), Exchange(device))

    def _prepare(self, work: Work) -> None:
        """Statistics and roots."""
        with full_precision(next((p.device.type for p in work.steps), "cpu")):
            if work.steps:
                self._statistics(work)
            if not work.settled:  # after the statistics, which were queued after the question
                self._settle(work)
            if work.seen and max(work.seen.values()) >= work.group["start_step"]:
                self._refresh(work)

    def _statistics(self, work: Work) -> None:
        """Of all blocks that have a gradient."""
        group, due = work.group, [p for p in work.seen if p in work.grads]
        beta, weight = (group["betas"][1], 1 - group["betas"][1]) if group["statistics"] == "ema" else (1.0, 1.0)
        with self.phase("statistics"):
            for stack in work.stacks:
                everyone = len(due) == len(work.plan.layouts)
                for members, rows in stack.chunks(
                    stack.members if everyone else [p for p in stack.members if p in work.grads]
                ):
                    X, _ = self._rooms.blocks(stack, rows)
                    self._fill(X, stack, members, work, [work.grads[p] for p in members], work.gradients)
                    numbers = [math.sqrt(p.numel()) for p in members]
                    size = (work.finite.norms(members) / _constants(numbers, X.device)).to(X.dtype)
                    if len(X) > len(members):
                        counts = [stack.rows[p].stop - stack.rows[p].start for p in members]
                        size = torch.cat([s.expand(n) for s, n in zip(size, counts, strict=True)])
                    S = [S_i[rows] for S_i in stack.S]
                    scale, total = stack.scale[rows], stack.total[rows]
                    accumulate(S, stack.axes, scale, total, X, size, beta=beta, weight=weight)

    def _refresh(self, work: Work) -> None:
        """Roots of the blocks whose turn it is, or whose statistics have outgrown the roots."""
        group, due = work.group, []
        ages = {n - group["start_step"] for n in work.seen.values()}
        for stack, grown in zip(work.stacks, outgrown(work.stacks), strict=True):
            mine: list[int] = []
            if work.complete and len(ages) == 1 and len(stack.rooted) == len(stack.members):  # as in most steps
                (age,) = ages
                if age > 0:
                    mine = [row for row, yes in enumerate(grown) if yes or stack.is_due(row, age)]
                    if mine:
                        due.append((stack, mine))
                    continue
            for p, rows in stack.rows.items():
                age = work.seen.get(p, 0) - group["start_step"]
                if age < 0 or p not in work.grads:
                    continue
                # First roots that are many come at their turns. A state that has none of turns that are over, as one
                # of another optimizer, gets all of them at once.
                wait = work.plan.waits[p]
                first = age == wait == 0 or (age >= wait and p not in stack.rooted)
                mine += [row for row in range(rows.start, rows.stop) if first or grown[row] or stack.is_due(row, age)]
                if age >= wait or age <= min(stack.phase[rows]):
                    stack.rooted.add(p)
            if mine:
                due.append((stack, mine))
        if due:
            with self.phase("roots"):
                refresh(due, group)

    def _apply(self, work: Work) -> None:
        """Momentum, U, graft, decay, weights, a chunk at a time."""
        scattered = [p for p in work.plan.scattered if p in work.layouts]
        lengths = self._moments(scattered, work) if scattered else {}
        pieces: dict[Tensor, dict[Shape, Tensor]] = {p: {} for p in scattered}
        for stack in work.stacks:
            for members, rows in stack.chunks(work.members(stack)):
                if stack.whole and work.group["precondition"] == "momentum":
                    own = self._lengths(members, work)
                    with self.phase("apply"):
                        U = self._precondition(stack, members, rows, work)
                    self._finish_whole(members, U, own, work)
                    continue
                whole = [p for p in members if p not in pieces]
                lengths |= self._moments(whole, work) if whole else {}
                with self.phase("apply"):
                    U = self._precondition(stack, members, rows, work)
                at = {p: U[stack.rows[p].start - rows.start : stack.rows[p].stop - rows.start] for p in members}
                self._finish({p: {stack.shape: at[p]} for p in whole}, lengths, work)
                for p in members:
                    if p in pieces:
                        pieces[p][stack.shape] = at[p].clone()
        self._finish(pieces, lengths, work)

    def _send(self, works: list[Work], lengths: dict[Tensor, Tensor]) -> Updates:
        """U of the blocks that this rank owns, on its way to all ranks, or to those that hold its rows."""
        divided = {p for work in works for p in work.layouts if p in self._routes}
        updates = Updates(places={}, lengths=lengths, counted=set(divided))
        for work in works:
            for p, layout in work.layouts.items():
                if p in divided:
                    dtype, route = work.group["gather_dtype"] or factor_dtype(p, work.group), self._routes[p]
                    exchange = updates.exchanges.setdefault(p.device, self._exchange("updates", p.device))
                    updates.outgoing[p] = [exchange.to(x.holder, x.shape, dtype) for x in route.owned]
                    updates.incoming[p] = [exchange.of(x.owner, x.shape, dtype) for x in route.held]
                    continue
                post = updates.posts.setdefault(p.device, self._posts.setdefault(p.device, Post(p.device)))
                dtype = work.group["gather_dtype"] or factor_dtype(p, work.group)
                for shape in layout.parts:
                    updates.places[p, shape] = [post.room(owner, shape, dtype) for owner in self._owners[p][shape]]
        for carrier in updates.carriers:
            carrier.open()
        for work in works:
            for stack in work.stacks:
                for members, rows in stack.chunks(work.members(stack)):
                    updates.lengths |= self._moments([p for p in members if p not in updates.counted], work)
                    updates.counted.update(members)
                    with self.phase("apply"), full_precision(stack.scale.device.type):
                        U = self._precondition(stack, members, rows, work)
                    self._address(U, stack, members, work, updates)
        for carrier in updates.carriers:
            carrier.send()
        return updates

    def _address(self, U: Tensor, stack: Stack, members: list[Tensor], work: Work, updates: Updates) -> None:
        """U of these parameters' blocks ``[k, d_1, ..., d_k]`` into what is sent."""
        targets, sources, blocks = [], [], iter(U.unbind())
        for p in members:
            mine = [next(blocks) for _ in work.shares[p].numbers[stack.shape]]
            if p in updates.outgoing:
                exchange = updates.exchanges[p.device]
                parcels = zip(self._routes[p].owned, updates.outgoing[p], strict=True)
                here = [(x, exchange.mine(parcel)) for x, parcel in parcels if x.block == stack.shape]
                targets += [room for _, room in here]
                sources += [mine[x.number][x.rows] for x, _ in here]
            else:
                post, places = updates.posts[p.device], updates.places[p, stack.shape]
                targets += [post.mine(places[number]) for number in work.shares[p].numbers[stack.shape]]
                sources += mine
        torch._foreach_copy_(targets, sources)

    def _receive(self, works: list[Work], updates: Updates) -> None:
        """The other ranks' U, and what follows: the same on all ranks. What needs no U is done while it travels."""
        for work in works:
            for chunk in chunks([p for p in work.layouts if p not in updates.counted]):
                updates.lengths |= self._moments(chunk, work)
        with self.phase("communication"):
            lengths = self._lengths_of_rows(updates)
            for carrier in updates.carriers:
                carrier.wait()
        for work in works:
            for chunk in chunks([p for p in work.layouts if p not in updates.outgoing]):
                pieces = {p: updates.of(p, work.layouts[p], factor_dtype(p, work.group)) for p in chunk}
                self._finish(pieces, {p: updates.lengths[p] for p in chunk if p in updates.lengths}, work)
            for chunk in chunks([p for p in work.layouts if p in updates.outgoing]):
                pieces = {p: updates.rows(p, self._routes[p], factor_dtype(p, work.group)) for p in chunk}
                wanted = {p: lengths[p][0] for p in chunk if p in lengths}
                self._finish(pieces, wanted, work, [lengths[p][1] for p in wanted])
        for carrier in updates.carriers:
            carrier.clear()

    def _lengths_of_rows(self, updates: Updates) -> dict[Tensor, Tensor]:
        """Of each parameter that is divided by rows the length ``[2]`` of the graft's step and of U, over all ranks."""
        squares = {}
        for p in (p for p in updates.outgoing if p in updates.lengths):
            D = updates.lengths[p].square() * is_counted(p)
            parcels = zip(updates.outgoing[p], self._routes[p].owned, strict=True)
            mine = [updates.exchanges[p.device].mine(parcel) for parcel, x in parcels if x.same_copy]
            squares[p] = torch.stack([D, frobenius(mine).square().sum() if mine else torch.zeros_like(D)])
        return {p: total.sqrt() for p, total in summed(squares).items()}

    def _moments(self, params: list[Tensor], work: Work) -> dict[Tensor, Tensor]:
        """The same as :meth:`_lengths`, by parameter."""
        lengths = self._lengths(params, work) if params else None
        return {} if lengths is None else dict(zip(params, lengths.unbind(), strict=True))

    def _lengths(self, params: list[Tensor], work: Work) -> Tensor | None:
        """Count the step, update the moments, and say how long the graft's step is ``[n]``; None without a graft."""
        if len(types := {p.dtype for p in params}) != 1:  # torch's kernel takes one type at a time
            found: dict[Tensor, Tensor] = {}
            for t in types:
                found |= self._moments([p for p in params if p.dtype == t], work)
            return torch.stack([found[p] for p in params]) if found else None
        group, states = work.group, [self.state[p] for p in params]
        (beta1, beta2), graft = group["betas"], group["graft"]
        grads, steps = [work.grads[p] for p in params], [s["step"] for s in states]
        first = group["precondition"] == "momentum"
        sharded = work.plan.sharded
        moments = locals_of([s["exp_avg_sq"] for s in states], sharded) if needs_second_moment(graft) else []
        exp_avg = locals_of([s["exp_avg"] for s in states], sharded)
        here = locals_of(params, sharded)
        if graft == "adam" and first and fusible(here, grads, exp_avg, moments):
            return adam_length(
                self._rooms.like("graft", here), grads, exp_avg, moments, steps, beta1, beta2, group["graft_eps"]
            )
        torch._foreach_add_(steps, 1)
        if moments:
            update_second_moment(moments, grads, beta2)
        if first:
            torch._foreach_lerp_(exp_avg, grads, 1 - beta1)
        if graft == "none":
            return None
        T = [work.steps[p] for p in params]
        inputs = list(torch._foreach_div(exp_avg, [1 - beta1**t for t in T])) if first else grads
        return frobenius(direction(graft, inputs, moments, T, beta2, group["graft_eps"]))

    def _fill(
        self,
        X: Tensor,
        stack: Stack,
        members: list[Tensor],
        work: Work,
        tensors: list[Tensor],
        rows: dict[Tensor, Rows],
    ) -> None:
        """What these parameters have, or what arrived of its rows, to its place in X ``[k, d_1, ..., d_k]``."""
        if stack.whole and not rows:
            fill_whole(X, tensors)
        else:
            shares = {p: self.share(p, work.group) for p in members}
            fill(X, members, shares, [rows.get(p, t) for p, t in zip(members, tensors, strict=True)])

    def _precondition(self, stack: Stack, members: list[Tensor], rows: slice, work: Work) -> Tensor:
        """U of these parameters' blocks, ``[k, d_1, ..., d_k]``, of the bias-corrected momentum or of the gradient."""
        group = work.group
        X, spare = self._rooms.blocks(stack, rows)
        if group["precondition"] == "momentum":
            self._fill(X, stack, members, work, [self.state[p]["exp_avg"] for p in members], work.momenta)
            steps = [work.steps[p] for p in members]
            weights = [1 - group["betas"][0] ** t for t in steps]
        else:
            self._fill(X, stack, members, work, [work.grads[p] for p in members], work.gradients)
            weights = [1.0]
        factor = stack.input_scale(group)[rows].reciprocal()
        if len(set(weights)) == 1:
            factor = factor / weights[0]
        else:
            counts = [stack.rows[p].stop - stack.rows[p].start for p in members]
            repeated = [w for w, n in zip(weights, counts, strict=True) for _ in range(n)]
            factor = factor / _constants(repeated, factor.device).to(factor.dtype)
        X.mul_(per_block(factor, X))
        return precondition(X, spare, stack, rows, group)

    def _finish_whole(self, members: list[Tensor], U: Tensor, lengths: Tensor | None, work: Work) -> None:
        """As :meth:`_finish`, of parameters that are one block each: in few calls, however many they are."""
        group = work.group
        if lengths is not None:
            have = frobenius(U.unbind())
            U.mul_(per_block(torch.where(have > 0, lengths / have, 0).to(U.dtype), U))
        if group["weight_decay"]:
            torch._foreach_mul_(members, 1 - float(group["lr"]) * group["weight_decay"])
        updates = [u if u.shape == p.shape else u.view(p.shape) for p, u in zip(members, U.unbind(), strict=True)]
        torch._foreach_add_(members, updates, alpha=-float(group["lr"]))

    def _finish(
        self,
        pieces: dict[Tensor, dict[Shape, Tensor]],
        lengths: dict[Tensor, Tensor],
        work: Work,
        known: list[Tensor] | None = None,
    ) -> None:
        """Graft, momentum where it comes after, decay, weights. ``pieces[p]`` are p's U by block shape, or its rows.

        Args:
            known: the norms of U where a piece is of rows.
        """
        if not pieces:
            return
        group, params = work.group, {p: local(p) for p in pieces}
        layouts = {p: self._routes[p].layout if p in self._routes else work.layouts[p] for p in pieces}
        beta1, lr = group["betas"][0], float(group["lr"])
        if lengths:
            transfer_length([list(U.values()) for U in pieces.values()], [lengths[p] for p in pieces], known)
        if group["weight_decay"]:
            torch._foreach_mul_(list(params.values()), 1 - lr * group["weight_decay"])
        if group["precondition"] == "momentum":
            targets, sources = placed(pieces, layouts, params)
            torch._foreach_add_(targets, sources, alpha=-lr)
            return
        exp_avg = {p: local(self.state[p]["exp_avg"]) for p in params}
        counters = [self.state[p]["updates"] for p in params]
        torch._foreach_add_(counters, 1)
        ages = [int(n.item()) for n in counters]
        # Until the first update this buffer was the diagonal method's momentum, of raw gradients: begin anew.
        if fresh := [m for m, age in zip(exp_avg.values(), ages, strict=True) if age == 1]:
            torch._foreach_zero_(fresh)
        targets, sources = placed(pieces, layouts, exp_avg)
        torch._foreach_lerp_(targets, [u.to(m.dtype) for u, m in zip(sources, targets, strict=True)], 1 - beta1)
        updates = torch._foreach_div(list(exp_avg.values()), [1 - beta1**age for age in ages])
        torch._foreach_add_(list(params.values()), updates, alpha=-lr)


def is_whole(name: str, value: object, p: Tensor) -> bool:
    """Whether this entry of a state has a number for each of p's, and all of them are here."""
    return isinstance(value, Tensor) and not is_sharded(value) and not is_factor(name) and value.shape == p.shape


def _counts(states: dict[Tensor, dict[str, Tensor]], name: str) -> dict[Tensor, int]:
    """Return what this counter of each state will be after the step. All are read at once: there may be thousands."""
    values = torch.stack([state[name] for state in states.values()]).tolist() if states else []
    return {p: int(value) + 1 for p, value in zip(states, values, strict=True)}


def _constants(values: list[float], device: torch.device) -> Tensor:
    """``[n]`` in float64; of equal ones a number on the CPU, which nothing has to be sent for."""
    if len(set(values)) == 1:
        return torch.tensor(values[0], dtype=torch.float64, device="cpu")
    return sent(torch.tensor(values, dtype=torch.float64, device="cpu"), device)


def counter(value: Tensor | float = 0) -> Tensor:
    """On the CPU, as in torch: reading it costs no synchronization. Whatever the defaults of the session are."""
    return torch.as_tensor(value).to("cpu", torch.float32)
