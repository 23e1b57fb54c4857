"""Who owns which block, and which updates travel together: pure functions of shapes, the same on all ranks."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from caspr_cli.optim.blocks import Shape
from caspr_cli.optim.schedule import EIGH_FLOPS

# Updates travel so many bytes at a time, or one block of each rank: two such buckets are in memory.
BUCKET = 2**28

# Groups of ranks are not larger than MOST, where nothing else is said, nor so large that what a rank receives is more
# than PADDED times the updates; but they are not smaller than LEAST for that.
MOST, LEAST, PADDED = 64, 8, 1.1

Block = tuple[Shape, Shape, tuple[int, int]]  # shape, lengths of the axes with statistics, (param group, turn) of roots


@dataclass
class Loads:
    """The work of each rank: FLOPs of every step, and of the roots whose turn is one step of an interval."""

    ranks: int
    root: float = EIGH_FLOPS  # FLOPs of a root over d^3
    always: list[float] = field(init=False)
    roots: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # (param group, phase) -> FLOPs

    def __post_init__(self) -> None:
        self.always = [0.0] * self.ranks

    def add(self, shape: Shape, sizes: Shape, turn: tuple[int, int], owner: int) -> None:
        self.always[owner] += _step_flops(shape, sizes)
        self.roots.setdefault(turn, [0.0] * self.ranks)[owner] += self.root * sum(d**3 for d in sizes)

    def assign(self, blocks: Sequence[Block]) -> list[int]:
        """Return the owner of each block of a bucket.

        The most expensive first, each to the rank whose step, refresh included, is then the shortest: products cost
        6 m n (m + n) FLOPs in every step, roots ``root`` (m^3 + n^3) in one of an interval. But no rank has more
        numbers than the largest block times its share of the blocks: all send as much as the one that sends most.
        Blocks that were assigned before stay where they are. A pure function of the calls so far: all ranks come to
        the same.
        """
        owners, ends, queues = [0] * len(blocks), [0] * self.ranks, dict[tuple[int, int], _Queue]()
        most = -(-len(blocks) // self.ranks) * max(math.prod(shape) for shape, *_ in blocks)
        for i in sorted(range(len(blocks)), key=lambda i: -_step_flops(*blocks[i][:2])):
            shape, sizes, turn = blocks[i]
            roots, size = self.roots.setdefault(turn, [0.0] * self.ranks), math.prod(shape)
            if turn not in queues:
                queues[turn] = _Queue(self.always, roots)
            owners[i] = queues[turn].first(ends, most - size)
            ends[owners[i]] += size
            self.add(shape, sizes, turn, owners[i])
        return owners


class _Queue:
    """The ranks by the length of their step in one turn of roots, which only grows."""

    def __init__(self, always: list[float], roots: list[float]) -> None:
        self.always, self.roots = always, roots
        self._waiting = [self._place(rank) for rank in range(len(always))]
        self._full: list[int] = []  # ranks that had more numbers than the last limit
        self._limit = 0
        heapq.heapify(self._waiting)

    def _place(self, rank: int) -> tuple[float, float, int]:
        return self.always[rank] + self.roots[rank], self.always[rank], rank

    def first(self, ends: list[int], limit: int) -> int:
        """Return the rank with the shortest step of those that have at most ``limit`` numbers already."""
        if limit > self._limit:  # a smaller block: some of them may take it
            for rank in self._full:
                heapq.heappush(self._waiting, self._place(rank))
            self._full = []
        self._limit = limit
        while True:
            place = self._waiting[0]
            rank = place[2]
            if ends[rank] > limit:
                self._full.append(rank)
                heapq.heappop(self._waiting)
            elif place != self._place(rank):  # it has got longer
                heapq.heapreplace(self._waiting, self._place(rank))
            else:
                return rank


APPLIED = 2 / 3  # what part of the next is application


def _step_flops(shape: Shape, sizes: Shape) -> float:
    """Return the FLOPs of statistics and of the application of two passes, without roots."""
    return 6.0 * math.prod(shape) * sum(sizes)


def buckets(sizes: Sequence[int], ranks: int) -> Iterator[range]:
    """Yield runs of neighbours of at most ``BUCKET`` bytes together, but for the last of as many for each rank."""
    start = 0
    while start < len(sizes):
        stop, total = start, 0
        while stop < len(sizes) and (stop == start or total + sizes[stop] <= BUCKET):
            total += sizes[stop]
            stop += 1
        if stop < len(sizes):
            stop = min(start + max((stop - start) // ranks, 1) * ranks, len(sizes))
        yield range(start, stop)
        start = stop


def deal(blocks: Sequence[Block], sizes: Sequence[int], loads: Loads) -> list[int]:
    """Return the owner of each block, given their bytes too."""
    return [owner for run in buckets(sizes, loads.ranks) for owner in loads.assign([blocks[i] for i in run])]


def received(sizes: Sequence[int], owners: Sequence[int], ranks: int) -> list[int]:
    """Return the bytes of each bucket that every rank receives in a step: its segments are as long as the longest."""
    found = []
    for run in buckets(sizes, ranks):
        ends = [0] * ranks
        for i in run:
            ends[owners[i]] += sizes[i]
        found.append(ranks * max(ends))
    return found


def group_size(blocks: Sequence[Block], sizes: Sequence[int], ranks: int) -> int:
    """Return how many neighbouring ranks share the work on these blocks: a divisor of the number of ranks.

    Other groups do the same work beside them. More ranks than that would save little and receive much.
    """
    choices = [n for n in range(min(ranks, MOST), LEAST - 1, -1) if ranks % n == 0] or [ranks]

    def padded(n: int) -> bool:
        return sum(received(sizes, deal(blocks, sizes, Loads(n)), n)) > PADDED * sum(sizes)

    return next((n for n in choices[:-1] if not padded(n)), choices[-1])
