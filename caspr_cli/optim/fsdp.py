"""Parameters whose rows are divided among ranks, as `torch.distributed.fsdp.fully_shard` does it.

Each rank holds some neighbouring rows. A block is preconditioned whole by the rank that owns it, so rows of gradients
and momenta go from their sharding to the owners, and rows of updates the other way: this module says which.
Numbers are in `shard.AllToAllBuffer`.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

from caspr_cli.optim.blocks import Layout, Shape

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor. (Importing them takes a second, and who has none need not wait for it.)"""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether one of them is a DTensor."""
    return "torch.distributed.tensor" in sys.modules and any(map(is_sharded, tensors))


def locals_of(tensors: list[Tensor], sharded: bool) -> list[Tensor]:
    """Return the part of each tensor that is on this rank; ``sharded`` says whether one of them may be a DTensor."""
    return [local(t) for t in tensors] if sharded else tensors


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is on this rank: all of it unless it is a DTensor. A view, no communication."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def check_placements(p: Tensor, ranks: int) -> None:
    """Refuse a DTensor that is not divided by rows among all ranks.

    Raises:
        ValueError: the same on all ranks.
    """
    if not is_sharded(p):
        return
    from torch.distributed.tensor import Replicate, Shard

    rows = [x for x in p.placements if type(x) is Shard and x.dim == 0]
    copies = [x for x in p.placements if isinstance(x, Replicate)]
    everyone = sorted(p.device_mesh.mesh.flatten().tolist()) == list(range(ranks))
    if len(rows) != 1 or len(rows) + len(copies) != len(p.placements) or not everyone:
        placements = ", ".join(map(str, p.placements))
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} with placements ({placements}) over {p.device_mesh.size()} of "
            f"{ranks} ranks cannot be preconditioned: use fully_shard over all ranks, which divides rows (Shard(0)), "
            "or torch.optim.AdamW for it"
        )


@dataclass(frozen=True)
class RowSharding:
    """Which rows of axis 0 each rank has, and which copy of the tensor they are part of (0 but for replicas)."""

    rows: list[slice]
    copy: list[int]

    @classmethod
    def of(cls, p: DTensor, size: int) -> RowSharding:
        """
        Args:
            size: of axis 0, of p or of what its axes are merged to.
        """
        from torch.distributed.tensor import Shard

        axis = next(i for i, x in enumerate(p.placements) if isinstance(x, Shard))
        mesh = p.device_mesh.mesh.movedim(axis, -1).reshape(-1, p.device_mesh.shape[axis]).tolist()
        rows, copy = [slice(0, 0)] * p.device_mesh.size(), [0] * p.device_mesh.size()
        each = size // max(1, p.shape[0])  # of a row of p: axes that are merged are neighbours
        for number, ranks in enumerate(mesh):
            for rank, part in zip(ranks, shard_rows(p.shape[0], len(ranks)), strict=True):
                rows[rank] = slice(part.start * each, part.stop * each)
                copy[rank] = number
        return cls(rows, copy)


def shard_rows(size: int, ranks: int) -> list[slice]:
    """Return the rows of each rank, as in torch: ceil(size / ranks) rows each, until there are none left."""
    each = -(-size // ranks)
    return [slice(min(r * each, size), min((r + 1) * each, size)) for r in range(ranks)]


@dataclass(frozen=True)
class BlockShard:
    """The rows of a block that one rank holds."""

    holder: int
    owner: int
    same_copy: bool  # of the tensor: an owner asks its own copy alone for rows, and sends its updates to all
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
        sharding = RowSharding.of(p, layout.shape[0])
        shards = [x for x in block_shards(layout, owners, sharding) if rank in (x.holder, x.owner)]
        mine = sharding.rows[rank]
        held = (mine.stop - mine.start, *layout.shape[1:])
        here = Layout(held, layout.axes, {held: [tuple(slice(0, d) for d in held)]}, {held: [0]}, (held,))
        return cls(here, [x for x in shards if x.holder == rank], [x for x in shards if x.owner == rank])


def block_shards(layout: Layout, owners: dict[Shape, list[int]], sharding: RowSharding) -> list[BlockShard]:
    """Return the parts of all blocks that ranks hold, in an order that is the same on all ranks."""
    shards = []
    for shape in layout.shapes:
        counts: dict[int, int] = defaultdict(int)
        for block, owner in zip(layout.blocks[shape], owners[shape], strict=True):
            for holder, mine in enumerate(sharding.rows):
                start, stop = max(block[0].start, mine.start), min(block[0].stop, mine.stop)
                if start < stop:
                    rows = slice(start - block[0].start, stop - block[0].start)
                    cut = (slice(start - mine.start, stop - mine.start), *block[1:])
                    same = sharding.copy[holder] == sharding.copy[owner]
                    size = (stop - start, *shape[1:])
                    shards.append(BlockShard(holder, owner, same, size, shape, counts[owner], rows, cut))
            counts[owner] += 1
    return shards


def is_counted(p: Tensor) -> bool:
    """Whether what this rank holds counts where something is summed over ranks: of replicas, the first alone."""
    if not is_sharded(p):
        return True
    at = p.device_mesh.get_coordinate()
    return at is not None and not any(i for i, x in zip(at, p.placements, strict=True) if x.is_replicate())


def distribute(whole: Tensor, p: DTensor, rank: int) -> DTensor:
    """Return this rank's rows of a tensor of p's shape that every rank has, as a DTensor like p."""
    from torch.distributed.tensor import DTensor

    rows = whole[RowSharding.of(p, p.shape[0]).rows[rank]].to(p.device, copy=True)
    return DTensor.from_local(rows, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
