"""Several ranks, one optimizer: who owns which block, and how updates and state reach everybody.

Under data parallelism every rank has the same gradients, so each computes the updates of its own blocks alone and gets
the others' by one collective. A block's statistics and roots are on its owner; moments, a number a weight, are where
the weights are. Where these are divided by rows, rows go to the owner of a block and back (`fsdp` says which).
"""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from caspr_cli.optim.blocks import Shape
from caspr_cli.optim.fsdp import RowSharding, is_sharded, local
from caspr_cli.optim.schedule import EIGH_FLOPS

SHARDS = ("auto", "none")
ALIGNED = 64  # bytes: a view of any type may begin there, and matrix products are fastest

# torch 2.14 has renamed it.
all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def world_size() -> int:
    """Return the number of ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass
class Loads:
    """The work of each rank: FLOPs of every step, and of the roots whose turn is one step of an interval."""

    ranks: int
    always: list[float] = field(init=False)
    roots: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # (param group, phase) -> FLOPs

    def __post_init__(self) -> None:
        self.always = [0.0] * self.ranks

    def add(self, shape: Shape, sizes: Shape, turn: tuple[int, int], owner: int) -> None:
        self.always[owner] += _step_flops(shape, sizes)
        self.roots.setdefault(turn, [0.0] * self.ranks)[owner] += EIGH_FLOPS * sum(d**3 for d in sizes)

    def assign(self, blocks: list[tuple[Shape, Shape, tuple[int, int]]]) -> list[int]:
        """Return the owner of each block, given as its shape, the lengths of its axes that have statistics, and the
        (param group, step of the interval) of its refresh.

        The most expensive first, each to the rank whose step, refresh included, is then the shortest: products cost
        6 m n (m + n) FLOPs in every step, roots ``EIGH_FLOPS`` (m^3 + n^3) in one of an interval. Blocks that were
        assigned before stay where they are. A pure function of the calls so far: all ranks come to the same.
        """
        owners = [0] * len(blocks)
        for i in sorted(range(len(blocks)), key=lambda i: -_step_flops(*blocks[i][:2])):
            shape, sizes, turn = blocks[i]
            roots = self.roots.get(turn, [0.0] * self.ranks)
            owners[i] = min(range(self.ranks), key=lambda r: (self.always[r] + roots[r], self.always[r]))
            self.add(shape, sizes, turn, owners[i])
        return owners


def _step_flops(shape: Shape, sizes: Shape) -> float:
    """Return the FLOPs of statistics and application, without roots."""
    return 6.0 * math.prod(shape) * sum(sizes)


class AllGatherBuffer:
    """Tensors from all ranks to all ranks in one collective.

    Every rank asks for slots for the same tensors in the same order, with the owner of each, and fills its own.
    What is received is what was sent: where tensors travel in a lower type the owner, too, gets the rounded ones.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.ranks = device, dist.get_world_size()
        self._ends = [0] * self.ranks
        self._sent = self._received = torch.empty(0, dtype=torch.uint8, device=device)
        self._work: Any = None
        self.moved = 0  # bytes that each rank received in the last step

    def slot(self, owner: int, shape: Iterable[int], dtype: torch.dtype) -> Slot:
        return _next(self._ends, owner, shape, dtype)

    @property
    def bytes(self) -> int:
        """Bytes that each rank receives, its own included. Segments are as long as the longest."""
        return self.ranks * max(self._ends)

    def open(self) -> None:
        """Allocate the buffers once all slots are known. Memory is kept from step to step."""
        if len(self._received) < self.bytes:
            self._sent = torch.zeros(max(self._ends), dtype=torch.uint8, device=self.device)
            self._received = torch.empty(self.bytes, dtype=torch.uint8, device=self.device)

    def mine(self, slot: Slot) -> Tensor:
        """Return the view of a slot to write to."""
        return slot.view(self._sent, 0)

    def send(self) -> None:
        """Start the collective; it runs beside what comes next."""
        length = max(self._ends)
        received, sent = self._received[: self.ranks * length], self._sent[:length]
        self.moved = len(received)
        self._work = all_gather(received, sent, async_op=True)

    def wait(self) -> None:
        self._work.wait()

    def read(self, slot: Slot) -> Tensor:
        return slot.view(self._received, slot.owner * max(self._ends))

    def clear(self) -> None:
        """Forget all slots, for the next step."""
        self._ends = [0] * self.ranks


