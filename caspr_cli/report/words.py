"""How numbers and verdicts are said."""

from __future__ import annotations

from collections.abc import Sequence

from caspr_cli.report.model import Difference, Row
from caspr_cli.report.stats import LEVEL, MOST_SEEDS, Comparison

CANNOT_TELL = "cannot tell"


def number(value: float | None) -> str:
    """A metric."""
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"


def spread(mean: float | None, sd: float | None) -> str:
    return number(mean) if sd is None else f"{number(mean)} ± {number(sd)}"


def between(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{number(low)} to {number(high)}"


def count(number: int, noun: str, ending: str = "s") -> str:
    return f"{number:,} {noun}{ending * (number != 1)}"


def listed(words: Sequence[str], most: int = 8) -> str:
    """``a, b and c``; the rest of a long list as a number."""
    if len(words) > most:
        return f"{', '.join(words[: most - 1])} and {len(words) - most + 1} more"
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else "none"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def p(value: float) -> str:
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.4f}" if value < 0.01 else f"p = {value:.2f}"


def relative(value: float, base: float | None, *, sign: bool = False) -> str:
    """As a share of the baseline's mean; in units of the metric if there is none or it is 0."""
    if not base:
        return f"{value:{'+' if sign else ''}.3g}"
    share = 100 * value / abs(base)
    digits = "" if abs(share) < 1e-12 else ".2g" if abs(share) < 1 else ".1f"
    return f"{share:{'+' if sign else ''}{digits or '.0f'}} %"


def verdict(comparison: Comparison, p_holm: float | None, base: float | None, *, higher_is_better: bool) -> str:
    """``better``, ``worse``, or why it cannot be told.

    Args:
        base: mean of the baseline.
    """
    n, value, p_value = comparison.n, comparison.value, comparison.p_value
    if value is None:
        return f"{CANNOT_TELL}: no seed is done on one side"
    difference = relative(abs(value), base)
    if n < 2:
        return f"{CANNOT_TELL}: n = {n} has no spread; the difference is {difference}"
    if p_value is None or comparison.separable is None or p_holm is None:
        what = "differences of" if comparison.paired else "values of both, over"
        return (
            f"{CANNOT_TELL}: the {what} {n} seeds are all equal, no spread to test by; the difference is {difference}"
        )
    if p_holm < LEVEL:
        return "better" if (value > 0) == higher_is_better else "worse"
    if p_value < LEVEL:
        return f"{CANNOT_TELL}: {p(p_value)} alone, but {p(p_holm)} as one of several rows (Holm)"
    seeds = f"more than {MOST_SEEDS:,}" if comparison.seeds is None else f"about {comparison.seeds}"
    return (
        f"{CANNOT_TELL}: n = {n} separates {relative(comparison.separable, base)}, the difference is {difference}; "
        f"{seeds} seeds would"
    )


def against(difference: Difference, baseline: str, base: float | None) -> str:
    """A row against the baseline, in one line; a verdict that gives the difference itself is not told twice."""
    if difference.value is None or difference.verdict.startswith(CANNOT_TELL):
        return f"against {baseline}: {difference.verdict}"
    how = f"{difference.n} pairs" if difference.paired else "Welch"
    low, high = (relative(end or 0.0, base, sign=True) for end in (difference.low, difference.high))
    return (
        f"against {baseline}: {difference.verdict}, {relative(difference.value, base, sign=True)} ({low} to {high}), "
        f"{p(difference.p_holm or 0.0)}, {how}"
    )


def seeds(row: Row) -> str:
    """``5``, or ``4 of 5`` where one failed or is not finite."""
    return str(row.n) if row.n == len(row.runs) else f"{row.n} of {len(row.runs)}"


def steps_to_target(row: Row) -> str:
    if row.reached is None or not row.runs:
        return "-"
    steps = "not reached" if row.steps_to_target is None else f"{row.steps_to_target:,.0f}"
    return f"{steps} ({row.reached} of {len(row.runs)})"


def budget(row: Row) -> str:
    """Trials, and how many of them did not end well."""
    total = sum(row.budget.values())
    others = [f"{number} {state}" for state, number in row.budget.items() if state != "done"]
    return f"{total} ({', '.join(others)})" if others and total > 1 else str(total)
