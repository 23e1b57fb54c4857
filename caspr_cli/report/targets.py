"""When a run first reached its target."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from caspr_cli.report.model import DONE, Run


def of_table(runs: Iterable[Run], *, higher_is_better: bool) -> float | None:
    """The target of most runs, of equally many the hardest; None if none has one."""
    counts = Counter(value for run in runs if (value := run.config.get("task.target.value")) is not None)
    sign = 1 if higher_is_better else -1
    return float(max(counts, key=lambda value: (counts[value], sign * value))) if counts else None


def reached(run: Run, target: float, *, higher_is_better: bool) -> tuple[float, float | None]:
    """Step and seconds of the first validation that reaches it: infinite if none does; seconds None if not known."""
    own = run.result.get("target") or {}
    if run.state == DONE and own.get("value") == target:
        return (math.inf, math.inf) if own.get("step") is None else (own["step"], own.get("seconds"))
    for point in run.curve:
        if point.value is not None and (point.value >= target if higher_is_better else point.value <= target):
            return point.step, point.seconds
    return math.inf, math.inf


def medians(times: Sequence[tuple[float, float | None]]) -> tuple[float | None, float | None]:
    """Median steps and seconds over runs, where one that did not reach it is infinite; None for an infinite median."""
    return _median([steps for steps, _ in times]), _median([seconds for _, seconds in times])


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    middle = statistics.median(known)
    return middle if math.isfinite(middle) else None
