"""Numbers, verdicts and tables as text: what every form of a report has in common."""

import math
from collections.abc import Callable, Sequence

from caspr_cli.common.format import count, duration, listed
from caspr_cli.common.selection import AGAIN
from caspr_cli.common.shape import DONE
from caspr_cli.report import settings, stats
from caspr_cli.report.model import Row, Table
from caspr_cli.report.render import Column, Sheet, best
from caspr_cli.report.stats import LEVEL, MOST_SEEDS, NO_SPREAD, POWER, Comparison, Summary

NOT_SIGNIFICANT, NOT_TESTED = "no significant difference", "not tested"
# A verdict has a mark, too: its colour alone would not reach everyone.
MARKS = {"better": "▲", "worse": "▼", NOT_SIGNIFICANT: "≈", NOT_TESTED: "○", "baseline": "●"}
FEW = 5  # with fewer seeds the spread is too uncertain to say how many seeds would find the observed difference
# What every legend says of verdicts and intervals.
ABOUT_SETTINGS = "verdicts are about the selected settings: they were tuned once, and no interval includes that chance"
NOT_CORRECTED = "intervals are not corrected, and nothing is corrected for several tables"
DIFFERENCES = (
    "differences are row minus baseline, in per cent of the baseline's mean (of accuracies too: not percentage points)"
)
POWERED = f"numbers of seeds that would find a difference are for {100 * POWER:.0f} % power"
BOUNDED = "near the end of a scale, as for an accuracy near 1, an interval covers less than 95 %"
TESTS = "a paired t-test where all seeds of the row or of the baseline are common to both, else Welch's"


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


LEGEND = (
    "n: seeds; mean ± sd and its 95 % interval (Student's t) of validation at the end, over held-out seeds, which took "
    "no part in selecting the trial, where there are two; test: of the same runs; to target: median over seeds, in "
    f"brackets how many reached it. Verdicts: {TESTS}, at 5 % after Holm's correction for the rows of a table; "
    f"{DIFFERENCES}; {POWERED}. {sentence(ABOUT_SETTINGS)}; {NOT_CORRECTED}; {BOUNDED}. "
    "Rows with failed seeds stand behind the others."
)
BOLD = "Bold: the best of a column, whether significant or not."
LEGEND_OF_MARKS = "▲ better, ▼ worse, ≈ no significant difference, ○ not tested, ● the baseline."

# ---- numbers -----------------------------------------------------------------------------------------------------


def number(value: float | None, spread: float | None = None) -> str:
    """Return a metric with the decimals of the first two digits of ``spread``, or else four decimals."""
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


def mean_sd(of: Summary) -> str:
    """Return ``3.992 ± 0.012``."""
    if of.mean is None or of.sd is None:
        return number(of.mean)
    return f"{number(of.mean, of.sd)} ± {number(of.sd, of.sd) if of.sd > NO_SPREAD * abs(of.mean) else 0}"


def interval(of: Summary) -> str:
    """Return ``3.98 to 4.01``."""
    return " to ".join(number(end, of.sd) for end in of.ends) or "-"


def p(value: float, *, corrected: bool = False) -> str:
    """Return a p-value, so that one below 5 % does not read like one above."""
    name = "p (Holm)" if corrected else "p"
    if value < 0.001:
        return f"{name} < 0.001"
    digits = 2 if value >= 0.1 else 4 if f"{value:.3f}" == "0.050" else 3
    return f"{name} = {value:.{digits}f}"


def change(found: Comparison) -> str:
    """Return a difference and its interval with their signs, as ``-0.38 % (-0.94 to +0.18)``."""
    if found.value is None:
        return "-"
    factor, unit = _unit(found)
    if found.low is None or found.high is None:
        return f"{_signed(found.value * factor, abs(found.value) * factor)}{unit}"
    width = (found.high - found.low) / 2 * factor
    low, high = (_signed(edge * factor, width) for edge in (found.low, found.high))
    return f"{_signed(found.value * factor, width)}{unit} ({low} to {high})"


def _unit(found: Comparison) -> tuple[float, str]:
    return (1.0, "") if found.share_of is None else (100 / abs(found.share_of), " %")


