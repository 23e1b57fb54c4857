"""The optimizer's interface to torch: param groups, steps, state dicts, pickles.

A step of one rank is in :mod:`caspr_cli.optim.step`, what ranks share in :mod:`caspr_cli.optim.divide`, the state in
:mod:`caspr_cli.optim.state`.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from caspr_cli.optim import state as states
from caspr_cli.optim import step as steps
from caspr_cli.optim.blocks import Layout
from caspr_cli.optim.closure import WithClosure
from caspr_cli.optim.device import Question, is_captured
from caspr_cli.optim.divide import Division
from caspr_cli.optim.exchange import Exchange
from caspr_cli.optim.family import OF_OPTIMIZER, SMALLEST_EPS_FLOAT32, CASPROptions, options_of, without_removed
from caspr_cli.optim.finite import Finite, norms_of_rows
from caspr_cli.optim.fsdp import check_placements, is_sharded, local
from caspr_cli.optim.masked import is_masked
from caspr_cli.optim.options import OPTIONS, Group, check, checked_again, is_float64_for_eps, root_options, validate
from caspr_cli.optim.parts import check_torch
from caspr_cli.optim.plan import Plan, is_preconditioned, layout_of, plan_key, refuse_other_blocks
from caspr_cli.optim.precision import full_precision
from caspr_cli.optim.refresh import keep_roots_of
from caspr_cli.optim.scatter import Workspace
from caspr_cli.optim.shard import Factors
from caspr_cli.optim.stacks import Stack, build_stacks, is_factor
from caspr_cli.optim.state import params_of

MOST_NAMED = 8  # parameters in a warning


class KroneckerOptimizer(WithClosure):
    """The engine under :class:`CASPR`, :class:`Shampoo` and :class:`FullAdagrad`; see there for the options."""

    #: A context entered around each part of a step ("statistics", "roots", "apply", "communication"), for timing from
    #: outside.
    phase: Callable[[str], AbstractContextManager[None]] = staticmethod(lambda name: nullcontext())

    #: Options that make a class what it is: no param group and no loaded state changes them.
    fixed: Mapping[str, Any] = types.MappingProxyType({})

    #: Seconds that ``state_dict()`` waits for other ranks.
    timeout: float = 300

    #: Whether ``state_dict()`` has only this rank's part of statistics and roots, for torch.distributed.checkpoint.
    sharded_state: bool = False

    _has_warned_of_eps = False

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        validate(defaults)
        self._reset(Division.among(*(defaults.pop(name, None) for name in OF_OPTIMIZER)))
        super().__init__(params, defaults)

    def _reset(self, division: Division) -> None:
        """Reset what is derived from the state and never saved."""
        self._stacks: dict[int, list[Stack]] = {}  # group index -> stacks
        self._plans: dict[int, Plan] = {}  # group index -> plan
        self._options: dict[int, list[Any]] = {}  # group index -> the options that were last checked
        self._workspace = Workspace()
        self._given: dict[tuple[Tensor, str], int] = {}  # counters of a GPU, as the host knows them
        self._asked: dict[int, tuple[list[Tensor], Question]] = {}  # group index -> whose gradients were not finite
        self._told: set[Tensor] = set()  # parameters of which was warned
        self._division, self._exchange = division, Exchange(division)
        self._gathered: tuple[int, Factors] | None = None  # see consolidate_state_dict()

    # ---- param groups

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            without_removed(group)
            check(group, self.fixed, type(self).__name__)
            for p in group["params"]:
                if not p.is_floating_point():
                    raise ValueError(f"{type(self).__name__} takes real floating-point parameters but got {p.dtype}")
                check_placements(p)
        except Exception:
            self.param_groups.pop()
            raise
        group.setdefault("roots_of", root_options(group))
        self._warn_of_eps(group, stacklevel=6)  # who called the class

    def _warn_of_eps(self, group: Group, stacklevel: int) -> None:
        """Warn once where eps is so small that it changes the type of statistics: it may be meant for AdamW's."""
        if self._has_warned_of_eps or not group["eps"] < SMALLEST_EPS_FLOAT32:
            return
        if any(is_preconditioned(p, group) and is_float64_for_eps(p, group) for p in group["params"]):
            self._has_warned_of_eps = True
            warnings.warn(
                f"eps={group['eps']:g} is damping (relative to the largest eigenvalue of the statistics), not the eps "
                f"of AdamW, which is graft_eps. Below {SMALLEST_EPS_FLOAT32:g} statistics and roots are float64, which "
                "takes more memory and time. If this is meant, factor_dtype=torch.float64 says so without a warning",
                stacklevel=stacklevel,
            )

    @staticmethod
    def preconditions(p: Tensor, group: Group) -> bool:
        """Whether p is preconditioned from ``start_step`` on, or left to the graft method for good."""
        return is_preconditioned(p, group)

    def layout(self, p: Tensor, group: Group) -> Layout:
        """Return how p is merged and cut."""
        return layout_of(p, group)

    def share(self, p: Tensor, group: Group) -> Layout:
        """Return the blocks of p that this rank owns: all of them but under data parallelism."""
        return self._division.share(p, group)

    def stacks(self, index: int) -> list[Stack]:
        """Return the stacks of a param group, of the blocks that this rank owns; none before its first gradient."""
        return self._stacks.get(index, [])

    @property
    def ranks(self) -> int:
        """How many ranks share the work: each has statistics and roots of its own blocks alone."""
        return self._division.ranks or 1

    @property
    def repeats(self) -> bool:
        """Whether a rank with a lower number does the same work, so that what is counted over ranks counts twice."""
        return self._division.repeats

    @property
    def bytes_received(self) -> int:
        """Bytes that this rank received in the last step, its own share included."""
        return self._exchange.bytes_received

    # ---- a step

    def _step(self) -> None:
        if any((G := p.grad) is not None and G.is_sparse for p, _ in params_of(self.param_groups)):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        plans = self._plan()
        self._gathered, self._exchange.bytes_received = None, 0
        if self._division.divide(self.param_groups, plans, self.state):
            self._stacks.clear()
        given = self._gradients(plans)
        norms = norms_of_rows({p: G for grads in given.values() for p, G in grads.items() if is_sharded(p)})
        inputs = [self._begin(index, plans[index], grads, norms) for index, grads in given.items()]
        lengths: dict[Tensor, Tensor] = {}
        if norms:
            active = [steps.drop_broken(x) for x in inputs]
            lengths = self._exchange.gradients(active)
        else:
            for x in inputs:
                steps.add_statistics(x, {})
            active = [steps.drop_broken(x) for x in inputs]  # now: statistics were queued after the question
        for x in active:
            with full_precision(x.device_type):
                steps.refresh_roots(x)
        shared = [x for x in active if x.layouts and x.shared]

        def beside() -> None:
            for x in active:
                steps.update_rest(x)
                if not x.shared:
                    steps.update_weights(x)

        if shared:
            self._exchange.updates(shared, lengths, beside)
        else:
            beside()
        if broken := {p for index, x in zip(given, active, strict=True) for p in self._broken(index, x)}:
            self._warn_of_gradients(broken)

    def _plan(self) -> list[Plan]:
        """Return the plan of each group; a group that has changed gets another."""
        for index in [i for i in self._plans if i >= len(self.param_groups)]:
            del self._plans[index]
            self._stacks.pop(index, None)
        for index, group in enumerate(self.param_groups):
            self._options[index] = checked_again(group, self._options.get(index), self.fixed, type(self).__name__)
            key = plan_key(group)
            if index not in self._plans or self._plans[index].key != key:
                plan = Plan.of(group, key)
                refuse_other_blocks(self._plans.get(index), plan, self.state)
                self._plans[index] = plan
        return [self._plans[index] for index in range(len(self.param_groups))]

    def _gradients(self, plans: list[Plan]) -> dict[int, dict[Tensor, Tensor]]:
        """Return the part of each gradient that is on this rank, by the index of its group, for groups that have one.

        A gradient to maximize by is negated.
        """
        given = {}
        for index, (group, plan) in enumerate(zip(self.param_groups, plans, strict=True)):
            grads = {p: G for p in group["params"] if (G := p.grad) is not None}
            if plan.sharded:
                grads = {p: local(G) for p, G in grads.items()}
            if grads:
                given[index] = {p: -G for p, G in grads.items()} if group["maximize"] else grads
        return given

    def _begin(self, index: int, plan: Plan, grads: dict[Tensor, Tensor], norms: dict[Tensor, Tensor]) -> steps.Inputs:
        """Return what the step of a group begins with, and ask the device which gradients are finite."""
        group = self.param_groups[index]
        for p in grads:
            states.begin(self.state[p], p, group)
        masked = is_masked(list(grads))
        finite = Finite(grads, group, norms, self._workspace, ask=not masked)
        known = {p: self.state[p] for p in grads if p in plan.layouts}
        states.begin_counters(list(known.values()), group)
        states.count_there([self.state[p] for p in grads], next(iter(grads)).device, group, masked=masked)
        count, seen = (states.next_counts(known, name, self._given) for name in ("step", "gradients"))
        stacks = self._stacks_of(index, group, plan, list(count))
        if count:
            keep_roots_of(root_options(group), group, stacks, self.state)
        shares = {p: self.share(p, group) for p in plan.layouts} if self._division.shares else plan.layouts
        shared = self._division.is_shared(group, plan)
        return steps.Inputs(
            group, plan, self.state, stacks, shares, shared, grads, count, seen, finite, masked, self._workspace,
            self.phase,
        )  # fmt: skip

    def _stacks_of(self, index: int, group: Group, plan: Plan, params: list[Tensor]) -> list[Stack]:
        """Return the group's stacks, rebuilt if a parameter is new or gone, or the state was replaced."""
        stacks = self.stacks(index)
        wanted = [p for p in params if self.share(p, group).blocks] if self._division.shares else params
        if not stacks and not wanted:
            return stacks
        intact = all(stack.plan is plan and stack.is_in(self.state) for stack in stacks)
        if not intact or not set().union(*(stack.ids for stack in stacks)).issuperset(map(id, wanted)):
            known = {p for stack in stacks for p in stack.members} | set(wanted)
            shares = {p: self.share(p, group) for p in plan.layouts}
            members = [p for p in shares if p in known and "step" in self.state.get(p, {})]
            stacks = self._stacks[index] = build_stacks(members, shares, plan.storages, self.state)
            for stack in stacks:
                indices = [(p, i) for p in stack.members for i in shares[p].indices[stack.shape]]
                stack.refresh_offset = [plan.refresh_offsets[p, stack.shape][i] for p, i in indices]
                stack.interval, stack.plan = group["interval"], plan
        return stacks

    def _broken(self, index: int, x: steps.Active) -> list[Tensor]:
        """Return the parameters of a group to warn of; on a GPU those of the step before, so as not to wait for it."""
        if x.mask is None or is_captured(x.mask.finite.device):  # with a mask nothing is known here
            return x.broken
        params, question = self._asked.get(index, ([], None))
        self._asked[index] = list(x.grads), Question(~x.mask.finite)
        answers = zip(params, question.answer() if question else [], strict=True)
        broken = [p for p, yes in answers if yes and p not in self._told]
        self._told.update(broken)
        return broken

    def _warn_of_gradients(self, broken: set[Tensor]) -> None:
        """Warn that the gradients of these parameters were not finite."""
        found = [
            f"parameter {i} of shape {tuple(p.shape)}"
            for i, (p, _) in enumerate(params_of(self.param_groups))
            if p in broken
        ]
        more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        warnings.warn(
            f"a gradient is not finite: {', '.join(found[:MOST_NAMED])}{more} (numbers as in state_dict()). What has "
            'one is left out of the step. This is said once of each; state["skipped"] counts them',
            stacklevel=6,  # who called step(), which torch wraps twice
        )

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """As in torch, and whole: where ranks share the work it holds the statistics and roots of all of them.

        Then it is a collective operation, to be called on every rank, unless :meth:`consolidate_state_dict` was called
        since the last step. They are in the memory of the CPU. What it returns may be loaded by any number of ranks.

        With ``sharded_state`` it holds views of what this rank owns, and nobody else is asked. What
        torch.distributed.checkpoint makes of all ranks' may be loaded by any number of ranks, with or without it.

        Raises:
            RuntimeError: not all ranks have called it within ``timeout``, or the state was gathered on another rank;
                or, with ``sharded_state``, torch is older than 2.14.
        """
        if not self._division.ranks:
            return super().state_dict()
        if self.sharded_state:
            check_torch()
            to, factors = None, states.own_parts(self.state, self.param_groups, self._division.shares)
        else:
            to, factors = self._gathered or (None, self._gather(None))
        if to not in (None, dist.get_rank()):
            raise RuntimeError(f"consolidate_state_dict() has gathered the state on rank {to}: call state_dict() there")

        def complete(_: Optimizer, content: dict[str, Any]) -> None:
            for i, named in factors.items():
                content["state"][i] = states.without_factors(content["state"].get(i, {})) | named

        handle = self.register_state_dict_post_hook(complete, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather what ranks have on one of them, in the memory of its CPU, where ``state_dict()`` returns it until the
        next step without asking the others: a collective operation.

        So that no other rank needs the memory. Lightning calls it, as it calls that of torch's ZeroRedundancyOptimizer.

        Raises:
            RuntimeError: not all ranks have called it within ``timeout``.
        """
        if self._division.ranks:
            self._gathered = to, self._gather(to)

    def _gather(self, to: int | None) -> Factors:
        """Return the factors of all ranks by parameter number, on one rank or on all."""
        for team in self._division.teams():
            team.barrier.wait(self.timeout)
        return states.whole_factors(self.state, self.param_groups, self._division, to)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but statistics and roots keep the type they were saved with.

        torch casts every floating tensor of the state to its parameter's type (pytorch issue 43706), which
        would round float32 factors of a bfloat16 parameter, and moves all of it to the parameter's device; of factors
        only those of the blocks that this rank owns go there. Options come from the state, but for those that are not
        its to say: see :func:`caspr_cli.optim.options.adopted`. Hooks of the user see what they see in torch: this
        acts on what the last of their pre-hooks gives, and before the first of their post-hooks. Moments of a
        parameter of ``fully_shard`` may be whole: each rank takes its rows.

        Raises:
            ValueError: an option is out of its range, or a parameter has another shape or other blocks than in the
                state. Nothing has changed then.
        """
        given, division = list[dict[str, Any]](), self._division

        def take(_: Optimizer, content: dict[str, Any]) -> dict[str, Any]:
            given.append(states.accepted(content, self.param_groups, dict(self.fixed), division.shares))
            return given[-1] | {"state": {i: states.without_factors(s) for i, s in given[-1]["state"].items()}}

        def restore(_: Optimizer) -> None:
            self._plans.clear()  # a state brings its own options; what is changed after it is refused
            plans = self._plan()
            states.restore(self.state, given[-1], self.param_groups)
            for p, group in states.params_of(self.param_groups):
                states.count_as_before(self.state.get(p, {}), group, False)
            if states.is_divided(given[-1], sharded=self.sharded_state):
                self._division.owners = division.owners
            if self._division.owners or any(is_factor(name) for entries in self.state.values() for name in entries):
                self._division.divide(self.param_groups, plans, self.state, check=False)  # before it takes room
            for p, entries in self.state.items():
                entries |= {name: value.to(p.device) for name, value in entries.items() if is_factor(name)}

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

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep."""
        own = {name: value for name, value in vars(self).items() if name in ("sharded_state", "timeout")}
        mine = self._division
        return super().__getstate__() | own | {"_division": (mine.owners, mine.ranks, mine.everyone, mine.group_size)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Two names are of older pickles. A state_dict, which is whole, has none: who shares the work stays as it is.
        own: Division = vars(self).get("_division") or Division()
        older = state.get("_owners", {}), state.get("_divided", 0), own.everyone, own.group_size
        owners, ranks, everyone, size = state.get("_division", older)
        super().__setstate__({k: v for k, v in state.items() if k not in ("_division", "_owners", "_divided")})
        self._reset(Division(owners, ranks, everyone, size, own.group))
        # A pickle of an older version has not all options, and torch has just added one that no group may have.
        defaults = without_removed(self.defaults)
        self.defaults = {o: defaults.get(o, options_of(CASPROptions)[o].default) for o in OPTIONS}
        self.param_groups = [without_removed(group) for group in self.param_groups]
        for group in self.param_groups:
            for name in OPTIONS:
                group.setdefault(name, self.defaults[name])
            group.setdefault("roots_of", root_options(group))
            for p in group["params"]:
                states.count_as_before(self.state.get(p, {}), group, p in owners)
