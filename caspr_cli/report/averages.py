"""The mean of a row over its validations, which curves show."""

from dataclasses import dataclass
from statistics import fmean, median

from caspr_cli.report.model import Row
from caspr_cli.report.stats import summary

BAND = 3  # seeds from which on a curve has a band: at two the interval is nine standard deviations to each side


@dataclass(frozen=True)
class Curve:
    label: str
    n: int  # runs that are averaged: the finished ones, or those there are if none is
    finished: bool  # whether `n` counts finished runs
    steps: tuple[int, ...]
    seconds: tuple[float, ...] | None  # the median at each step; None if a run has no times
    mean: tuple[float, ...]
    low: tuple[float, ...] | None  # low, high: 95 % interval of the mean at each step; None if n < `BAND`
    high: tuple[float, ...] | None
    singles: tuple[tuple[float, ...], ...] = ()  # the values of each run, where there are two


def curve(row: Row) -> Curve | None:
    """Return the mean of a row at the steps where all its runs have a finite value; None if there is none."""
    done = [run for run in row.runs if run.final is not None]
    runs = done or [run for run in row.runs if run.curve]
    by_step = [{point.step: point for point in run.curve if point.value is not None} for run in runs]
    steps = sorted(set.intersection(*map(set, by_step))) if runs else []
    if not steps:
        return None
    values = [[float(points[step].value or 0.0) for points in by_step] for step in steps]
    times = [[time for points in by_step if (time := points[step].seconds) is not None] for step in steps]
    mean, bands = tuple(map(fmean, values)), map(summary, values)  # no band where all values are equal
    edges = [band.ends or (m, m) for m, band in zip(mean, bands, strict=True)]
    low, high = zip(*edges, strict=True) if len(runs) >= BAND else (None, None)
    singles = tuple(zip(*values, strict=True)) if 1 < len(runs) < BAND else ()
    seconds = tuple(map(median, times)) if all(len(own) == len(runs) for own in times) else None
    return Curve(row.label, len(runs), bool(done), tuple(steps), seconds, mean, low, high, singles)