def _signed(value: float, width: float) -> str:
    text = number(abs(value), width) if width else "0"
    return f"{'-' if value < 0 else '+'}{text}" if text.strip("0.") else text


# ---- verdicts ----------------------------------------------------------------------------------------------------


def verdict(found: Comparison, p_holm: float | None, tests: int, unfair: str = "", *, higher_is_better: bool) -> str:
    """Return ``better``, ``worse``, or why neither can be said.

    ``p_holm`` is corrected for so many ``tests``. ``unfair`` says what biases one side; then there is no test.
    """
    if found.value is None:
        return f"{NOT_TESTED}: no seed is done on one side"
    difference = change(found)
    if unfair:
        return f"{NOT_TESTED}: {unfair}: {difference}"
    if found.n < 2:
        return f"{NOT_TESTED}: {difference}; one seed on a side has no spread"
    if found.p_value is None or p_holm is None:
        if abs(found.value) <= NO_SPREAD * max(map(abs, found.base)):
            return f"{NOT_TESTED}: identical with each of {found.n} seeds"
        what = "differences of" if found.paired else "values of both, over"
        return f"{NOT_TESTED}: {difference}; the {what} {found.n} seeds are all equal and have no spread"
    if p_holm < LEVEL:
        return "better" if (found.value > 0) == higher_is_better else "worse"
    alone = f"{p(found.p_value)} alone, {p(p_holm, corrected=True)}; " if found.p_value < LEVEL else ""
    return f"{NOT_SIGNIFICANT}: {difference}; {alone}{_sensitivity(found, tests)}"


def _sensitivity(found: Comparison, tests: int) -> str:
    """Return which difference these seeds detect, and how many seeds would detect more."""
    assert found.spread is not None
    assert found.value is not None
    bound, (factor, unit) = stats.detectable(found.spread, tests), _unit(found)
    now = f"n = {found.n} detects {number(bound * factor, bound * factor)}{unit}"
    if found.n < FEW:
        return f"{now}; {_seeds(stats.seeds_to_detect(bound / 2, found.spread, tests))} would detect half of that"
    needed = _seeds(stats.seeds_needed(found.value, found.spread, tests))
    return f"{now}; if the true difference is the one observed, {needed} would find it"


def _seeds(n: int | None) -> str:
    return f"more than {MOST_SEEDS:,} seeds" if n is None else f"about {n} seeds"


def against(difference: Comparison) -> str:
    """Return verdict, difference and test of a row in one line."""
    found = f"against {difference.baseline}: {difference.verdict}"
    if difference.value is None or difference.verdict.startswith((NOT_SIGNIFICANT, NOT_TESTED)):
        return found  # the verdict has the difference
    how = f"{difference.n} pairs" if difference.paired else "Welch"
    p_value = p(difference.p_holm or 0.0, corrected=difference.tests > 1)
    found += f", {change(difference)}, {p_value}, {how}"
    test = difference.test.value if difference.test else None
    other_sign = difference.value * (test or 0.0) < 0  # where nothing is significant half have it
    return f"{found}; test disagrees" if other_sign else found


# ---- a table -----------------------------------------------------------------------------------------------------


