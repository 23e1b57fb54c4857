"""Several ranks, one optimizer: who owns which block, and how updates and state reach everybody.

Under data parallelism every rank has the same gradients, so each computes the updates of its own blocks alone and gets
the others' by one collective. A block's statistics and roots are on its owner; moments, a number a weight, are where
the weights are. Where these are divided by rows, rows go to the owner of a block and back (`fsdp` says which).
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from caspr_cli.optim.fsdp import is_sharded, local, row_group, rows_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

ALIGNED = 64  # bytes: a view of any type may begin there, and matrix products are fastest
Factors = dict[int, dict[str, Tensor]]  # parameter number -> name -> [blocks, ...]

# torch 2.14 has renamed it.
all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def world_size() -> int:
    """Return the number of ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Team:
    """The ranks that share the work on some parameters. Numbers of ranks are those in the team, unless said."""

    def __init__(self, everyone: tuple[int, ...], group: Any = None) -> None:
        """
        Args:
            everyone: their numbers in the default process group, ascending.
            group: their process group, if there is one.
        """
        self.everyone, self.size = everyone, len(everyone)
        self.rank = everyone.index(dist.get_rank())
        self._group, self.barrier = group, Barrier(everyone)

    def part(self, size: int) -> Team:
        """Return the so many neighbours of which this rank is one.

        Raises:
            ValueError: there are not as many of them in each part.
        """
        if self.size % size:
            raise ValueError(f"group_size={size} does not divide the {self.size} ranks that have the same parameters")
        start = self.rank // size * size
        return self if size == self.size else Team(self.everyone[start : start + size])

    @property
    def group(self) -> Any:
        """Their process group; to make one they wait for each other."""
        if self._group is None:
            self._group = dist.new_group(list(self.everyone), use_local_synchronization=True)
        return self._group


class Parcel:
    """Places of the tensors that travel between the ranks of a team in one collective.

    Every rank asks for those of the same tensors in the same order. With ``to_all`` a rank sends the same to all, and
    all segments are as long as the longest. What is received is what was sent: where tensors travel in a lower type the
    owner, too, gets the rounded ones.
    """

    def __init__(self, ranks: int, *, to_all: bool) -> None:
        self.to_all = to_all
        self.to = [0] * ranks  # bytes to each rank; with ``to_all``, of each rank
        self.of = self.to if to_all else [0] * ranks

    def outgoing(self, rank: int, shape: Iterable[int], dtype: torch.dtype) -> Slot:
        """Return the place of what is sent to a rank; with ``to_all``, of what that rank sends to all."""
        return _next(self.to, rank, shape, dtype)

    def incoming(self, rank: int, shape: Iterable[int], dtype: torch.dtype) -> Slot:
        """Return the place of what is received from a rank."""
        return _next(self.of, rank, shape, dtype)

    @property
    def sent(self) -> int:
        return max(self.to) if self.to_all else sum(self.to)

    @property
    def received(self) -> int:
        """Bytes that this rank receives, its own included."""
        return len(self.of) * max(self.of) if self.to_all else sum(self.of)

    def starts(self) -> tuple[list[int], list[int]]:
        """Return where the segment of each rank begins in what is sent, and in what is received."""
        if self.to_all:
            return [0] * len(self.to), [rank * max(self.of) for rank in range(len(self.of))]
        return [0, *itertools.accumulate(self.to)], [0, *itertools.accumulate(self.of)]


class Channel:
    """The memory of a parcel that is on its way; it is kept for the next one."""

    def __init__(self, team: Team, device: torch.device) -> None:
        self.team, self.device = team, device
        self._sent = self._received = torch.empty(0, dtype=torch.uint8, device=device)
        self._work: Any = None
        self._parcel, self._starts = Parcel(team.size, to_all=True), ([0], [0])

    @property
    def bytes(self) -> int:
        return len(self._sent) + len(self._received)

    def open(self, parcel: Parcel) -> None:
        """Have room for a parcel, all of whose places are known."""
        self._parcel, self._starts = parcel, parcel.starts()
        if len(self._sent) < parcel.sent:
            self._sent = torch.zeros(parcel.sent, dtype=torch.uint8, device=self.device)
        if len(self._received) < parcel.received:
            self._received = torch.empty(parcel.received, dtype=torch.uint8, device=self.device)

    def mine(self, slot: Slot) -> Tensor:
        """Return the view of a slot to write to."""
        return slot.view(self._sent, self._starts[0][slot.rank] + slot.start)

    def read(self, slot: Slot) -> Tensor:
        return slot.view(self._received, self._starts[1][slot.rank] + slot.start)

    def send(self) -> None:
        """Start the collective; it runs beside what comes next."""
        parcel, group = self._parcel, self.team.group
        received, sent = self._received[: parcel.received], self._sent[: parcel.sent]
        if parcel.to_all:
            self._work = all_gather(received, sent, group=group, async_op=True)
        else:
            self._work = dist.all_to_all_single(received, sent, parcel.of, parcel.to, group=group, async_op=True)

    def wait(self) -> None:
        self._work.wait()


