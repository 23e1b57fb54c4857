"""Same-shape blocks of many parameters, side by side in memory, so that one batched product serves them all."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from caspr_cli.optim.blocks import Layout, Shape


@dataclass
class Stack:
    """K blocks of one shape. ``rows[p]`` are the blocks of parameter p, in the order of its layout."""

    buffer: Tensor  # [K, d_1, ..., d_k]: gradients, then what is preconditioned
    S: list[Tensor]  # statistics over scale^2, [K, d_i, d_i]
    A: list[Tensor]  # roots in units of root_scale, [K, d_i, d_i]
    scale: Tensor  # [K]
    root_scale: Tensor  # [K], 0 where there is no scale yet
    rows: dict[Tensor, slice] = field(default_factory=dict)

    @classmethod
    def empty(cls, shape: Shape, K: int, dtype: torch.dtype, device: torch.device) -> Stack:
        def new(*size: int) -> Tensor:
            return torch.zeros(K, *size, dtype=dtype, device=device)

        return cls(new(*shape), [new(d, d) for d in shape], [new(d, d) for d in shape], new(), new())

    def state(self, p: Tensor, part: int) -> dict[str, Tensor]:
        """What belongs to p, as views: the entries of ``optimizer.state[p]``. ``part`` counts p's block shapes."""
        rows, named = self.rows[p], {"scale": self.scale, "root_scale": self.root_scale}
        for axis, (S_i, A_i) in enumerate(zip(self.S, self.A, strict=True)):
            named[f"statistics_{axis}"] = S_i
            named[f"root_{axis}"] = A_i
        return {f"{name}.{part}": tensor[rows] for name, tensor in named.items()}

    def fill(self, layouts: dict[Tensor, Layout], tensors: dict[Tensor, Tensor]) -> None:
        """Copy the blocks of each tensor (of its parameter's shape) to their place in the buffer."""
        shape = tuple(self.buffer.shape[1:])
        sources = [b for p, t in tensors.items() for b in layouts[p].views(t, shape)]
        targets = [b for p in tensors for b in self.buffer[self.rows[p]].unbind()]
        torch._foreach_copy_(targets, sources)

    def take(self, params: list[Tensor]) -> tuple[Stack, Tensor | None]:
        """The stack of these parameters alone, and the indices of its rows (None: all, nothing was copied)."""
        if len(params) == len(self.rows):
            return self, None
        index = torch.cat([torch.arange(self.rows[p].start, self.rows[p].stop) for p in params])
        index = index.to(self.scale.device)
        rows, start = {}, 0
        for p in params:
            length = self.rows[p].stop - self.rows[p].start
            rows[p] = slice(start, start + length)
            start += length
        part = Stack(
            self.buffer[index],
            [S_i[index] for S_i in self.S],
            [A_i[index] for A_i in self.A],
            self.scale[index],
            self.root_scale[index],
            rows,
        )
        return part, index

    def put(self, part: Stack, index: Tensor | None) -> None:
        """Write back what :meth:`take` gave."""
        if index is None:
            return
        for mine, theirs in zip(
            [*self.S, *self.A, self.scale, self.root_scale],
            [*part.S, *part.A, part.scale, part.root_scale],
            strict=True,
        ):
            mine[index] = theirs


def build_stacks(
    params: list[Tensor],
    layouts: dict[Tensor, Layout],
    dtypes: dict[Tensor, torch.dtype],
    state: dict[Tensor, dict[str, Tensor]],
) -> list[Stack]:
    """Stack the blocks of ``params``; factors already in ``state`` are copied in, and ``state`` becomes views.

    Raises:
        ValueError: a factor in ``state`` has another shape than the options call for.
    """
    counts: dict[tuple[Shape, torch.dtype, torch.device], list[tuple[Tensor, int, int]]] = {}
    for p in params:
        for part, (shape, blocks) in enumerate(layouts[p].blocks.items()):
            counts.setdefault((shape, dtypes[p], p.device), []).append((p, part, len(blocks)))
    stacks = []
    for (shape, dtype, device), members in counts.items():
        stack = Stack.empty(shape, sum(n for *_, n in members), dtype, device)
        start = 0
        for p, part, n in members:
            stack.rows[p] = slice(start, start + n)
            start += n
            for name, view in stack.state(p, part).items():
                old = state[p].get(name)
                if old is not None:
                    if old.shape != view.shape:
                        raise ValueError(
                            f"{name} of a parameter of shape {tuple(p.shape)} should have shape {tuple(view.shape)} "
                            f"but has {tuple(old.shape)}: was it saved with another block_size or merge?"
                        )
                    view.copy_(old)
                state[p][name] = view
        stacks.append(stack)
    return stacks