def sheet(table: Table, comparison: Callable[[Row], str] | None = None) -> Sheet:
    """Return a line for each row: the numbers that this table has, what was selected, and the verdict.

    ``comparison`` gives the verdict in words; by default it has its mark, too.
    """
    higher, rows = table.higher_is_better, table.rows
    whole = [not row.failed for row in rows]  # beside these, rows with failed seeds do not win: theirs are the lucky

    def won(values: Sequence[float | None], *, higher: bool = False) -> frozenset[int]:
        kept = [value if ok or not any(whole) else None for value, ok in zip(values, whole, strict=True)]
        return best(kept, higher=higher)

    means, test_means = [row.mean for row in rows], [row.test.mean for row in rows]
    tests = [f"{mean_sd(row.test)}{f' (n = {row.test.n})' if 0 < row.test.n < row.n else ''}" for row in rows]
    seconds = [row.seconds_to_target for row in rows]
    found = [
        Column("optimizer", [row.label for row in rows], right=False),
        Column("n", list(map(seeds, rows))),
        Column("mean ± sd", [mean_sd(row.validation) for row in rows], best=won(means, higher=higher)),
        Column("95 % interval", [interval(row.validation) for row in rows], spare=2),
        Column("test", tests, spare=3, best=won(test_means, higher=higher)),
    ]
    if table.target is not None:
        steps = [row.steps_to_target for row in rows]
        found += [
            Column(f"steps to {table.target:g}", list(map(steps_to_target, rows)), spare=1, best=won(steps)),
            Column("time to it", list(map(duration, seconds)), spare=4, best=won(seconds)),
        ]
    if any(row.own_schedule for row in rows):
        own = [row.own_schedule.steps if row.own_schedule else None for row in rows]
        found.append(Column("own schedule", list(map(own_schedule, rows)), spare=1, best=won(own)))
    found += [
        Column("trials", list(map(budget, rows)), spare=5),
        Column("selected", [selected(row) or "-" for row in rows], right=False),
        Column("verdict", [(comparison or marked)(row) or "-" for row in rows], right=False),
    ]
    return Sheet(found, title(table))


def seeds(row: Row) -> str:
    """Return ``5``, or ``4 of 5`` where one failed or is not finite."""
    return f"{row.n} of {len(row.runs)}" if row.failed else str(row.n)


def steps_to_target(row: Row) -> str:
    """Return the median, and how many reached the target; where the median did not, some may have."""
    if row.reached is None or not row.runs:
        return "-"
    of = f"{row.reached} of {len(row.runs)}"
    if row.steps_to_target is None:
        return f"not reached; {of} did" if row.reached else "not reached"
    return f"{row.steps_to_target:,.0f} ({of})"


def own_schedule(row: Row) -> str:
    """Return the steps of the shortest whole run that reached the target, and how many lengths were tried."""
    own = row.own_schedule
    if own is None:
        return "-"
    lengths = count(len(own.tried), "length")
    return f"not reached in {lengths}" if own.steps is None else f"{own.steps:,} ({lengths})"


def budget(row: Row) -> str:
    """Return the number of trials, how many are not done, and how many runs repeated the best ones."""
    if row.untuned:
        return "0"
    total = sum(row.budget.values())
    others = [f"{number} {state}" for state, number in row.budget.items() if state != DONE]
    if again := sum(run.seed in row.selecting.intersection(AGAIN) for trial in row.trials for run in trial.runs):
        others.append(f"+{again} again")
    return f"{total} ({', '.join(others)})" if others and total > 1 else str(total)


def title(table: Table) -> str:
    better = "higher" if table.higher_is_better else "lower"
    target = "" if table.target is None else f"; target {table.target:g}{_horizon(table)}"
    data = f"{table.data} data{f' {table.data_hash[:8]}' if table.data_hash else ''}"
    named = f"{table.task}, {table.scale} scale, {data}" if (table.scale, table.data) != ("-", "-") else table.task
    at = {str(run.status.get("at", "at the end")) for row in table.rows for run in row.records}
    return f"{named}: {table.metric} {listed(sorted(at)) if at else 'at the end'}, {better} is better{target}"


def _horizon(table: Table) -> str:
    """Return a note on the planned length of the runs from whose curves the steps to the target are read."""
    planned = f", steps to it read off a schedule of {table.steps:,} steps" if table.steps else ""
    own = any(row.own_schedule for row in table.rows)
    more = "; own schedule: the shortest whole run whose mean over the same seeds reaches it"
    return f"{planned}{more if own else ''}"


def baseline(table: Table) -> str:
    return f"each optimizer's own row with {table.baseline}" if table.own_baselines else str(table.baseline)


def comparison(row: Row) -> str:
    """Return the comparison with the baseline, in words; empty where there is none."""
    return against(row.difference) if row.difference else "baseline" if row.is_baseline else ""


def marked(row: Row) -> str:
    return f"{MARKS[row.kind]} {comparison(row)}" if row.kind else ""


def selected(row: Row) -> str:
    """Return the values of the tuned keys, as ``lr=0.006``."""
    return settings.joined(row.selected.values) if row.selected else ""
