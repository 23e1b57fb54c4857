"""Means of runs over training, and the range of values in which their ends can be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from caspr_cli.report.model import Point, Row, Run
from caspr_cli.report.stats import interval

FAR = 8.0  # times the distance of the median end from the best: too far for an axis that others share
SETTLED = 0.4  # share of the training after which the best row should be seen


@dataclass(frozen=True)
class Curve:
    """A row over its validations.

    Args:
        n: runs that are averaged: the finished ones, or those there are if none is.
        finished: whether these count.
        seconds: the median at each step; None if a run does not know.
        low, high: 95 % interval of the mean at each step; None if n < 2.
    """

    label: str
    n: int
    finished: bool
    steps: tuple[int, ...]
    seconds: tuple[float, ...] | None
    mean: tuple[float, ...]
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None


def curve(row: Row) -> Curve | None:
    """The mean of a row at the steps where all its runs have a finite value; None if there is no such step."""
    done = [run for run in row.runs if run.final is not None]
    runs = done or [run for run in row.runs if run.curve]
    columns = _columns(runs)
    if not columns:
        return None
    values = [[float(point.value or 0.0) for point in column] for column in columns]
    seconds = [[point.seconds for point in column if point.seconds is not None] for column in columns]
    bands = [interval(each) for each in values]  # none where all values are equal
    means = tuple(map(fmean, values))
    return Curve(
        label=row.label,
        n=len(runs),
        finished=bool(done),
        steps=tuple(column[0].step for column in columns),
        seconds=tuple(map(median, seconds)) if all(len(s) == len(runs) for s in seconds) else None,
        mean=means,
        low=_edges([low for low, _ in bands], means) if len(runs) > 1 else None,
        high=_edges([high for _, high in bands], means) if len(runs) > 1 else None,
    )


def _edges(edges: Sequence[float | None], means: Sequence[float]) -> tuple[float, ...]:
    return tuple(mean if edge is None else edge for edge, mean in zip(edges, means, strict=True))


def _columns(runs: Sequence[Run]) -> list[list[Point]]:
    """The points of all runs at each step that all have."""
    by_step = [{point.step: point for point in run.curve if point.value is not None} for run in runs]
    common = set.intersection(*map(set, by_step)) if by_step else set()
    return [[points[step] for points in by_step] for step in sorted(common)]


def window(ends: Sequence[float], wanted: Sequence[float] = (), *, higher: bool) -> tuple[float, float]:
    """The lower and upper end of an axis on which ``ends`` can be told apart.

    From the best to the worst of them, but not to those that lie ``FAR`` times as far from the best as the median one:
    a row that diverged does not flatten all others. (What lies outside has to be said by other means.)

    Args:
        wanted: values that should be seen, whatever is said above.
        higher: whether higher is better.
    """
    sign = -1.0 if higher else 1.0
    ranked = sorted(sign * end for end in ends)
    reach = FAR * (median(ranked) - ranked[0])
    kept = [end for end in ranked if len(ranked) < 3 or end - ranked[0] <= reach]
    seen = [*(kept or ranked[:1]), *(sign * value for value in wanted)]
    margin = 0.07 * (max(seen) - min(seen)) or 0.02 * abs(seen[0]) or 0.02
    edges = sign * (min(seen) - margin), sign * (max(seen) + margin)
    return min(edges), max(edges)


def settled(curve: Curve) -> float:
    """The value after the first part of the training."""
    start = SETTLED * curve.steps[-1]
    return next(value for step, value in zip(curve.steps, curve.mean, strict=True) if step >= start)


def apart(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The same positions, moved as little as can be, so that no two are nearer than ``gap`` and all in [low, high].

    Least in the sum of squares: isotonic regression, by pooling. Where not all fit, they are spread evenly.
    """
    if not positions:
        return []
    gap = min(gap, (high - low) / max(len(positions) - 1, 1))
    order = sorted(range(len(positions)), key=lambda k: (positions[k], -k))  # of equal ones the first is the highest
    blocks: list[list[float]] = []  # mean of what its members, moved to its start, would like; members
    for rank, k in enumerate(order):
        blocks.append([positions[k] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    wished = [start for start, n in blocks for _ in range(int(n))]
    moved = [0.0] * len(positions)
    for rank, k in enumerate(order):
        first = min(max(wished[rank], low), high - (len(order) - 1) * gap)
        moved[k] = first + rank * gap
    return moved
