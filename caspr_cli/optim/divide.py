"""The work of a step divided among ranks: who owns which block, and what is sent before and after a rank's own step.

:meth:`Division.gather` (rows of DTensors) -> :mod:`caspr_cli.optim.step` -> :meth:`Division.send`
-> :meth:`Division.receive`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from caspr_cli.optim.blocks import Layout, Shape
from caspr_cli.optim.fsdp import TransferPlan, is_counted, is_sharded
from caspr_cli.optim.graft import frobenius
from caspr_cli.optim.options import Group, factor_dtype
from caspr_cli.optim.plan import Plan, is_preconditioned, layout_of
from caspr_cli.optim.precision import full_precision
from caspr_cli.optim.scatter import ReceivedRows, chunks, copy
from caspr_cli.optim.shard import AllGatherBuffer, AllToAllBuffer, Barrier, Loads, Slot, agree, summed, world_size
from caspr_cli.optim.stacks import Stack, check_factors, is_factor, outdated
from caspr_cli.optim.step import Active, Received, finish, momenta, preconditioned, update_moments

Buffer = AllGatherBuffer | AllToAllBuffer


@dataclass(frozen=True)
class Slots:
    """Where U of each block is while it travels between ranks."""

    buffers: dict[tuple[bool, torch.device], Buffer]  # by whether a parameter is divided by rows
    blocks: dict[tuple[Tensor, Shape], list[Slot]]  # of parameters that all ranks have
    outgoing: dict[Tensor, list[Slot]]  # of parameters that are divided by rows: for what this rank's plan owns
    incoming: dict[Tensor, list[Slot]]  # and for what it holds

    def gathered(self, p: Tensor) -> AllGatherBuffer:
        """Return the buffer of a parameter that all ranks have."""
        found = self.buffers[False, p.device]
        assert isinstance(found, AllGatherBuffer)
        return found

    def exchanged(self, p: Tensor) -> AllToAllBuffer:
        """Return the buffer of a parameter that is divided by rows."""
        found = self.buffers[True, p.device]
        assert isinstance(found, AllToAllBuffer)
        return found

    def whole(self, p: Tensor, layout: Layout, dtype: torch.dtype) -> dict[Shape, Tensor]:
        """Return what arrived for p, by block shape ``[blocks, ...]``."""
        buffer, found = self.gathered(p), {}
        for shape in layout.shapes:
            read = [buffer.read(slot) for slot in self.blocks[p, shape]]
            found[shape] = (read[0].unsqueeze(0) if len(read) == 1 else torch.stack(read)).to(dtype)
        return found

    def rows(self, p: Tensor, plan: TransferPlan, dtype: torch.dtype) -> dict[Shape, Tensor]:
        """Return the rows of U that this rank holds, as one block."""
        U = torch.empty(plan.layout.shape, dtype=dtype, device=p.device)
        buffer = self.exchanged(p)
        copy([U[x.cut] for x in plan.held], [buffer.read(slot) for slot in self.incoming[p]])
        return {plan.layout.shape: U}


@dataclass(frozen=True)
class InFlight:
    """Updates that were sent."""

    steps: list[Active]
    slots: Slots
    lengths: dict[Tensor, Tensor]  # of the graft's steps
    counted: set[Tensor]  # parameters whose moments are those of this step


def is_shared(group: Group, plan: Plan) -> bool:
    """Whether ranks share the work on a group."""
    return plan.sharded or (group["shard"] == "auto" and world_size() > 1)


@dataclass
class Division:
    """Which rank owns which block, and the buffers between ranks. Only the first two fields are saved."""

    owners: dict[Tensor, dict[Shape, list[int]]] = field(default_factory=dict)  # the rank of each block
    ranks: int = 0  # ranks among which the factors in the state are divided; 0: they are whole
    shares: dict[Tensor, Layout] = field(default_factory=dict)  # of parameters that have owners, this rank's blocks
    transfers: dict[Tensor, TransferPlan] = field(default_factory=dict)  # of parameters that are divided by rows
    barrier: Barrier | None = None
    _unchecked: list[Tensor] = field(default_factory=list)  # parameters that may differ between ranks
    _gathers: dict[torch.device, AllGatherBuffer] = field(default_factory=dict)
    _exchanges: dict[tuple[str, torch.device], AllToAllBuffer] = field(default_factory=dict)

    @property
    def bytes_received(self) -> int:
        """Bytes that this rank received in the last step, its own share included."""
        buffers: list[Buffer] = [*self._gathers.values(), *self._exchanges.values()]
        return sum(buffer.moved for buffer in buffers)

    def share(self, p: Tensor, group: Group) -> Layout:
        """Return the blocks of p that this rank owns: all of them but under data parallelism."""
        return self.shares.get(p) or layout_of(p, group)

    # ---- owners

    def divide(self, groups: list[Group], plans: list[Plan], state: Any, *, check: bool = True) -> bool:
        """Give each block an owner where there are several ranks, and return whether the state was cut to this rank's.

        Args:
            check: whether parameters are the same on all ranks, of those for which that has not been asked yet: a
                collective operation.

        Raises:
            ValueError: they are not.
            RuntimeError: the state is divided among another number of ranks.
        """
        if self.ranks not in (0, world_size()):
            raise RuntimeError(
                f"the state is divided among {self.ranks} ranks but there are {world_size()} now: load a state_dict"
            )
        shared = [group for group, plan in zip(groups, plans, strict=True) if is_shared(group, plan)]
        new = [(g, p) for g in shared for p in g["params"] if p not in self.shares and is_preconditioned(p, g)]
        unowned = [p for _, p in new if p not in self.owners]
        self._unchecked += unowned
        if check and self._unchecked:
            agree(self._unchecked)
            self._unchecked = []
        if not new:
            return False
        self._assign(unowned, groups, plans)
        rank = dist.get_rank()
        for group, p in new:
            mine = {s: [j for j, r in enumerate(ranks) if r == rank] for s, ranks in self.owners[p].items()}
            self.shares[p] = layout_of(p, group).only(mine)
            if is_sharded(p):
                self.transfers[p] = TransferPlan.of(p, layout_of(p, group), self.owners[p], rank)
        if self.ranks:
            return False
        for group, p in new:
            self._keep_own(state.get(p, {}), p, layout_of(p, group))
        self.ranks = world_size()
        self.barrier = self.barrier or Barrier()
        return True

    def _assign(self, new: list[Tensor], groups: list[Group], plans: list[Plan]) -> None:
        """Choose owners for these parameters' blocks, beside what the ranks own already."""
        if not new:
            return
        loads = Loads(world_size())
        blocks: list[tuple[Tensor, Shape, Shape, tuple[int, int]]] = []
        for index, (group, plan) in enumerate(zip(groups, plans, strict=True)):
            for (p, shape), offsets in plan.refresh_offsets.items():
                sizes = plan.layouts[p].sizes(shape)
                for number, offset in enumerate(offsets):
                    if p in self.owners:
                        loads.add(shape, sizes, (index, offset), self.owners[p][shape][number])
                    elif is_shared(group, plan):
                        blocks.append((p, shape, sizes, (index, offset)))
        for (p, shape, *_), owner in zip(blocks, loads.assign([block[1:] for block in blocks]), strict=True):
            self.owners.setdefault(p, {}).setdefault(shape, []).append(owner)

    def _keep_own(self, state: dict[str, Any], p: Tensor, layout: Layout) -> None:
        """Cut p's factors, which are those of all its blocks, to this rank's."""
        check_factors(state, p, layout)
        for name in outdated(state, layout):
            del state[name]
        for name in [name for name in state if is_factor(name)]:
            value = state.pop(name)
            if mine := self.shares[p].indices.get(layout.shapes[int(name.rpartition(".")[2])]):
                state[name] = value[mine]

    # ---- before the step: rows of gradients and momenta, from the ranks that hold them to the owners of their blocks

    def gather(self, steps: list[Active]) -> tuple[list[Received], dict[Tensor, Tensor]]:
        """Return what each group's owners received, and how long this rank's rows of the graft's steps are."""
        lengths: dict[Tensor, Tensor] = {}
        gradients: list[dict[Tensor, ReceivedRows]] = [{} for _ in steps]
        averages: list[dict[Tensor, ReceivedRows]] = [{} for _ in steps]
        sends: list[tuple[dict[Tensor, ReceivedRows], Tensor, Tensor]] = []
        for x, of_gradients, of_momenta in zip(steps, gradients, averages, strict=True):
            for chunk in chunks([p for p in x.layouts if p in self.transfers]):
                lengths |= update_moments(chunk, x)
            for p in (p for p in x.steps if p in x.grads and p in self.transfers):
                sends.append((of_gradients, p, x.grads[p]))
                if p in x.layouts and x.group["precondition"] == "momentum":
                    sends.append((of_momenta, p, momenta([p], x)[0]))
        if sends:
            self._exchange_rows(sends, steps[0])
        return [Received(*rows) for rows in zip(gradients, averages, strict=True)], lengths

    def _exchange_rows(self, sends: list[tuple[dict[Tensor, ReceivedRows], Tensor, Tensor]], x: Active) -> None:
        """Put what arrives of each parameter's rows into the first of each triple; the third is what is here."""
        buffers: dict[torch.device, AllToAllBuffer] = {}
        outgoing, incoming = [], []
        for into, p, tensor in sends:
            plan = self.transfers[p]
            buffer = buffers.setdefault(p.device, self._exchange("inputs", p.device))
            merged = tensor.reshape(plan.layout.shape)
            outgoing += [
                (buffer, buffer.to(s.owner, s.shape, tensor.dtype), merged[s.cut]) for s in plan.held if s.same_copy
            ]
            arriving = [(s, buffer.of(s.holder, s.shape, tensor.dtype)) for s in plan.owned if s.same_copy]
            incoming.append((into, p, buffer, arriving))
        for buffer in buffers.values():
            buffer.open()
        copy([buffer.mine(slot) for buffer, slot, _ in outgoing], [rows for *_, rows in outgoing])
        with x.phase("communication"):
            for buffer in buffers.values():
                buffer.send()
            for buffer in buffers.values():
                buffer.wait()
        for into, p, buffer, arriving in incoming:
            into[p] = [(s, buffer.read(slot)) for s, slot in arriving]
        for buffer in buffers.values():
            buffer.clear()

    def _exchange(self, use: str, device: torch.device) -> AllToAllBuffer:
        return self._exchanges.setdefault((use, device), AllToAllBuffer(device))

    # ---- after the step: U of each block, from its owner to all ranks or to those that hold its rows

    def send(self, shared: list[tuple[Active, Received]], lengths: dict[Tensor, Tensor]) -> InFlight:
        """Compute U of the blocks that this rank owns, and start to send it.

        Args:
            shared: the groups that have something to precondition, with what :meth:`gather` returned for them.
            lengths: of the graft's steps that are known.
        """
        steps = [x for x, _ in shared]
        slots, lengths = self._slots(steps), dict(lengths)
        counted = {p for x in steps for p in x.layouts if p in self.transfers}
        for x, received in shared:
            for stack in x.stacks:
                scale = stack.input_scale(x.group)
                for members, rows in stack.chunks(x.members(stack)):
                    lengths |= update_moments([p for p in members if p not in counted], x)
                    counted.update(members)
                    with full_precision(stack.scale.device.type):
                        U = preconditioned(stack, members, rows, scale, x, received)
                    self._put(U, stack, members, x, slots)
        for buffer in slots.buffers.values():
            buffer.send()
        return InFlight(steps, slots, lengths, counted)

    def _slots(self, steps: list[Active]) -> Slots:
        """Return the slots of all blocks, in buffers that are large enough."""
        buffers: dict[tuple[bool, torch.device], Buffer] = {}
        blocks: dict[tuple[Tensor, Shape], list[Slot]] = {}
        outgoing: dict[Tensor, list[Slot]] = {}
        incoming: dict[Tensor, list[Slot]] = {}
        for x in steps:
            for p, layout in x.layouts.items():
                dtype = x.group["gather_dtype"] or factor_dtype(p, x.group)
                if p in self.transfers:
                    plan, exchange = self.transfers[p], self._exchange("updates", p.device)
                    buffers[True, p.device] = exchange
                    outgoing[p] = [exchange.to(s.holder, s.shape, dtype) for s in plan.owned]
                    incoming[p] = [exchange.of(s.owner, s.shape, dtype) for s in plan.held]
                    continue
                gather = self._gathers.setdefault(p.device, AllGatherBuffer(p.device))
                buffers[False, p.device] = gather
                for shape in layout.shapes:
                    blocks[p, shape] = [gather.slot(owner, shape, dtype) for owner in self.owners[p][shape]]
        for buffer in buffers.values():
            buffer.open()
        return Slots(buffers, blocks, outgoing, incoming)

    def _put(self, U: Tensor, stack: Stack, members: list[Tensor], x: Active, slots: Slots) -> None:
        """Copy U of these parameters' blocks ``[k, d_1, ..., d_k]`` to what is sent."""
        targets, sources, blocks = [], [], iter(U.unbind())
        for p in members:
            indices = x.shares[p].indices[stack.shape]
            mine = [next(blocks) for _ in indices]
            if p in slots.outgoing:
                exchange, plan = slots.exchanged(p), self.transfers[p]
                owned = zip(plan.owned, slots.outgoing[p], strict=True)
                here = [(s, exchange.mine(slot)) for s, slot in owned if s.block == stack.shape]
                targets += [view for _, view in here]
                sources += [mine[s.number][s.rows] for s, _ in here]
            else:
                gather, places = slots.gathered(p), slots.blocks[p, stack.shape]
                targets += [gather.mine(places[i]) for i in indices]
                sources += mine
        torch._foreach_copy_(targets, sources)

    def receive(self, flight: InFlight) -> None:
        """Take the other ranks' U, and finish the step, the same on all ranks.

        What needs no U is done while it travels.
        """
        slots, lengths, buffers = flight.slots, dict(flight.lengths), flight.slots.buffers.values()
        for x in flight.steps:
            for chunk in chunks([p for p in x.layouts if p not in flight.counted]):
                lengths |= update_moments(chunk, x)
        with flight.steps[0].phase("communication"):
            norms = self._norms_of_rows(slots, lengths)
            for buffer in buffers:
                buffer.wait()
        for x in flight.steps:
            for chunk in chunks([p for p in x.layouts if p not in slots.outgoing]):
                pieces = {p: slots.whole(p, x.layouts[p], factor_dtype(p, x.group)) for p in chunk}
                finish(pieces, lengths, x, x.layouts)
            for chunk in chunks([p for p in x.layouts if p in slots.outgoing]):
                pieces = {p: slots.rows(p, self.transfers[p], factor_dtype(p, x.group)) for p in chunk}
                layouts, known = {p: self.transfers[p].layout for p in chunk}, [p for p in chunk if p in norms]
                finish(pieces, {p: norms[p][0] for p in known}, x, layouts, [norms[p][1] for p in known])
        for buffer in buffers:
            buffer.clear()

    def _norms_of_rows(self, slots: Slots, lengths: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Return the length ``[2]`` of the graft's step and of U, of each parameter that is divided by rows."""
        squares = {}
        for p in (p for p in slots.outgoing if p in lengths):
            D = lengths[p].square() * is_counted(p)
            owned, buffer = zip(slots.outgoing[p], self.transfers[p].owned, strict=True), slots.exchanged(p)
            mine = [buffer.mine(slot) for slot, s in owned if s.same_copy]
            squares[p] = torch.stack([D, frobenius(mine).square().sum() if mine else torch.zeros_like(D)])
        return {p: total.sqrt() for p, total in summed(squares).items()}
