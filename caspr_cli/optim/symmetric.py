"""Symmetric matrices of which block rows of the lower triangle are stored: *packed*.

A d x d matrix is cut into a few panels of rows; of each, the columns up to its last row are kept, one panel after
the other in a flat vector. With four panels that is 10/16 of the numbers, of the memory traffic and of the products
that make them. The panels are large enough to be made by ordinary matrix products.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

MOST_PANELS = 4
LEAST_ROWS = 128  # thinner panels cost more in small products than they save


@lru_cache(maxsize=4096)
def panels(d: int) -> tuple[slice, ...]:
    """Return the rows of each panel of a d x d matrix."""
    count = min(MOST_PANELS, max(1, d // LEAST_ROWS))
    return tuple(slice(i * d // count, (i + 1) * d // count) for i in range(count))


def packed_length(d: int) -> int:
    """Numbers stored for a d x d matrix: d^2 for one panel, 5/8 of that for four."""
    return sum((rows.stop - rows.start) * rows.stop for rows in panels(d))


def panel_views(packed: Tensor, d: int) -> list[tuple[slice, Tensor]]:
    """Return the panels of packed matrices ``[K, packed_length(d)]``: their rows, and views ``[K, rows, columns]``."""
    views, start = [], 0
    for rows in panels(d):
        height, width = rows.stop - rows.start, rows.stop
        views.append((rows, packed[:, start : start + height * width].view(-1, height, width)))
        start += height * width
    return views


def add_gram(packed: Tensor, X: Tensor, weight: float) -> None:
    """Add in place: S <- S + weight X X^T for K packed S and X ``[K, d, r]``.

    Cost: 2 r packed_length(d) FLOPs a matrix. On a CPU a tenth less for d = 1024, where high panels are made in halves:
    there time goes by FLOPs, and on a GPU by launches.
    """
    for rows, view in panel_views(packed, X.shape[1]):
        half = (rows.stop - rows.start) // 2
        if X.device.type != "cpu" or half < LEAST_ROWS:
            view.baddbmm_(X[:, rows], X[:, : rows.stop].mT, alpha=weight)
            continue
        middle, above, below = rows.start + half, view[:, :half], view[:, half:]
        above[:, :, :middle].baddbmm_(X[:, rows.start : middle], X[:, :middle].mT, alpha=weight)
        below.baddbmm_(X[:, middle : rows.stop], X[:, : rows.stop].mT, alpha=weight)
        above[:, :, middle:] = below[:, :, rows.start : middle].mT


def product(X: Tensor, Y: Tensor) -> Tensor:
    """Return X Y^T ``[K, d, d]``, which must be symmetric, for X, Y ``[K, d, r]``.

    The lower triangle is computed, and the upper one copied.
    """
    d = X.shape[1]
    full = X.new_empty(X.shape[0], d, d)
    for rows in panels(d):
        torch.bmm(X[:, rows], Y[:, : rows.stop].mT, out=full[:, rows, : rows.stop])
        full[:, : rows.start, rows] = full[:, rows, : rows.start].mT
    return full


def diagonal(packed: Tensor, d: int) -> Tensor:
    """Return the diagonals ``[K, d]`` of packed matrices ``[K, packed_length(d)]``."""
    diagonals = _diagonals(packed, d)
    return diagonals[0] if len(diagonals) == 1 else torch.cat(diagonals, 1)


def trace(packed: Tensor, d: int) -> Tensor:
    """Return the traces ``[K]`` of packed matrices ``[K, packed_length(d)]``."""
    return sum((each.sum(1) for each in _diagonals(packed, d)), start=packed.new_zeros(len(packed)))


def _diagonals(packed: Tensor, d: int) -> list[Tensor]:
    return [view[:, :, rows.start :].diagonal(dim1=1, dim2=2) for rows, view in panel_views(packed, d)]


def pack(full: Tensor) -> Tensor:
    """Return ``[K, d, d]`` packed to ``[K, packed_length(d)]``; what is above the panels is not looked at."""
    return torch.cat([full[:, rows, : rows.stop].flatten(1) for rows in panels(full.shape[-1])], dim=1)


def unpack(packed: Tensor, d: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``[K, packed_length(d)]`` unpacked to ``[K, d, d]``, of another type if one is given."""
    if len(panels(d)) == 1:
        return packed.view(-1, d, d).to(dtype or packed.dtype)
    full = packed.new_empty(packed.shape[0], d, d, dtype=dtype or packed.dtype)
    for rows, view in panel_views(packed, d):
        full[:, rows, : rows.stop] = view
        full[:, : rows.start, rows] = view[:, :, : rows.start].mT
    return full