def _next(ends: list[int], rank: int, shape: Iterable[int], dtype: torch.dtype) -> Slot:
    """Return the next slot of a rank's segment."""
    slot = Slot(rank, ends[rank], tuple(shape), dtype)
    ends[rank] += -(-slot.size // ALIGNED) * ALIGNED
    return slot


@dataclass(frozen=True)
class Slot:
    """A tensor's place in a rank's segment."""

    rank: int
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, buffer: Tensor, start: int) -> Tensor:
        return buffer[start : start + self.size].view(self.dtype).view(self.shape)


def agree(params: list[Tensor], team: Team) -> None:
    """Refuse to share the work on parameters that are not the same on all ranks of a team.

    Compares types, shapes, and smallest and largest entries, which do not depend on an order of summation. Of what is
    divided by rows, whether each rank has as many as it should. Once.

    Raises:
        ValueError: the same on all ranks.
    """
    words = [(tuple(p.shape), str(p.dtype), _content(p, team.rank)) for p in params]
    everyone = gathered(hashlib.sha256(repr(words).encode()).hexdigest(), params[0].device, team)
    if different := [rank for rank, theirs in zip(team.everyone, everyone, strict=True) if theirs != everyone[0]]:
        raise ValueError(
            f"parameters of rank {different[0]} are not those of rank {team.everyone[0]}, so ranks cannot share the "
            "work on them: wrap the model in DistributedDataParallel; where ranks have different parts of a model (as "
            'pipeline stages are), pass process_group=, that of the ranks with the same; or use shard="none"'
        )


def gathered(mine: object, device: torch.device, team: Team) -> list[Any]:
    """Return what each rank of a team has given, in the order of ranks.

    With NCCL it goes by this device: the current one is that of all ranks where nobody has set it.
    """
    everyone: list[Any] = [None] * team.size
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        dist.all_gather_object(everyone, mine, group=team.group)
    return everyone


def _content(p: Tensor, rank: int) -> list[float]:
    """Return what should be the same on all ranks; of rows, nothing unless their number is wrong."""
    if not is_sharded(p):
        return [float(end) for end in torch.aminmax(p.detach())]
    rows, here = rows_of(p, p.shape[0])[rank], local(p)
    return [] if here.shape[0] == rows.stop - rows.start else [float(here.shape[0])]


def summed(squares: dict[DTensor, Tensor]) -> dict[Tensor, Tensor]:
    """Return sums over ranks of numbers (float64, of one shape) that each has of its rows: a collective for each device
    and process group."""
    together: dict[tuple[torch.device, Any], list[DTensor]] = defaultdict(list)  # in the same order on all ranks
    for p in squares:
        together[p.device, row_group(p)].append(p)
    totals: dict[Tensor, Tensor] = {}
    for (_, group), here in together.items():
        total = torch.stack([squares[p] for p in here])
        dist.all_reduce(total, group=group)
        totals |= zip(here, total.unbind(), strict=True)
    return totals


class Barrier:
    """A barrier that raises an error if not all of some ranks come in time. They make theirs in the same order.

    They meet in the store in which they met first, so it needs no network but the one that is there.
    """

    def __init__(self, everyone: tuple[int, ...]) -> None:
        self._world, self._store = dist.group.WORLD, dist.distributed_c10d._get_default_store()
        self._rank, self._everyone, self._round = dist.get_rank(), everyone, 0
        team = f"caspr/{hashlib.sha256(repr(everyone).encode()).hexdigest()[:16]}"
        self._name = f"{team}/{self._store.add(f'{team}/barriers/{self._rank}', 1)}"

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
        if self._store.add(f"{self._name}/come", 1) == len(self._everyone) * self._round:
            self._store.set(everyone, "")
        try:
            self._store.wait([everyone], datetime.timedelta(seconds=timeout))
        except RuntimeError as error:
            missing = ", ".join(str(rank) for rank in self._everyone if not self._has_come(rank))
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


def collected(
    mine: Factors, devices: dict[int, torch.device], team: Team
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Yield a parameter's number, a rank, and what that rank holds of the parameter, on all ranks of a team: one
    broadcast each.

    So no device has more at once than one rank has of one parameter.

    Args:
        mine: what this rank holds.
        devices: of each parameter.
    """
    own = {i: {name: (tuple(x.shape), x.dtype) for name, x in named.items()} for i, named in mine.items()}
    heads = gathered(own, next(iter(devices.values())), team)
    for i in sorted(set().union(*heads)):
        for owner in (r for r, head in enumerate(heads) if i in head):
            ends = [0] * team.size
            slots = {name: _next(ends, owner, shape, dtype) for name, (shape, dtype) in heads[owner][i].items()}
            buffer = torch.empty(ends[owner], dtype=torch.uint8, device=devices[i])
            if owner == team.rank:
                for name, slot in slots.items():
                    slot.view(buffer, slot.start).copy_(mine[i][name])
            dist.broadcast(buffer, src=team.everyone[owner], group=team.group)
            yield i, owner, {name: slot.view(buffer, slot.start) for name, slot in slots.items()}
