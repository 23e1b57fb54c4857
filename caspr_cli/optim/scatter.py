"""Copies between tensors and blocks, and the workspace that a step computes in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from caspr_cli.optim.blocks import Layout, Shape
from caspr_cli.optim.device import sent
from caspr_cli.optim.fsdp import BlockShard, local
from caspr_cli.optim.stacks import CHUNK, CHUNK_CPU, Stack

MOST_CONSTANTS = 1024

ReceivedRows = list[tuple[BlockShard, Tensor]]  # rows of a parameter that other ranks sent
Rows = dict[Tensor, ReceivedRows]  # of parameters that are divided by rows, for the blocks that this rank owns


class Workspace:
    """Flat buffers by use, type and device, kept from step to step: fresh memory costs more than what is done in it.

    What is larger than a chunk (a parameter that is) gets memory of its own, and gives it back.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._constants: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}

    def flat(self, use: str, size: int, like: Tensor) -> Tensor:
        """Return ``[size]`` of the type and device of ``like``, not initialized."""
        limit = CHUNK_CPU if like.device.type == "cpu" else CHUNK
        if size > limit:
            return torch.empty(size, dtype=like.dtype, device=like.device)
        key = (use, like.dtype, like.device)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._buffers[key][:size]

    def constant(self, values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return ``[n]`` of numbers that are the same in many steps: sent to the device once."""
        key = (tuple(values), dtype, device)
        if key not in self._constants:
            if len(self._constants) >= MOST_CONSTANTS:
                self._constants.clear()
            self._constants[key] = sent(torch.tensor(values, dtype=dtype, device="cpu"), device)
        return self._constants[key]

    def chosen(self, values: Tensor, places: list[int]) -> Tensor:
        """Return those of ``values`` ``[n]`` that are at these places: a view where they are neighbours."""
        if places == list(range(places[0], places[0] + len(places))):
            return values[places[0] : places[0] + len(places)]
        return values[self.constant(places, torch.int64, values.device)]

    def like(self, use: str, tensors: list[Tensor]) -> list[Tensor]:
        """Return zeros of the shapes, type and device of these."""
        sizes = [t.numel() for t in tensors]
        flat = self.flat(use, sum(sizes), tensors[0]).zero_()
        if len({t.shape for t in tensors}) == 1:
            return list(flat.view(len(tensors), *tensors[0].shape).unbind())
        return [x.view(t.shape) for x, t in zip(flat.split(sizes), tensors, strict=True)]

    def blocks(self, stack: Stack, rows: slice) -> tuple[Tensor, Tensor]:
        """Return two tensors ``[k, d_1, ..., d_k]`` for these rows of a stack: for an input, and for results."""
        shape = (rows.stop - rows.start, *stack.shape)
        size = torch.Size(shape).numel()
        return self.flat("input", size, stack.scale).view(shape), self.flat("output", size, stack.scale).view(shape)


def chunks(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield a few at a time, so that they stay in the cache."""
    run: list[Tensor] = []
    total = 0
    for p in params:
        size = local(p).numel()
        if run and total + size > (CHUNK_CPU if p.device.type == "cpu" else CHUNK):
            yield run
            run, total = [], 0
        run.append(p)
        total += size
    if run:
        yield run


def copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source to its target."""
    if targets:
        torch._foreach_copy_(targets, sources)


def add(targets: list[Tensor], sources: list[Tensor], factor: float | Tensor) -> None:
    """Add this multiple of each source to its target.

    Columns of a tensor go apart: where one tensor is not dense, a GPU takes all of a call one by one.
    """
    if isinstance(factor, Tensor):
        sources, factor = list(torch._foreach_mul(sources, factor)), 1.0
    for dense in (True, False):
        some = [(t, u) for t, u in zip(targets, sources, strict=True) if t.is_contiguous() is dense]
        if some:
            torch._foreach_add_([t for t, _ in some], [u for _, u in some], alpha=factor)


def fill(
    X: Tensor, members: list[Tensor], layouts: dict[Tensor, Layout], tensors: Sequence[Tensor | ReceivedRows]
) -> None:
    """Copy the blocks of each parameter's tensor, or their rows, to their place in X ``[k, d_1, ..., d_k]``."""
    shape, places = tuple(X.shape[1:]), iter(X.unbind())
    targets, sources = [], []
    for p, tensor in zip(members, tensors, strict=True):
        blocks = [next(places) for _ in layouts[p].blocks[shape]]
        if isinstance(tensor, Tensor):
            targets += blocks
            sources += layouts[p].views(tensor, shape)
        else:
            here = [(x, rows) for x, rows in tensor if x.block == shape]
            targets += [blocks[x.number][x.rows] for x, _ in here]
            sources += [rows for _, rows in here]
    torch._foreach_copy_(targets, sources)


def placed(
    pieces: dict[Tensor, dict[Shape, Tensor]], layouts: dict[Tensor, Layout], into: dict[Tensor, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what has to be changed by what: views of each tensor of ``into``, and the blocks that belong there."""
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
