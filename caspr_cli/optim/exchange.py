"""What travels between ranks: rows of gradients to the owners of blocks, and U from there.

:meth:`Exchange.gradients` (rows of DTensors) -> :mod:`caspr_cli.optim.step` -> :meth:`Exchange.updates`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from caspr_cli.optim.blocks import Shape
from caspr_cli.optim.dealing import buckets
from caspr_cli.optim.divide import Division
from caspr_cli.optim.fsdp import BlockShard, is_sharded
from caspr_cli.optim.graft import frobenius
from caspr_cli.optim.options import factor_dtype, travel_dtype
from caspr_cli.optim.plan import Plan
from caspr_cli.optim.precision import full_precision
from caspr_cli.optim.scatter import Rows, chunks, copy
from caspr_cli.optim.shard import Channel, Parcel, Slot, Team, summed
from caspr_cli.optim.stacks import Stack
from caspr_cli.optim.step import Active, add_statistics, finish, inputs_of, preconditioned, update_moments

Run = list[dict[Tensor, None]]  # by param group, parameters in order
Given = Callable[[Tensor, Active], Tensor]
Places = list[dict[Tensor, list[tuple[BlockShard, Slot]]]]  # by param group, where what arrives will be
Key = tuple[Team, torch.device, bool]  # of what travels together: among whom, device, whether it is divided by rows


@dataclass
class Bucket:
    """Updates that travel in one collective: some blocks, or the rows of some parameters."""

    channel: Channel
    parcel: Parcel
    rows: bool
    first: Run  # by param group, the parameters of which nothing has travelled before
    last: list[list[Tensor]]  # and those that are complete after it
    blocks: list[tuple[Tensor, Shape, Slot]] = field(default_factory=list)  # in the order of layouts
    outgoing: dict[Tensor, list[Slot]] = field(default_factory=dict)  # of rows: for what this rank's plan owns
    incoming: dict[Tensor, list[Slot]] = field(default_factory=dict)  # and for what it holds


@dataclass
class Schedule:
    """In which buckets updates travel: the same in each step that has the same parameters."""

    key: list[Any]
    plans: list[Plan]  # whose ids are in the key
    buckets: list[Bucket]
    places: dict[tuple[Tensor, Shape], list[tuple[Bucket, Slot]]]  # of the blocks of parameters that all ranks have


@dataclass
class Updates:
    """The updates of one step, on their way."""

    steps: list[Active]
    lengths: dict[Tensor, Tensor]  # of the graft's steps
    counted: set[Tensor]  # parameters whose moments are those of this step
    scales: dict[int, Tensor] = field(default_factory=dict)  # what the inputs of a stack are divided by, by its id
    later: dict[int, list[tuple[Slot, Tensor]]] = field(default_factory=lambda: defaultdict(list))  # by bucket's id
    norms: dict[Tensor, Tensor] = field(default_factory=dict)  # of rows: lengths of the graft's step and of U, [2]
    arrived: dict[Tensor, dict[Shape, list[Tensor]]] = field(default_factory=lambda: defaultdict(dict))

    def count(self, params: list[Tensor], x: Active) -> None:
        """Update the moments of these parameters where that has not been done."""
        self.lengths |= update_moments([p for p in params if p not in self.counted], x)
        self.counted.update(params)


class Exchange:
    """The channels between ranks, and what travels in which."""

    def __init__(self, division: Division) -> None:
        self.division = division
        self.bytes_received = 0  # by this rank in the last step, its own share included
        self._channels: dict[tuple[str | int, Key], Channel] = {}
        self._schedule: Schedule | None = None

    @property
    def bytes_kept(self) -> int:
        """Bytes of memory for what travels."""
        return sum(channel.bytes for channel in self._channels.values())

    # ---- rows of gradients and momenta, from the ranks that hold them to the owners of their blocks

    def gradients(self, steps: list[Active]) -> dict[Tensor, Tensor]:
        """Have owners add the gradients of their blocks to the statistics, and update the moments of rows.

        Returns:
            How long this rank's rows of the graft's steps are.
        """
        lengths: dict[Tensor, Tensor] = {}
        together: dict[Key, list[tuple[int, Tensor]]] = defaultdict(list)
        for number, x in enumerate(steps):
            for chunk in chunks([p for p in x.layouts if p in self.division.transfers]):
                lengths |= update_moments(chunk, x)
            add_statistics(replace(x, grads={p: G for p, G in x.grads.items() if p not in self.division.transfers}), {})
            for p in x.steps:
                if p in x.grads and p in self.division.transfers:
                    together[self._key(p)].append((number, p))
        runs = [run for key, params in together.items() for run in _runs(key, params, steps)]
        for run, found in zip(runs, self._inputs(runs, steps, lambda p, x: x.grads[p]), strict=True):
            for x, params, rows in zip(steps, run, found, strict=True):
                if params:
                    add_statistics(replace(x, grads={p: x.grads[p] for p in params}), rows)
        return lengths

    def _inputs(self, runs: list[Run], steps: list[Active], given: Given) -> Iterator[list[Rows]]:
        """Yield, by param group, the rows of each run that arrive for this rank's blocks, while those of the next run
        travel.

        Args:
            given: returns what is here of a parameter.
        """
        earlier = None
        for number, run in enumerate(runs):
            flight = self._send_rows(f"inputs {number % 2}", run, steps, given)
            if earlier is not None:
                yield self._take_rows(*earlier, steps)
            earlier = flight
        if earlier is not None:
            yield self._take_rows(*earlier, steps)

    def _send_rows(self, use: str, run: Run, steps: list[Active], given: Given) -> tuple[Channel, Places]:
        """Start to send the rows of a run; return the channel, and where what arrives will be."""
        channel = self._channel(use, self._key(next(p for params in run for p in params)))
        parcel, outgoing = Parcel(channel.team.size, to_all=False), []
        places: Places = []
        for x, params in zip(steps, run, strict=True):
            places.append({})
            for p in params:
                plan, tensor = self.division.transfers[p], given(p, x)
                merged = tensor.reshape(plan.layout.shape)
                outgoing += [(parcel.outgoing(s.owner, s.shape, tensor.dtype), merged[s.cut]) for s in plan.held]
                places[-1][p] = [(s, parcel.incoming(s.holder, s.shape, tensor.dtype)) for s in plan.owned]
        channel.open(parcel)
        copy([channel.mine(slot) for slot, _ in outgoing], [rows for _, rows in outgoing])
        channel.send()
        self.bytes_received += parcel.received
        return channel, places

    def _take_rows(self, channel: Channel, places: Places, steps: list[Active]) -> list[Rows]:
        with steps[0].phase("communication"):
            channel.wait()
        return [{p: [(s, channel.read(slot)) for s, slot in here] for p, here in group.items()} for group in places]

    def _key(self, p: Tensor) -> Key:
        return self.division.team(p), p.device, p in self.division.transfers

    def _channel(self, use: str | int, key: Key) -> Channel:
        if (use, key) not in self._channels:
            self._channels[use, key] = Channel(*key[:2])
        return self._channels[use, key]

    # ---- after the step: U of each block, from its owner to all ranks or to those that hold its rows

    def updates(self, steps: list[Active], lengths: dict[Tensor, Tensor], beside: Callable[[], None]) -> None:
        """Compute U of the blocks that this rank owns, give it to the others, take theirs, and finish the step.

        A bucket at a time: while one travels, U of the next is computed, and that before it moves the weights. They
        are the same on all ranks.

        Args:
            steps: the groups that have something to precondition.
            lengths: of the graft's steps that are known.
            beside: is called while the first travels.
        """
        counted = {p for x in steps for p in x.layouts if p in self.division.transfers}
        updates, earlier, found = Updates(steps, dict(lengths), counted), None, self._buckets(steps)
        runs = [bucket.first for bucket in found if bucket.rows]
        inputs = self._inputs(runs, steps, lambda p, x: inputs_of([p], x)[0])
        for bucket in found:
            rows = next(inputs) if bucket.rows else [{} for _ in steps]
            bucket.channel.open(bucket.parcel)
            self._fill(bucket, updates, rows)
            bucket.channel.send()
            self.bytes_received += bucket.parcel.received
            if earlier is None:
                beside()
            for x, params in zip(steps, bucket.first, strict=True):
                for chunk in chunks([p for p in params if p not in counted]):
                    updates.count(chunk, x)
            if earlier is not None:
                self._finish(earlier, updates)
            earlier = bucket
        if earlier is not None:
            self._finish(earlier, updates)

    def _buckets(self, steps: list[Active]) -> list[Bucket]:
        """Return what travels together in this step."""
        key = [(id(x.plan), id(p), travel_dtype(p, x.group)) for x in steps for p in x.layouts]
        if self._schedule is not None and self._schedule.key == key:
            return self._schedule.buckets
        found = Schedule(key, [x.plan for x in steps], [], {})
        together: dict[Key, list[tuple[int, Tensor]]] = defaultdict(list)
        for number, x in enumerate(steps):
            for p in x.layouts:
                together[self._key(p)].append((number, p))
        for kind, params in together.items():
            add = self._add_rows if kind[2] else self._add_blocks
            add(found, kind, params, steps)
        self._schedule = found
        return found.buckets

    def _new_bucket(self, schedule: Schedule, key: Key, steps: list[Active]) -> Bucket:
        channel = self._channel(len(schedule.buckets) % 2, key)
        parcel = Parcel(channel.team.size, to_all=not key[2])
        bucket = Bucket(channel, parcel, key[2], [{} for _ in steps], [[] for _ in steps])
        schedule.buckets.append(bucket)
        return bucket

    def _add_blocks(self, into: Schedule, key: Key, params: list[tuple[int, Tensor]], steps: list[Active]) -> None:
        """Add the buckets of parameters that all ranks have."""
        blocks = [
            (number, p, shape, owner, travel_dtype(p, steps[number].group))
            for number, p in params
            for shape in steps[number].layouts[p].shapes
            for owner in self.division.owners[p][shape]
        ]
        sizes = [math.prod(shape) * dtype.itemsize for _, _, shape, _, dtype in blocks]
        seen: set[Tensor] = set()
        for run in buckets(sizes, key[0].size):
            bucket = self._new_bucket(into, key, steps)
            for i in run:
                number, p, shape, owner, dtype = blocks[i]
                slot = bucket.parcel.outgoing(owner, shape, dtype)
                bucket.blocks.append((p, shape, slot))
                into.places.setdefault((p, shape), []).append((bucket, slot))
                if p not in seen:
                    bucket.first[number][p] = None
                if i + 1 == len(blocks) or blocks[i + 1][1] is not p:
                    bucket.last[number].append(p)
                seen.add(p)

    def _add_rows(self, into: Schedule, key: Key, params: list[tuple[int, Tensor]], steps: list[Active]) -> None:
        """Add the buckets of parameters that are divided by rows: no parameter is in two."""
        for run in _runs(key, params, steps):
            bucket = self._new_bucket(into, key, steps)
            bucket.first, bucket.last = run, [list(group) for group in run]
            for x, group in zip(steps, run, strict=True):
                for p in group:
                    plan, dtype = self.division.transfers[p], travel_dtype(p, x.group)
                    bucket.outgoing[p] = [bucket.parcel.outgoing(s.holder, s.shape, dtype) for s in plan.owned]
                    bucket.incoming[p] = [bucket.parcel.incoming(s.owner, s.shape, dtype) for s in plan.held]

    def _fill(self, bucket: Bucket, updates: Updates, rows: list[Rows]) -> None:
        """Compute U of this rank's blocks of what begins with a bucket, and copy to it what travels in it."""
        later = updates.later.pop(id(bucket), [])
        copy([bucket.channel.mine(slot) for slot, _ in later], [U for _, U in later])
        for x, here, params in zip(updates.steps, rows, bucket.first, strict=True):
            for stack in x.stacks if params else ():
                if id(stack) not in updates.scales:
                    updates.scales[id(stack)] = stack.input_scale(x.group)
                for members, at in stack.chunks([p for p in x.members(stack) if p in params]):
                    updates.count(members, x)
                    with full_precision(stack.scale.device.type):
                        U = preconditioned(stack, members, at, updates.scales[id(stack)], x, here)
                    self._put(U, stack, members, x, bucket, updates)
        if bucket.rows:
            with updates.steps[0].phase("communication"):
                updates.norms |= self._norms_of_rows(bucket, updates.lengths)

    def _put(self, U: Tensor, stack: Stack, members: list[Tensor], x: Active, bucket: Bucket, updates: Updates) -> None:
        """Copy U of these parameters' blocks ``[k, d_1, ..., d_k]`` to what is sent, now or later."""
        assert self._schedule is not None
        targets, sources, blocks = [], [], iter(U.unbind())
        for p in members:
            indices = x.shares[p].indices[stack.shape]
            mine = [next(blocks) for _ in indices]
            if bucket.rows:
                owned = zip(self.division.transfers[p].owned, bucket.outgoing[p], strict=True)
                here = [(s, slot) for s, slot in owned if s.block == stack.shape]
                targets += [bucket.channel.mine(slot) for _, slot in here]
                sources += [mine[s.number][s.rows] for s, _ in here]
                continue
            for i, block in zip(indices, mine, strict=True):
                when, slot = self._schedule.places[p, stack.shape][i]
                if when is bucket:
                    targets.append(bucket.channel.mine(slot))
                    sources.append(block)
                else:
                    updates.later[id(when)].append((slot, block.clone()))
        copy(targets, sources)

    def _finish(self, bucket: Bucket, updates: Updates) -> None:
        """Take the other ranks' U of a bucket, and move the weights of which nothing is missing."""
        with updates.steps[0].phase("communication"):
            bucket.channel.wait()
        complete = {p for params in bucket.last for p in params}
        for p, shape, slot in bucket.blocks:
            U = bucket.channel.read(slot)
            updates.arrived[p].setdefault(shape, []).append(U if p in complete else U.clone())
        for x, params in zip(updates.steps, bucket.last, strict=True):
            for chunk in chunks(params):
                dtypes = {p: factor_dtype(p, x.group) for p in chunk}
                if bucket.rows:
                    pieces = {p: self._rows(bucket, p, dtypes[p]) for p in chunk}
                    known = [p for p in chunk if p in updates.norms]
                    layouts = {p: self.division.transfers[p].layout for p in chunk}
                    norms = [updates.norms[p] for p in known]
                    lengths = dict(zip(known, [length for length, _ in norms], strict=True))
                    finish(pieces, lengths, x, layouts, [have for _, have in norms])
                else:
                    pieces = {p: _whole(updates.arrived.pop(p), dtypes[p]) for p in chunk}
                    finish(pieces, updates.lengths, x, x.layouts)

    def _rows(self, bucket: Bucket, p: Tensor, dtype: torch.dtype) -> dict[Shape, Tensor]:
        """Return the rows of U that this rank holds, as one block."""
        plan = self.division.transfers[p]
        U = torch.empty(plan.layout.shape, dtype=dtype, device=p.device)
        copy([U[x.cut] for x in plan.held], [bucket.channel.read(slot) for slot in bucket.incoming[p]])
        return {plan.layout.shape: U}

    def _norms_of_rows(self, bucket: Bucket, lengths: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Return the length ``[2]`` of the graft's step and of U, of each parameter that has a graft."""
        squares = {}
        for p, slots in bucket.outgoing.items():
            if p in lengths and is_sharded(p):
                D = lengths[p].square()
                mine = [bucket.channel.mine(slot) for slot in slots]
                squares[p] = torch.stack([D, frobenius(mine).square().sum() if mine else torch.zeros_like(D)])
        return {p: total.sqrt() for p, total in summed(squares).items()}


def _runs(key: Key, params: list[tuple[int, Tensor]], steps: list[Active]) -> Iterator[Run]:
    """Yield parameters that are divided by rows, given with the number of their group, a few at a time.

    Two runs of inputs and two of updates are in memory at once, sent and received.
    """
    sizes = [4 * p.numel() * factor_dtype(p, steps[number].group).itemsize // key[0].size for number, p in params]
    for run in buckets(sizes, 1):
        found: Run = [{} for _ in steps]
        for number, p in params[run.start : run.stop]:
            found[number][p] = None
        yield found


def _whole(arrived: dict[Shape, list[Tensor]], dtype: torch.dtype) -> dict[Shape, Tensor]:
    """Return U by block shape ``[blocks, ...]``."""
    return {
        shape: (read[0].unsqueeze(0) if len(read) == 1 else torch.stack(read)).to(dtype)
        for shape, read in arrived.items()
    }