class AllToAllBuffer:
    """Tensors from some ranks to others in one collective.

    Every rank says what it sends to whom and what it gets from whom; for any two ranks, in the same order on both.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sent = self._received = torch.empty(0, dtype=torch.uint8, device=device)
        self._work: Any = None
        self.moved = 0  # bytes that this rank received in the last step
        self.clear()

    def clear(self) -> None:
        """Forget all slots, for the next step."""
        ranks = dist.get_world_size()
        self._to, self._from = [0] * ranks, [0] * ranks  # bytes

    def to(self, rank: int, shape: Iterable[int], dtype: torch.dtype) -> Slot:
        return _next(self._to, rank, shape, dtype)

    def of(self, rank: int, shape: Iterable[int], dtype: torch.dtype) -> Slot:
        return _next(self._from, rank, shape, dtype)

    def open(self) -> None:
        """Allocate the buffers once all slots are known. Memory is kept from step to step."""
        if len(self._sent) < sum(self._to):
            self._sent = torch.zeros(sum(self._to), dtype=torch.uint8, device=self.device)
        if len(self._received) < sum(self._from):
            self._received = torch.empty(sum(self._from), dtype=torch.uint8, device=self.device)

    def mine(self, slot: Slot) -> Tensor:
        """Return the view of a slot to write to."""
        return slot.view(self._sent, sum(self._to[: slot.owner]))

    def send(self) -> None:
        """Start the collective; it runs beside what comes next."""
        received, sent = self._received[: sum(self._from)], self._sent[: sum(self._to)]
        self.moved = len(received)
        self._work = dist.all_to_all_single(received, sent, self._from, self._to, async_op=True)

    def wait(self) -> None:
        self._work.wait()

    def read(self, slot: Slot) -> Tensor:
        return slot.view(self._received, sum(self._from[: slot.owner]))


def _next(ends: list[int], rank: int, shape: Iterable[int], dtype: torch.dtype) -> Slot:
    """Return the next slot of a rank's segment."""
    slot = Slot(rank, ends[rank], tuple(shape), dtype)
    ends[rank] += -(-slot.size // ALIGNED) * ALIGNED
    return slot


@dataclass(frozen=True)
class Slot:
    """A tensor's place in a rank's segment."""

    owner: int
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, segments: Tensor, offset: int) -> Tensor:
        start = offset + self.start
        return segments[start : start + self.size].view(self.dtype).view(self.shape)


def agree(params: list[Tensor]) -> None:
    """Refuse to share the work on parameters that are not the same on all ranks.

    Compares types, shapes, and smallest and largest entries, which do not depend on an order of summation. Of what is
    divided by rows, whether each rank has as many as it should. Once.

    Raises:
        ValueError: the same on all ranks.
    """
    words = [(tuple(p.shape), str(p.dtype), _content(p)) for p in params]
    everyone = gathered(hashlib.sha256(repr(words).encode()).hexdigest(), params[0].device)
    if different := [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]:
        raise ValueError(
            f"parameters of rank {different[0]} are not those of rank 0, so ranks cannot share the work on them: "
            'wrap the model in DistributedDataParallel, or use shard="none" where ranks train different models'
        )


