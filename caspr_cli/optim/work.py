"""One step on its way: what is to be done in a param group, and updates between ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from caspr_cli.optim.blocks import Layout, Shape
from caspr_cli.optim.finite import Finite
from caspr_cli.optim.options import Group
from caspr_cli.optim.placing import Rows, copy
from caspr_cli.optim.rows import Route
from caspr_cli.optim.shard import Exchange, Parcel, Post
from caspr_cli.optim.stacks import Stack, Storage


@dataclass(frozen=True)
class Plan:
    """What follows from a group's options and the shapes of its parameters: the same in every step, on every rank."""

    key: tuple[Any, ...]  # what it was made of
    params: tuple[Tensor, ...]  # of the group: their ids in the key are theirs as long as they live
    layouts: dict[Tensor, Layout]  # of all that the group may ever precondition
    storages: dict[Tensor, Storage]
    turns: dict[tuple[Tensor, Shape], list[int]]  # of each block the step of the interval at which it has new roots
    waits: dict[Tensor, int]  # steps from ``start_step`` until all blocks of a parameter have had their first turn
    scattered: list[Tensor]  # those with blocks of several shapes
    sharded: bool  # whether a parameter of the group is a DTensor


@dataclass
class Work:
    """One step of one param group."""

    group: Group
    plan: Plan
    shared: bool  # whether ranks share the work
    grads: dict[Tensor, Tensor]  # what is here of them
    steps: dict[Tensor, int]  # the number of this step, for each parameter that is preconditioned some day
    seen: dict[Tensor, int]  # for each of these, of this gradient among those since its statistics began
    stacks: list[Stack]
    finite: Finite
    settled: bool = False  # whether it is known what is finite
    layouts: dict[Tensor, Layout] = field(default_factory=dict)  # of those that are past ``start_step``
    shares: dict[Tensor, Layout] = field(default_factory=dict)  # of these, the blocks that are this rank's
    rest: list[Tensor] = field(default_factory=list)  # those that the graft method takes
    broken: list[Tensor] = field(default_factory=list)  # those left out for the first time: a gradient is not finite
    gradients: dict[Tensor, Rows] = field(default_factory=dict)  # of blocks that are this rank's, by parameter
    momenta: dict[Tensor, Rows] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all parameters that have a stack are past ``start_step`` and have a gradient."""
        return len(self.layouts) == len(self.plan.layouts)

    def members(self, stack: Stack) -> list[Tensor]:
        """The stack's parameters that are preconditioned in this step."""
        return stack.members if self.complete else [p for p in stack.members if p in self.layouts]


@dataclass
class Updates:
    """U of all blocks on its way between ranks."""

    places: dict[tuple[Tensor, Shape], list[Parcel]]
    lengths: dict[Tensor, Tensor]  # of the graft's steps
    counted: set[Tensor] = field(default_factory=set)  # parameters whose moments are those of this step
    posts: dict[torch.device, Post] = field(default_factory=dict)
    exchanges: dict[torch.device, Exchange] = field(default_factory=dict)
    outgoing: dict[Tensor, list[Parcel]] = field(default_factory=dict)  # for what a route's owner sends
    incoming: dict[Tensor, list[Parcel]] = field(default_factory=dict)  # and what its holder gets

    @property
    def carriers(self) -> list[Post | Exchange]:
        return [*self.posts.values(), *self.exchanges.values()]

    def rows(self, p: Tensor, route: Route, dtype: torch.dtype) -> dict[Shape, Tensor]:
        """Those that this rank holds, as one block."""
        U = torch.empty(route.layout.shape, dtype=dtype, device=p.device)
        arrived = [self.exchanges[p.device].read(parcel) for parcel in self.incoming[p]]
        copy([U[x.cut] for x in route.held], arrived)
        return {route.layout.shape: U}

    def of(self, p: Tensor, layout: Layout, dtype: torch.dtype) -> dict[Shape, Tensor]:
        """By block shape ``[blocks, ...]``."""
        found = {}
        for shape in layout.parts:
            read = [self.posts[p.device].read(parcel) for parcel in self.places[p, shape]]
            found[shape] = (read[0].unsqueeze(0) if len(read) == 1 else torch.stack(read)).to(dtype)
        return found
