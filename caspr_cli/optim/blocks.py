"""From a parameter's shape to the blocks that are preconditioned.

A parameter is first seen with fewer axes (:func:`merge_axes`), then cut along each axis into parts of nearly
equal size, of which all axes or one have statistics (:class:`Layout`). Nothing here touches data: a layout is a pure
function of shape and options.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass

from torch import Tensor

Shape = tuple[int, ...]
# An axis of a block that is longer than the first, and than the second times the product of the others, has no
# statistics: they would have many times the numbers of the block.
LONG, TIMES = 256, 8


def merge_axes(shape: Shape, merge: str) -> Shape:
    """The axes along which statistics are kept.

    ``matrix``: a matrix stays as it is; a tensor of higher rank loses its axes of size one, and what is left
    is a vector, a matrix, or (d_0, product of the rest), as in the paper: (m, n, k) -> (m, n k).
    ``square``: the same, but a tensor of rank above two is split into two groups of neighbouring axes at the
    place where the sizes of the two are nearest, the cheapest matrix: (8, 64, 512) -> (512, 512).
    ``none``: every axis by itself. ``flatten``: one axis (full-matrix Adagrad).
    A scalar has one axis of size one.
    """
    if not shape:
        return (1,)
    if merge == "flatten":
        return (math.prod(shape),)
    if merge == "none" or len(shape) <= 2:
        return shape
    shape = tuple(d for d in shape if d != 1) or (1,)
    if len(shape) <= 2:
        return shape
    cut = 1
    if merge == "square":
        # m n is the same for every cut, so the least m + n is also the least work m n (m + n).
        cut = min(range(1, len(shape)), key=lambda i: math.prod(shape[:i]) + math.prod(shape[i:]))
    return math.prod(shape[:cut]), math.prod(shape[cut:])


def is_vector(shape: Shape) -> bool:
    """Whether at most one axis is longer than one: (N,), (N, 1), (1, N, 1) and a scalar are."""
    return sum(d > 1 for d in shape) <= 1


def split_axis(size: int, block_size: int) -> list[slice]:
    """Cut an axis into the fewest parts of at most ``block_size``, of sizes that differ by at most one.

    1100 at 1024 is 550 + 550, not 1024 + 76: there are few distinct shapes to batch and no thin blocks.
    """
    parts = math.ceil(size / block_size)
    small, larger = divmod(size, parts)
    ends = list(itertools.accumulate(small + (i < larger) for i in range(parts)))
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True)
class Layout:
    """How one parameter is cut: its merged shape, and for each distinct block shape the blocks that have it."""

    shape: Shape
    axes: tuple[int, ...]  # of each block, those that have statistics
    blocks: dict[Shape, list[tuple[slice, ...]]]
    indices: dict[Shape, list[int]]  # of these blocks, among all of their shape that the parameter has
    shapes: tuple[Shape, ...]  # all shapes that it has: an entry of its state is numbered by its place here
    long: tuple[int, ...] = ()  # axes without statistics because they are too long, see LONG

    @classmethod
    def of(cls, shape: Shape, merge: str, block_size: int, axes: str = "all", batch_axes: int = 0) -> Layout:
        """
        Args:
            axes: which of them have statistics. ``none``: no axis. Otherwise, where there is one axis, it has. ``all``:
                those that are not too long, see ``LONG``. ``row``: the second, of a matrix (more axes become two) whose
                first is cut into parts of size one.
            batch_axes: the first so many count members, each of which is cut like a tensor of its own. They become one
                axis in front, of size one in each block and without statistics.
        """
        members, merged = math.prod(shape[:batch_axes]), merge_axes(shape[batch_axes:], merge)
        by_row, in_front = axes == "row" and len(merged) > 1, 0
        if by_row:
            merged = members * merged[0], math.prod(merged[1:])
        elif batch_axes:
            merged, in_front = (members, *merged), 1
        parts = [split_axis(d, block_size) for d in merged]
        if by_row or in_front:
            parts[0] = split_axis(merged[0], 1)
        own = range(in_front, len(merged))
        chosen = {"none": own[:0], "all": own, "first": own[:1], "last": own[-1:], "row": own[-1:]}[axes]
        blocks: dict[Shape, list[tuple[slice, ...]]] = defaultdict(list)
        for cut in itertools.product(*parts):
            blocks[tuple(s.stop - s.start for s in cut)].append(cut)
        indices = {s: list(range(len(cuts))) for s, cuts in blocks.items()}
        sizes = [max(s.stop - s.start for s in part) for part in parts]
        limits = [max(LONG, TIMES * math.prod(sizes) // d) for d in sizes]
        checked = axes == "all" and not is_vector(merged[in_front:])
        long = tuple(i for i, d in enumerate(sizes) if checked and d > limits[i])
        having = tuple(i for i in chosen if i not in long)
        return cls(merged, having, dict(blocks), indices, tuple(blocks), long)

    def only(self, chosen: dict[Shape, list[int]]) -> Layout:
        """Return the layout of some blocks of a whole one: of each shape those with these indices."""
        indices = {shape: n for shape, n in chosen.items() if n}
        blocks = {s: [self.blocks[s][i] for i in n] for s, n in indices.items()}
        return Layout(self.shape, self.axes, blocks, indices, self.shapes, self.long)

    def sizes(self, shape: Shape) -> Shape:
        """Return the sizes of the statistics of a block of this shape: the lengths of the axes that have them."""
        return tuple(shape[axis] for axis in self.axes)

    def views(self, tensor: Tensor, shape: Shape) -> list[Tensor]:
        """Return the blocks of ``shape`` in ``tensor`` (of the parameter's shape, contiguous or not)."""
        merged = tensor.reshape(self.shape)
        return [merged[cut] for cut in self.blocks[shape]]
