"""How numbers and verdicts are said."""

from __future__ import annotations

import math
from collections.abc import Sequence

from caspr_cli.report import stats
from caspr_cli.report.model import Difference, Row
from caspr_cli.report.stats import LEVEL, MOST_SEEDS, NO_SPREAD, POWER, Comparison

CANNOT_TELL = "cannot tell"
NO_PROMISE = 5  # fewer seeds than this know their own spread too badly to say how many would do
# What every legend says of verdicts and intervals.
ABOUT_SETTINGS = "verdicts are about the selected settings: tuning was done once, and its luck is in no interval"
NOT_CORRECTED = "intervals are not corrected, and nothing is for there being several tables"
DIFFERENCES = (
    "differences are row minus baseline, in per cent of the baseline's mean (of accuracies too: not percentage points)"
)
POWERED = f"seeds that would find a difference: with {100 * POWER:.0f} % power"
BOUNDED = "near the end of a scale, as of accuracy at 1, an interval covers less than it says"


def number(value: float | None, spread: float | None = None) -> str:
    """A metric, with the decimals of the first two figures of ``spread``, or else four."""
    if value is None:
        return "-"
    if abs(value) >= 1e7:
        return f"{value:.4g}"
    if spread is None or spread <= NO_SPREAD * abs(value):
        if value and abs(value) < 0.01:
            return f"{value:.3g}"
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    places = 1 - math.floor(math.log10(spread))
    if value and abs(value) < 1e-3 and places > 6:
        return f"{value:.{max(places + math.floor(math.log10(abs(value))), 0)}e}"
    text = f"{value:,.{max(places, 0)}f}"
    return text if text.strip("-0.") else text.lstrip("-")


def spread(mean: float | None, sd: float | None) -> str:
    if mean is None or sd is None:
        return number(mean)
    return f"{number(mean, sd)} ± {number(sd, sd) if sd > NO_SPREAD * abs(mean) else 0}"


def between(low: float | None, high: float | None, sd: float | None) -> str:
    return "-" if low is None or high is None else f"{number(low, sd)} to {number(high, sd)}"


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


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


def p(value: float, *, corrected: bool = False) -> str:
    """A p-value, so that what is below 5 % does not read like what is above."""
    name = "p (Holm)" if corrected else "p"
    if value < 0.001:
        return f"{name} < 0.001"
    digits = 2 if value >= 0.1 else 4 if f"{value:.3f}" == "0.050" else 3
    return f"{name} = {value:.{digits}f}"


def change(value: float, low: float | None, high: float | None, share_of: float | None) -> str:
    """A difference and its interval with their signs, as ``-0.38 % (-0.94 to +0.18)``.

    Args:
        share_of: what it is in per cent of; None: in units of the metric.
    """
    factor, unit = (1.0, "") if share_of is None else (100 / abs(share_of), " %")
    width = abs(value if low is None or high is None else (high - low) / 2) * factor
    said = f"{_signed(value * factor, width)}{unit}"
    if low is None or high is None:
        return said
    return f"{said} ({_signed(low * factor, width)} to {_signed(high * factor, width)})"


def _signed(value: float, width: float) -> str:
    text = number(abs(value), width) if width else "0"
    return f"{'-' if value < 0 else '+'}{text}" if text.strip("0.") else text


def verdict(
    found: Comparison,
    p_holm: float | None,
    tests: int,
    share_of: float | None,
    unfair: str,
    *,
    higher_is_better: bool,
) -> str:
    """``better``, ``worse``, or why it cannot be told.

    Args:
        tests: of the table, for which ``p_holm`` is corrected.
        unfair: what makes the seeds of one side the luckier ones, in words; then it cannot be told.
    """
    if found.value is None:
        return f"{CANNOT_TELL}: no seed is done on one side"
    difference = change(found.value, found.low, found.high, share_of)
    if unfair:
        return f"{CANNOT_TELL}: {unfair}: {difference}"
    if found.n < 2:
        return f"{CANNOT_TELL}: {difference}; with one seed on a side there is no spread to test by"
    if found.p_value is None or p_holm is None:
        if abs(found.value) <= NO_SPREAD * max(map(abs, found.base)):
            return f"{CANNOT_TELL}: identical with each of {found.n} seeds"
        what = "differences of" if found.paired else "values of both, over"
        return f"{CANNOT_TELL}: {difference}; the {what} {found.n} seeds are all equal, no spread to test by"
    if p_holm < LEVEL:
        return "better" if (found.value > 0) == higher_is_better else "worse"
    alone = f"{p(found.p_value)} alone, {p(p_holm, corrected=True)}; " if found.p_value < LEVEL else ""
    return f"{CANNOT_TELL}: {difference}; {alone}{_what_would(found, tests, share_of)}"


def _what_would(found: Comparison, tests: int, share_of: float | None) -> str:
    """What these seeds separate, and what more of them would."""
    assert found.spread is not None
    assert found.value is not None
    bound = stats.separable(found.spread, tests)
    factor, unit = (1.0, "") if share_of is None else (100 / abs(share_of), " %")
    now = f"n = {found.n} separates {number(bound * factor, bound * factor)}{unit}"
    if found.n < NO_PROMISE:
        more = _seeds(stats.seeds_to_separate(bound / 2, found.spread, tests))
        return f"{now}; more seeds would tell: {more} would separate half of that"
    needed = _seeds(stats.seeds_needed(found.value, found.spread, tests))
    return f"{now}; if the true difference is the one observed, {needed} would find it"


def _seeds(n: int | None) -> str:
    return f"more than {MOST_SEEDS:,} seeds" if n is None else f"about {n} seeds"


def against(difference: Difference) -> str:
    """A row against the baseline, in one line; a verdict that gives the difference itself is not told twice."""
    found = f"against {difference.against}: {difference.verdict}"
    if difference.value is None or difference.verdict.startswith(CANNOT_TELL):
        return found
    how = f"{difference.n} pairs" if difference.paired else "Welch"
    value = change(difference.value, difference.low, difference.high, difference.share_of)
    found += f", {value}, {p(difference.p_holm or 0.0, corrected=difference.tests > 1)}, {how}"
    other_sign = difference.value * (difference.test or 0.0) < 0  # of chance alone half would have it
    return f"{found}; test disagrees" if other_sign else found


def in_test(difference: Difference) -> str:
    """The difference of the test metric; empty if it is not known."""
    if difference.test is None:
        return ""
    return change(difference.test, difference.test_low, difference.test_high, difference.test_share_of)


def seeds(row: Row) -> str:
    """``5``, or ``4 of 5`` where one failed or is not finite."""
    return f"{row.n} of {len(row.runs)}" if row.failed else str(row.n)


def test(row: Row) -> str:
    """The test metric; with its n where that is another."""
    n = f" (n = {row.test_n})" if 0 < row.test_n < row.n else ""
    return f"{spread(row.test_mean, row.test_sd)}{n}"


def steps_to_target(row: Row) -> str:
    """The median, and how many reached it; where the median did not, some may have."""
    if row.reached is None or not row.runs:
        return "-"
    of = f"{row.reached} of {len(row.runs)}"
    if row.steps_to_target is None:
        return f"not reached; {of} did" if row.reached else "not reached"
    return f"{row.steps_to_target:,.0f} ({of})"


def budget(row: Row) -> str:
    """Trials, and how many of them did not end well."""
    total = sum(row.budget.values())
    others = [f"{number} {state}" for state, number in row.budget.items() if state != "done"]
    return f"{total} ({', '.join(others)})" if others and total > 1 else str(total)
