"""The work of a step divided among ranks: who owns which block."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from caspr_cli.optim.blocks import Layout, Shape
from caspr_cli.optim.dealing import Block, Loads, deal, group_size
from caspr_cli.optim.fsdp import TransferPlan, is_replica, is_sharded, row_group
from caspr_cli.optim.options import Group, travel_dtype
from caspr_cli.optim.parts import Part
from caspr_cli.optim.plan import Plan, is_preconditioned, layout_of
from caspr_cli.optim.shard import Team, agree, world_size
from caspr_cli.optim.solve import root_flops
from caspr_cli.optim.stacks import check_factors, is_factor, outdated, shape_of

Known = tuple[Tensor, Block, int]  # a parameter, one of its blocks, and the bytes of its update


def blocks_of(index: int, group: Group, plan: Plan) -> Iterator[Known]:
    """Yield the blocks of a param group, which has this index, in the order in which they travel."""
    for (p, shape), offsets in plan.refresh_offsets.items():
        size = math.prod(shape) * travel_dtype(p, group).itemsize
        for offset in offsets:
            yield p, (shape, plan.layouts[p].sizes(shape), (index, offset)), size


@dataclass
class Division:
    """Which rank owns which block. The first four fields are pickled."""

    owners: dict[Tensor, dict[Shape, list[int]]] = field(default_factory=dict)  # the rank, in its team, of each block
    ranks: int = 0  # ranks of the default group when the factors in the state were divided; 0: they are whole
    everyone: tuple[int, ...] | None = None  # ranks that have the same parameters; None: all
    group_size: int | None = None  # how many of them share the work; None: as many as is worth it
    group: Any = None  # the process group of ``everyone``
    shares: dict[Tensor, Layout] = field(default_factory=dict)  # of parameters that have owners, this rank's blocks
    transfers: dict[Tensor, TransferPlan] = field(default_factory=dict)  # of parameters that are divided by rows
    _teams: dict[Any, Team] = field(default_factory=dict)  # by process group; None: of what is not divided by rows
    _unchecked: list[Tensor] = field(default_factory=list)  # parameters that may differ between ranks

    @classmethod
    def among(cls, process_group: Any, size: int | None) -> Division:
        """Return that of the ranks of a process group, or of the last axis of a device mesh; None: of all."""
        if process_group is None:
            return cls(group_size=size)
        group = process_group.get_group(process_group.ndim - 1) if hasattr(process_group, "ndim") else process_group
        return cls(everyone=tuple(dist.get_process_group_ranks(group)), group_size=size, group=group)

    def share(self, p: Tensor, group: Group) -> Layout:
        """Return the blocks of p that this rank owns: all of them but under data parallelism."""
        return self.shares.get(p) or layout_of(p, group)

    def is_shared(self, group: Group, plan: Plan) -> bool:
        """Whether ranks share the work on a group."""
        if plan.sharded or group["shard"] == "none":
            return plan.sharded
        return self.group_size != 1 and (world_size() if self.everyone is None else len(self.everyone)) > 1

    @property
    def repeats(self) -> bool:
        """Whether an earlier group of ranks does the same work as that of this rank."""
        later = None in self._teams and self._teams[None].everyone[0] != self._replicas().everyone[0]
        return later or any(map(is_replica, self.transfers))

    def teams(self) -> dict[Team, list[Tensor]]:
        """Return the parameters that have owners, by who shares the work on them."""
        found: dict[Team, list[Tensor]] = defaultdict(list)
        for p in self.owners:
            found[self.team(p)].append(p)
        return found

    def team(self, p: Tensor) -> Team:
        """Return the ranks that share the work on p, which has owners."""
        group = row_group(p) if is_sharded(p) else None
        if group not in self._teams:
            if group is None:
                self._teams[group] = self._replicas().part(self.group_size or 1)
            else:
                self._teams[group] = Team(tuple(dist.get_process_group_ranks(group)), group)
        return self._teams[group]

    def _replicas(self) -> Team:
        """Return the ranks that have the same parameters, where rows are not divided."""
        if "replicas" not in self._teams:
            everyone = self.everyone or tuple(range(world_size()))
            self._teams["replicas"] = Team(everyone, dist.group.WORLD if self.everyone is None else self.group)
        return self._teams["replicas"]

    # ---- owners

    def divide(self, groups: list[Group], plans: list[Plan], state: Any, *, check: bool = True) -> bool:
        """Give each block an owner where there are several ranks, and return whether the state was cut to this rank's.

        Args:
            check: whether parameters are the same on all ranks, of those for which that has not been asked yet: a
                collective operation.

        Raises:
            ValueError: they are not, or ``group_size`` does not divide the number of ranks, or a group whose work ranks
                share has ``shard="none"`` now.
            RuntimeError: the state is divided among another number of ranks.
        """
        if self.ranks not in (0, world_size()):
            raise RuntimeError(
                f"the state is divided among {self.ranks} ranks but there are {world_size()} now: load a state_dict"
            )
        shared = []
        for group, plan in zip(groups, plans, strict=True):
            if self.is_shared(group, plan):
                shared.append(group)
            elif known := [tuple(p.shape) for p in plan.layouts if p in self.shares]:
                of = f"a parameter of shape {known[0]}"
                raise ValueError(f'shard="none" of {of}, whose work ranks share since its first step')
        new = [(g, p) for g in shared for p in g["params"] if p not in self.shares and is_preconditioned(p, g)]
        fresh = [(g, p) for g, p in new if p not in self.owners]
        self._unchecked += [p for _, p in fresh]
        if check and self._unchecked:
            self._agree()
        if not new:
            return False
        self._assign(groups, plans)
        for group, p in new:
            rank = self.team(p).rank
            mine = {s: [j for j, r in enumerate(ranks) if r == rank] for s, ranks in self.owners[p].items()}
            self.shares[p] = layout_of(p, group).only(mine)
            if is_sharded(p):
                self.transfers[p] = TransferPlan.of(p, layout_of(p, group), self.owners[p], rank)
        cut = fresh if self.ranks else new
        for group, p in cut:
            self._keep_own(state.get(p, {}), p, layout_of(p, group))
        self.ranks = world_size()
        return bool(cut)

    def _agree(self) -> None:
        """Refuse parameters that are not the same on all ranks that have them."""
        unchecked: dict[Team, list[Tensor]] = defaultdict(list)
        for p in self._unchecked:
            unchecked[self.team(p) if is_sharded(p) else self._replicas()].append(p)
        for team, params in unchecked.items():
            agree(params, team)
        self._unchecked = []

    def _assign(self, groups: list[Group], plans: list[Plan]) -> None:
        """Choose owners for the blocks that have none, beside what the ranks own already."""
        blocks = [
            each
            for index, (group, plan) in enumerate(zip(groups, plans, strict=True))
            for each in blocks_of(index, group, plan)
            if each[0] in self.owners or self.is_shared(group, plan)
        ]
        whole = [(block, size) for p, block, size in blocks if not is_sharded(p)]
        if whole and self.group_size is None:
            sizes = [size for _, size in whole]
            self.group_size = group_size([block for block, _ in whole], sizes, self._replicas().size)
        of_teams: dict[Team, list[Known]] = defaultdict(list)
        for each in blocks:
            of_teams[self.team(each[0])].append(each)
        for team, theirs in of_teams.items():
            roots = (root_flops(groups[turn[0]], len(sizes), p.device) for p, (_, sizes, turn), _ in theirs if sizes)
            loads = Loads(team.size, next(roots, 0.0))  # FLOPs of the first block that has a root stand for all
            known = {p: itertools.chain(*owned.values()) for p, owned in self.owners.items()}
            for p, block, _ in theirs:
                if p in known:
                    loads.add(*block, next(known[p]))
            new = [each for each in theirs if each[0] not in self.owners]
            dealt = deal([block for _, block, _ in new], [size for *_, size in new], loads)
            for (p, (shape, *_), _), owner in zip(new, dealt, strict=True):
                self.owners.setdefault(p, {}).setdefault(shape, []).append(owner)

    def _keep_own(self, state: dict[str, Any], p: Tensor, layout: Layout) -> None:
        """Cut p's factors, which are those of all its blocks, to this rank's."""
        check_factors(state, p, layout)
        for name in outdated(state, layout):
            del state[name]
        for name in [name for name in state if is_factor(name)]:
            value = state.pop(name)
            if isinstance(value, Part):  # this rank's already
                state[name] = value.as_subclass(Tensor)
            elif mine := self.shares[p].indices.get(shape_of(name, layout)):
                state[name] = value[mine]
