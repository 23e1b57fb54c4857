"""Parameters whose rows are divided among ranks, as `torch.distributed.fsdp.fully_shard` does it.

Each rank holds some neighbouring rows. A block is preconditioned whole by the rank that owns it, so rows of gradients
and momenta go from their sharding to the owners, and rows of updates the other way: this module says which.
Numbers are in `shard.Parcel`.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch.distributed as dist
from torch import Tensor

from caspr_cli.optim.blocks import Layout, Shape

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor. (Importing them takes a second, and who has none need not wait for it.)"""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def locals_of(tensors: list[Tensor], sharded: bool) -> list[Tensor]:
    """Return the part of each tensor that is on this rank; ``sharded`` says whether one of them may be a DTensor."""
    return [local(t) for t in tensors] if sharded else tensors


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is on this rank: all of it unless it is a DTensor. A view, no communication."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def check_placements(p: Tensor) -> None:
    """Refuse a DTensor that is not divided by rows, and by nothing else.

    Raises:
        ValueError: the same on all ranks, but for one that is not there.
    """
    if not is_sharded(p):
        return
    if p.device_mesh.get_coordinate() is None:
        raise ValueError(f"a parameter of shape {tuple(p.shape)} has nothing on this rank: leave it to its own ranks")
    from torch.distributed.tensor import Replicate, Shard

    rows = [x for x in p.placements if type(x) is Shard and x.dim == 0]
    copies = [x for x in p.placements if isinstance(x, Replicate)]
    if len(rows) != 1 or len(rows) + len(copies) != len(p.placements):
        placements = ", ".join(map(str, p.placements))
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} with placements ({placements}) cannot be preconditioned: "
            "fully_shard divides rows (Shard(0)), with or without replicas, and that is what can be; tensor "
            "parallelism that divides columns, or rows twice, is not. Use torch.optim.AdamW for it"
        )


def _row_axis(p: DTensor) -> int:
    return next(i for i, x in enumerate(p.placements) if not x.is_replicate())


def is_replica(p: Tensor) -> bool:
    """Whether rows of a DTensor are on a rank that has them as an earlier one does (HSDP)."""
    if not is_sharded(p):
        return False
    place = p.device_mesh.get_coordinate() or ()
    return any(i > 0 and x.is_replicate() for i, x in zip(place, p.placements, strict=True))


def row_group(p: DTensor) -> Any:
    """Return the process group of the ranks among which the rows of p are divided: replicas have others."""
    return p.device_mesh.get_group(_row_axis(p))


def rows_of(p: DTensor, size: int) -> list[slice]:
    """Return which rows of axis 0 each rank of the :func:`row_group` has.

    Args:
        size: of axis 0, of p or of what its axes are merged to.
    """
    axis, mesh = _row_axis(p), p.device_mesh
    at: list[Any] = list(mesh.get_coordinate() or ())
    at[axis] = slice(None)
    ranks = mesh.mesh[tuple(at)].tolist()
    parts = dict(zip(ranks, shard_rows(p.shape[0], len(ranks)), strict=True))
    each = size // max(1, p.shape[0])  # of a row of p: axes that are merged are neighbours
    in_order = [parts[rank] for rank in dist.get_process_group_ranks(row_group(p))]
    return [slice(part.start * each, part.stop * each) for part in in_order]


def shard_rows(size: int, ranks: int) -> list[slice]:
    """Return the rows of each rank, as in torch: ceil(size / ranks) rows each, until there are none left."""
    each = -(-size // ranks)
    return [slice(min(r * each, size), min((r + 1) * each, size)) for r in range(ranks)]


@dataclass(frozen=True)
class BlockShard:
    """The rows of a block that one rank holds."""

    holder: int
    owner: int
    shape: Shape
    block: Shape  # the shape of the block
    number: int  # index of the block among its owner's blocks of this shape
    rows: slice  # of the block
    cut: tuple[slice, ...]  # where they are in what the holder has


@dataclass(frozen=True)
class TransferPlan:
    """What one rank sends and receives of the rows of a parameter."""

    layout: Layout  # of the rows that this rank holds: one block
    held: list[BlockShard]  # rows on this rank, of blocks of any owner
    owned: list[BlockShard]  # rows of the blocks that this rank owns, on any rank

    @classmethod
    def of(cls, p: DTensor, layout: Layout, owners: dict[Shape, list[int]], rank: int) -> TransferPlan:
        rows = rows_of(p, layout.shape[0])
        shards = block_shards(layout, owners, rows, rank)
        held = (rows[rank].stop - rows[rank].start, *layout.shape[1:])
        here = Layout(held, layout.axes, {held: [tuple(slice(0, d) for d in held)]}, {held: [0]}, (held,))
        return cls(here, [x for x in shards if x.holder == rank], [x for x in shards if x.owner == rank])


def block_shards(layout: Layout, owners: dict[Shape, list[int]], rows: list[slice], rank: int) -> list[BlockShard]:
    """Return the parts of all blocks that a rank holds or owns, in an order that is the same on all ranks."""
    shards = []
    holders = sorted((part.stop, part.start, holder) for holder, part in enumerate(rows) if part.start < part.stop)
    for shape in layout.shapes:
        counts: dict[int, int] = defaultdict(int)
        for block, owner in zip(layout.blocks[shape], owners[shape], strict=True):
            at = bisect_right(holders, (block[0].start, math.inf, 0)) if owner == rank else len(holders)
            near = holders[at:] if owner == rank else [(rows[rank].stop, rows[rank].start, rank)]
            for end, begin, holder in near:
                start, stop = max(block[0].start, begin), min(block[0].stop, end)
                if start >= stop:
                    break
                part = slice(start - block[0].start, stop - block[0].start)
                cut = (slice(start - begin, stop - begin), *block[1:])
                size = (stop - start, *shape[1:])
                shards.append(BlockShard(holder, owner, size, shape, counts[owner], part, cut))
            counts[owner] += 1
    return shards


def distribute(whole: Tensor, p: DTensor) -> DTensor:
    """Return this rank's rows of a tensor of p's shape that every rank has, as a DTensor like p."""
    from torch.distributed.tensor import DTensor

    rows = whole[rows_of(p, p.shape[0])[dist.get_rank(row_group(p))]].to(p.device, copy=True)
    return DTensor.from_local(rows, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