def gathered(mine: object, device: torch.device) -> list[Any]:
    """Return what each rank has given, in the order of ranks.

    With NCCL it goes by this device: the current one is that of all ranks where nobody has set it.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        dist.all_gather_object(everyone, mine)
    return everyone


def _content(p: Tensor) -> list[float]:
    """Return what should be the same on all ranks; of rows, nothing unless their number is wrong."""
    if not is_sharded(p):
        return [float(end) for end in torch.aminmax(p.detach())]
    rows, here = RowSharding.of(p, p.shape[0]).rows[dist.get_rank()], local(p)
    return [] if here.shape[0] == rows.stop - rows.start else [float(here.shape[0])]


def summed(squares: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Return sums over ranks of numbers (float64, of one shape) that each has of its rows: a collective a device."""
    totals: dict[Tensor, Tensor] = {}
    for device in dict.fromkeys(p.device for p in squares):  # in the same order on all ranks
        here = [p for p in squares if p.device == device]
        total = torch.stack([squares[p] for p in here])
        dist.all_reduce(total)
        totals |= zip(here, total.unbind(), strict=True)
    return totals


class Barrier:
    """A barrier that raises an error if not all ranks come in time. Ranks make theirs in the same order.

    They meet in the store in which they met first, so it needs no network but the one that is there.
    """

    def __init__(self) -> None:
        self._world, self._store = dist.group.WORLD, dist.distributed_c10d._get_default_store()
        self._rank, self._ranks, self._round = dist.get_rank(), dist.get_world_size(), 0
        self._name = f"caspr/{self._store.add(f'caspr/barriers/{self._rank}', 1)}"

    def wait(self, timeout: float) -> None:
        """Wait until all ranks have come.

        Raises:
            RuntimeError: a rank does not come within ``timeout`` seconds, or the store is gone.
        """
        if self._world is not dist.group.WORLD:
            return
        self._round += 1
        everyone = f"{self._name}/all/{self._round}"
        self._store.set(self._mark(self._rank), str(self._round))
        if self._store.add(f"{self._name}/come", 1) == self._ranks * self._round:
            self._store.set(everyone, "")
        try:
            self._store.wait([everyone], datetime.timedelta(seconds=timeout))
        except RuntimeError as error:
            missing = ", ".join(str(rank) for rank in range(self._ranks) if not self._has_come(rank))
            self._store.add(f"{self._name}/come", -1)  # it may be tried again
            self._round -= 1
            raise RuntimeError(
                "state_dict() gathers what ranks have: call it on every rank, also where only one of them saves "
                f'(or use shard="none"). After {timeout:g} s timed out waiting for rank {missing}'
            ) from error

    def _mark(self, rank: int) -> str:
        return f"{self._name}/rank/{rank}"

    def _has_come(self, rank: int) -> bool:
        mark = self._mark(rank)
        return bool(self._store.check([mark])) and int(self._store.get(mark)) >= self._round


Entries = dict[int, dict[str, Tensor]]  # parameter number -> name -> [blocks, ...]


def collected(mine: Entries, devices: dict[int, torch.device]) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Yield a parameter's number, a rank, and what that rank holds of the parameter, on all ranks: one broadcast each.

    So no device has more at once than one rank has of one parameter.

    Args:
        mine: what this rank holds.
        devices: of each parameter.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = {i: {name: (tuple(x.shape), x.dtype) for name, x in named.items()} for i, named in mine.items()}
    heads = gathered(own, next(iter(devices.values())))
    for i in sorted(set().union(*heads)):
        for owner in (r for r, head in enumerate(heads) if i in head):
            ends = [0] * ranks
            slots = {name: _next(ends, owner, shape, dtype) for name, (shape, dtype) in heads[owner][i].items()}
            buffer = torch.empty(ends[owner], dtype=torch.uint8, device=devices[i])
            if owner == rank:
                for name, slot in slots.items():
                    slot.view(buffer, 0).copy_(mine[i][name])
            dist.broadcast(buffer, src=owner)
            yield i, owner, {name: slot.view(buffer, 0) for name, slot in slots.items()}
