"""What travels between ranks: rows of gradients to the owners of blocks, and U from there.

:meth:`Exchange.gather` (rows of DTensors) -> :mod:`caspr_cli.optim.step` -> :meth:`Exchange.updates`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from caspr_cli.optim.blocks import Shape
from caspr_cli.optim.dealing import buckets
from caspr_cli.optim.divide import Division
from caspr_cli.optim.fsdp import is_sharded
from caspr_cli.optim.graft import frobenius
from caspr_cli.optim.options import factor_dtype, travel_dtype
from caspr_cli.optim.precision import full_precision
from caspr_cli.optim.scatter import ReceivedRows, chunks, copy
from caspr_cli.optim.shard import Channel, Parcel, Slot, Team, summed
from caspr_cli.optim.stacks import Stack
from caspr_cli.optim.step import Active, Received, finish, momenta, preconditioned, update_moments

Key = tuple[Team, torch.device, bool]  # of what travels together: among whom, device, whether it is divided by rows


@dataclass
class Bucket:
    """Updates that travel in one collective: some blocks, or the rows of some parameters."""

    channel: Channel
    parcel: Parcel
    rows: bool
    first: list[set[Tensor]]  # by param group, the parameters of which nothing has travelled before
    last: list[list[Tensor]]  # and those that are complete after it
    blocks: list[tuple[Tensor, Shape, Slot]] = field(default_factory=list)  # in the order of layouts
    outgoing: dict[Tensor, list[Slot]] = field(default_factory=dict)  # of rows: for what this rank's plan owns
    incoming: dict[Tensor, list[Slot]] = field(default_factory=dict)  # and for what it holds


@dataclass
class Schedule:
    """In which buckets updates travel: the same in each step that has the same parameters."""

    key: list[Any]
    buckets: list[Bucket]
    places: dict[tuple[Tensor, Shape], list[tuple[Bucket, Slot]]]  # of the blocks of parameters that all ranks have


@dataclass
class Updates:
    """The updates of one step, on their way."""

    steps: list[Active]
    received: list[Received]
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

    # ---- before the step: rows of gradients and momenta, from the ranks that hold them to the owners of their blocks

    def gather(self, steps: list[Active]) -> tuple[list[Received], dict[Tensor, Tensor]]:
        """Return what each group's owners received, and how long this rank's rows of the graft's steps are."""
        lengths: dict[Tensor, Tensor] = {}
        gradients: list[dict[Tensor, ReceivedRows]] = [{} for _ in steps]
        averages: list[dict[Tensor, ReceivedRows]] = [{} for _ in steps]
        sends: list[tuple[dict[Tensor, ReceivedRows], Tensor, Tensor]] = []
        for x, of_gradients, of_momenta in zip(steps, gradients, averages, strict=True):
            for chunk in chunks([p for p in x.layouts if p in self.division.transfers]):
                lengths |= update_moments(chunk, x)
            for p in (p for p in x.steps if p in x.grads and p in self.division.transfers):
                sends.append((of_gradients, p, x.grads[p]))
                if p in x.layouts and x.group["precondition"] == "momentum":
                    sends.append((of_momenta, p, momenta([p], x)[0]))
        if sends:
            self._exchange_rows(sends, steps[0])
        return [Received(*rows) for rows in zip(gradients, averages, strict=True)], lengths

    def _exchange_rows(self, sends: list[tuple[dict[Tensor, ReceivedRows], Tensor, Tensor]], x: Active) -> None:
        """Put what arrives of each parameter's rows into the first of each triple; the third is what is here."""
        parcels: dict[Key, Parcel] = {}
        outgoing, incoming = [], []
        for into, p, tensor in sends:
            key, plan = self._key(p), self.division.transfers[p]
            channel = self._channel("inputs", key)
            parcel = parcels.setdefault(key, Parcel(channel.team.size, to_all=False))
            merged = tensor.reshape(plan.layout.shape)
            outgoing += [(channel, parcel.outgoing(s.owner, s.shape, tensor.dtype), merged[s.cut]) for s in plan.held]
            arriving = [(s, parcel.incoming(s.holder, s.shape, tensor.dtype)) for s in plan.owned]
            incoming.append((into, p, channel, arriving))
        channels = [self._channel("inputs", key) for key in parcels]
        for channel, parcel in zip(channels, parcels.values(), strict=True):
            channel.open(parcel)
            self.bytes_received += parcel.received
        copy([channel.mine(slot) for channel, slot, _ in outgoing], [rows for *_, rows in outgoing])
        with x.phase("communication"):
            for channel in channels:
                channel.send()
            for channel in channels:
                channel.wait()
        for into, p, channel, arriving in incoming:
            into[p] = [(s, channel.read(slot)) for s, slot in arriving]

    def _key(self, p: Tensor) -> Key:
        return self.division.team(p), p.device, p in self.division.transfers

    def _channel(self, use: str | int, key: Key) -> Channel:
        if (use, key) not in self._channels:
            self._channels[use, key] = Channel(*key[:2])
        return self._channels[use, key]

    # ---- after the step: U of each block, from its owner to all ranks or to those that hold its rows

    def updates(
        self, steps: list[Active], received: list[Received], lengths: dict[Tensor, Tensor], beside: Callable[[], None]
    ) -> None:
        """Compute U of the blocks that this rank owns, give it to the others, take theirs, and finish the step.

        A bucket at a time: while one travels, U of the next is computed, and that before it moves the weights. They
        are the same on all ranks.

        Args:
            steps: the groups that have something to precondition.
            received: what :meth:`gather` returned for them.
            lengths: of the graft's steps that are known.
            beside: is called while the first travels.
        """
        counted = {p for x in steps for p in x.layouts if p in self.division.transfers}
        updates, earlier = Updates(steps, received, dict(lengths), counted), None
        for bucket in self._buckets(steps):
            bucket.channel.open(bucket.parcel)
            self._fill(bucket, updates)
            bucket.channel.send()
            self.bytes_received += bucket.parcel.received
            if earlier is None:
                beside()
            for x, params in zip(steps, bucket.first, strict=True):
                for chunk in chunks([p for p in x.layouts if p in params and p not in counted]):
                    updates.count(chunk, x)
            if earlier is not None:
                self._finish(earlier, updates)
            earlier = bucket
        if earlier is not None:
            self._finish(earlier, updates)

    def _buckets(self, steps: list[Active]) -> list[Bucket]:
        """Return what travels together in this step."""
        key = [(id(x.plan), id(p), travel_dtype(p, x.group)) for x in steps for p in x.layouts]
        if self._schedule is None or self._schedule.key != key:
            self._schedule = self._scheduled(key, steps)
        return self._schedule.buckets

    def _scheduled(self, key: list[Any], steps: list[Active]) -> Schedule:
        found = Schedule(key, [], {})
        together: dict[Key, list[tuple[int, Tensor]]] = defaultdict(list)
        for number, x in enumerate(steps):
            for p in x.layouts:
                together[self._key(p)].append((number, p))
        for kind, params in together.items():
            add = self._add_rows if kind[2] else self._add_blocks
            add(found, kind, params, steps)
        return found

    def _new_bucket(self, schedule: Schedule, key: Key, steps: list[Active]) -> Bucket:
        channel = self._channel(len(schedule.buckets) % 2, key)
        parcel = Parcel(channel.team.size, to_all=not key[2])
        bucket = Bucket(channel, parcel, key[2], [set() for _ in steps], [[] for _ in steps])
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
                    bucket.first[number].add(p)
                if i + 1 == len(blocks) or blocks[i + 1][1] is not p:
                    bucket.last[number].append(p)
                seen.add(p)

    def _add_rows(self, into: Schedule, key: Key, params: list[tuple[int, Tensor]], steps: list[Active]) -> None:
        """Add the buckets of parameters that are divided by rows: no parameter is in two."""
        types = [travel_dtype(p, steps[number].group) for number, p in params]
        sizes = [-(-p.numel() * dtype.itemsize // key[0].size) for (_, p), dtype in zip(params, types, strict=True)]
        for run in buckets(sizes, 1):
            bucket = self._new_bucket(into, key, steps)
            for (number, p), dtype in zip(params[run.start : run.stop], types[run.start : run.stop], strict=True):
                plan = self.division.transfers[p]
                bucket.outgoing[p] = [bucket.parcel.outgoing(s.holder, s.shape, dtype) for s in plan.owned]
                bucket.incoming[p] = [bucket.parcel.incoming(s.owner, s.shape, dtype) for s in plan.held]
                bucket.first[number].add(p)
                bucket.last[number].append(p)

    def _fill(self, bucket: Bucket, updates: Updates) -> None:
        """Compute U of this rank's blocks of what begins with a bucket, and copy to it what travels in it."""
        later = updates.later.pop(id(bucket), [])
        copy([bucket.channel.mine(slot) for slot, _ in later], [U for _, U in later])
        for x, received, params in zip(updates.steps, updates.received, bucket.first, strict=True):
            for stack in x.stacks if params else ():
                if id(stack) not in updates.scales:
                    updates.scales[id(stack)] = stack.input_scale(x.group)
                for members, rows in stack.chunks([p for p in x.members(stack) if p in params]):
                    updates.count(members, x)
                    with full_precision(stack.scale.device.type):
                        U = preconditioned(stack, members, rows, updates.scales[id(stack)], x, received)
                    self._put(U, stack, members, x, bucket, updates)
        if bucket.rows:
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
                    layouts, norms = (
                        {p: self.division.transfers[p].layout for p in chunk},
                        [updates.norms[p] for p in known],
                    )
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


def _whole(arrived: dict[Shape, list[Tensor]], dtype: torch.dtype) -> dict[Shape, Tensor]:
    """Return U by block shape ``[blocks, ...]``."""
    return {
        shape: (read[0].unsqueeze(0) if len(read) == 1 else torch.stack(read)).to(dtype)
        for shape, read in arrived.items()
    }
