"""Tensors to blocks and back: what is copied where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from caspr_cli.optim.blocks import Layout, Shape
from caspr_cli.optim.rows import Piece, local
from caspr_cli.optim.stacks import CHUNK, CHUNK_CPU

Rows = list[tuple[Piece, Tensor]]  # what arrived of a parameter's rows


def chunks(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """A few at a time, so that they stay in the cache."""
    run: list[Tensor] = []
    for p in params:
        if run and sum(local(q).numel() for q in run) + local(p).numel() > (
            CHUNK_CPU if p.device.type == "cpu" else CHUNK
        ):
            yield run
            run = []
        run.append(p)
    if run:
        yield run


def copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def fill(X: Tensor, members: list[Tensor], layouts: dict[Tensor, Layout], tensors: Sequence[Tensor | Rows]) -> None:
    """Copy the blocks of each parameter's tensor, or their rows, to their place in X ``[k, d_1, ..., d_k]``."""
    shape, rooms = tuple(X.shape[1:]), iter(X.unbind())
    targets, sources = [], []
    for p, tensor in zip(members, tensors, strict=True):
        blocks = [next(rooms) for _ in layouts[p].blocks[shape]]
        if isinstance(tensor, Tensor):
            targets += blocks
            sources += layouts[p].views(tensor, shape)
        else:
            here = [(x, rows) for x, rows in tensor if x.block == shape]
            targets += [blocks[x.number][x.rows] for x, _ in here]
            sources += [rows for _, rows in here]
    torch._foreach_copy_(targets, sources)


def fill_whole(X: Tensor, tensors: list[Tensor]) -> None:
    """The same where each tensor is one block, in one call."""
    torch.stack([t if t.shape == X.shape[1:] else t.reshape(X.shape[1:]) for t in tensors], out=X)


def placed(
    pieces: dict[Tensor, dict[Shape, Tensor]], layouts: dict[Tensor, Layout], into: dict[Tensor, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """What has to be changed by what: views of each tensor of ``into``, and the blocks that belong there."""
    targets, sources = [], []
    for p, shapes in pieces.items():
        layout, whole = layouts[p], into[p]
        if list(shapes) == [layout.shape]:  # one block
            targets.append(whole)
            sources.append(shapes[layout.shape].view(whole.shape))
        elif whole.is_contiguous():
            targets += [view for shape in shapes for view in layout.views(whole, shape)]
            sources += [block for blocks in shapes.values() for block in blocks.unbind()]
        else:  # of which a merged shape may be a copy
            first = next(iter(shapes.values()))
            together = first.new_empty(layout.shape)
            for shape, blocks in shapes.items():
                torch._foreach_copy_(layout.views(together.view(p.shape), shape), list(blocks.unbind()))
            targets.append(whole)
            sources.append(together.view(p.shape))
    return targets, sources
