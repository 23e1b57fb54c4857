"""The outcome of each trial of a row, and how much its value depends on the learning rate."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeGuard

from caspr_cli.common.selection import AGAIN
from caspr_cli.common.shape import DONE
from caspr_cli.report.model import Row, Run, Table, Trial
from caspr_cli.report.selection import ALWAYS_TUNED
from caspr_cli.report.settings import frozen

DIVERGED = re.compile(r"\bis (nan|-?inf)\b")  # the message of a run that stopped as its loss was not finite
RANGE = 3  # so many values make a range
NEAR = 0.01  # of the best value: what is as good, for the width of a range


def why(run: Run) -> str:
    """Return why a run has no finite value at its end."""
    if run.state == DONE:
        return "diverged: not finite at the end"
    error = str(run.status.get("error") or "").partition("\n")[0]
    what = "diverged" if DIVERGED.search(error) else run.state
    return f"{what}: {error[:60]}{'...' * (len(error) > 60)}" if error else what


@dataclass(frozen=True)
class Outcome:
    trial: Trial
    value: float | None  # its mean over the seeds that all trials of the row share; None if it has none that is finite
    # the metric at the seeds with which the best trials were run again, as far as they have ended
    again: tuple[float | None, ...]
    state: str  # `done`, or why there is no value
    best: bool  # whether it is the selected one


def outcomes(row: Row) -> list[Outcome]:
    """Return the trials of a row, the best value first, those without a value at the end."""
    found = []
    for k, trial in enumerate(row.trials):
        value = row.scores.get(k)
        again = tuple(run.final for run in trial.runs if run.seed in AGAIN and run.ended)
        found.append(Outcome(trial, value, again, _state(trial, value, k in row.scores), trial is row.selected))
    sign = -1 if row.higher_is_better else 1
    return sorted(found, key=lambda one: (one.value is None, sign * (one.value or 0.0)))


def _state(trial: Trial, value: float | None, compared: bool) -> str:
    if value is not None:
        return DONE
    if going := [run for run in trial.runs if not run.ended]:
        return going[0].state
    lost = [run for run in trial.runs if run.final is None]
    return why(lost[0]) if lost or compared else "done, but not with the seed that selects"


def edges(row: Row) -> list[tuple[str, str, list[float]]]:
    """Return the keys of which the selected value is the smallest or the largest that was tried, with all of these."""
    found = []
    for key in row.tuned:
        values = [trial.values[key] for trial in row.trials if key in trial.values and trial.ended]
        seen = sorted({value for value in values if number(value)})
        best = row.selected.values.get(key) if row.selected else None
        if len(seen) >= RANGE and best in (seen[0], seen[-1]):
            found.append((key, "smallest" if best == seen[0] else "largest", seen))
    return found


def number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def tried(table: Table) -> list[Row]:
    """Return the rows with several trials of which one has a value."""
    return [row for row in table.rows if len(row.trials) > 1 and any(v is not None for v in row.scores.values())]


def varied(row: Row) -> list[str]:
    """Return the tuned keys in which its trials differ, the learning rate first."""
    keys = [key for key in row.tuned if len({frozen(trial.values.get(key)) for trial in row.trials}) > 1]
    return sorted(keys, key=lambda key: (key != ALWAYS_TUNED, key))


# ---- sensitivity -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Width:
    """The learning rates around the best one whose value is within 1 % of the best."""

    # rates and values that are joined in the figure, by rate: all trials, or, where other keys vary as well, those that
    # no trial farther from the best on the same side surpasses
    line: tuple[tuple[float, float], ...]
    best: tuple[float, float]  # rate and value of the best
    low: float  # low, high: the range; between two points of the line it is interpolated
    high: float
    open: tuple[bool, bool]  # whether the range reaches the last point of the line on a side, so that it may be wider

    @property
    def factor(self) -> str:
        """``×3.20``, with ``≥`` where the range may be wider."""
        ratio = self.high / self.low
        return f"×{'≥' if any(self.open) else ''}{ratio:.{2 if ratio < 10 else 0}f}"


def width(row: Row) -> Width | None:
    """Return how wide the range of good learning rates is; None where fewer than two rates have a value."""
    sign = -1.0 if row.higher_is_better else 1.0
    best_at: dict[float, float] = {}
    for k, value in row.scores.items():
        x = row.trials[k].values.get(ALWAYS_TUNED)
        if number(x) and x > 0 and value is not None:
            best_at[float(x)] = min(sign * value, best_at.get(float(x), math.inf))
    return around(best_at, sign, joint=varied(row) != [ALWAYS_TUNED]) if len(best_at) > 1 else None


def around(best_at: Mapping[float, float], sign: float = 1.0, *, joint: bool = False) -> Width:
    """Return the range around the best of two or more rates; ``joint``: other keys vary as well.

    ``best_at`` are the values by rate, times ``sign`` so that lower is better.
    """
    points = sorted(best_at.items())
    best = min(points, key=lambda point: point[1])
    left = [point for point in points if point[0] <= best[0]]
    right = [point for point in reversed(points) if point[0] >= best[0]]
    if joint:
        left, right = _records(left), _records(right)
    bound = best[1] + NEAR * abs(best[1])
    (low, low_open), (high, high_open) = (_reach(side[::-1], bound) for side in (left, right))
    line = tuple((x, sign * value) for x, value in dict([*left, *reversed(right)]).items())
    return Width(line, (best[0], sign * best[1]), low, high, (low_open, high_open))


def _records(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that are better than all before them."""
    return [point for k, point in enumerate(points) if all(point[1] < other[1] for other in points[:k])]


def _reach(side: Sequence[tuple[float, float]], bound: float) -> tuple[float, bool]:
    """Return the rate, from the best outwards, where the line leaves the bound; and whether it never does."""
    for (x, value), (next_x, next_value) in pairwise(side):
        if next_value > bound:
            share = (bound - value) / (next_value - value)
            return x * (next_x / x) ** share, False
    return side[-1][0], True
