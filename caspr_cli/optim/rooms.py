"""Memory for what a step computes on the way, kept from step to step."""

from __future__ import annotations

import torch
from torch import Tensor

from caspr_cli.optim.stacks import CHUNK, CHUNK_CPU, Stack


class Rooms:
    """Flat buffers by use, type and device. Fresh memory from the system costs more than what is done in it.

    What is larger than a chunk (a parameter that is) gets memory of its own, and gives it back.
    """

    def __init__(self) -> None:
        self._rooms: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def flat(self, use: str, size: int, like: Tensor) -> Tensor:
        """``[size]`` of the type and device of ``like``, with anything in it."""
        limit = CHUNK_CPU if like.device.type == "cpu" else CHUNK
        if size > limit:
            return torch.empty(size, dtype=like.dtype, device=like.device)
        key = (use, like.dtype, like.device)
        if key not in self._rooms or self._rooms[key].numel() < size:
            self._rooms[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._rooms[key][:size]

    def like(self, use: str, tensors: list[Tensor]) -> list[Tensor]:
        """Zeros of the shapes of these, and of their type and device."""
        sizes = [t.numel() for t in tensors]
        flat = self.flat(use, sum(sizes), tensors[0]).zero_()
        if len({t.shape for t in tensors}) == 1:
            return list(flat.view(len(tensors), *tensors[0].shape).unbind())
        return [x.view(t.shape) for x, t in zip(flat.split(sizes), tensors, strict=True)]

    def blocks(self, stack: Stack, rows: slice) -> tuple[Tensor, Tensor]:
        """Two tensors ``[k, d_1, ..., d_k]`` for these rows of a stack."""
        shape = (rows.stop - rows.start, *stack.shape)
        size = torch.Size(shape).numel()
        return self.flat("blocks", size, stack.scale).view(shape), self.flat("spare", size, stack.scale).view(shape)
