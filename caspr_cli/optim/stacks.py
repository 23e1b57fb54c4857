"""Same-shape blocks of many parameters, side by side in memory, so that one batched product serves them all."""

from __future__ import annotations

from collections.abc import Iterator
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
    total: Tensor  # [K], weights of all gradients in S
    rows: dict[Tensor, slice] = field(default_factory=dict)
    rooted: set[Tensor] = field(default_factory=set)  # parameters whose roots have been computed

    @classmethod
    def empty(cls, shape: Shape, K: int, dtype: torch.dtype, device: torch.device) -> Stack:
        def new(*size: int) -> Tensor:
            return torch.zeros(K, *size, dtype=dtype, device=device)

        return cls(new(*shape), [new(d, d) for d in shape], [new(d, d) for d in shape], new(), new(), new())

    def state(self, p: Tensor, part: int) -> dict[str, Tensor]:
        """What belongs to p, as views: the entries of ``optimizer.state[p]``. ``part`` counts p's block shapes."""
        rows, named = self.rows[p], {"scale": self.scale, "root_scale": self.root_scale, "total": self.total}
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

    def parts(self, params: list[Tensor]) -> Iterator[Stack]:
        """Views of the rows of these parameters (in the stack's order), one for each run of neighbours.

        Usually the whole stack; it falls apart where parameters between have no gradient. Nothing is copied.
        """
        start = 0
        for i, p in enumerate(params):
            if i + 1 < len(params) and self.rows[params[i + 1]].start == self.rows[p].stop:
                continue
            run = params[start : i + 1]
            start, first = i + 1, self.rows[run[0]].start
            rows = {q: slice(self.rows[q].start - first, self.rows[q].stop - first) for q in run}
            at = slice(first, self.rows[p].stop)
            S, A = [S_i[at] for S_i in self.S], [A_i[at] for A_i in self.A]
            scales = self.scale[at], self.root_scale[at], self.total[at]
            yield Stack(self.buffer[at], S, A, *scales, rows, self.rooted)

    def is_in(self, state: dict[Tensor, dict[str, Tensor]], p: Tensor, layout: Layout) -> bool:
        """Whether ``state`` still holds the views of this stack: a loop that moves state elsewhere replaces them."""
        part = list(layout.blocks).index(tuple(self.buffer.shape[1:]))
        view = state.get(p, {}).get(f"scale.{part}")
        return view is not None and view.data_ptr() == self.scale[self.rows[p]].data_ptr()


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
                            f"but has {tuple(old.shape)}: block_size or merge were others when it was made"
                        )
                    view.copy_(old)
                    if name.startswith("root_") and bool(view.any()):  # waits for the device, once a rebuild
                        stack.rooted.add(p)
                state[p][name] = view
        stacks.append(stack)
    return stacks
