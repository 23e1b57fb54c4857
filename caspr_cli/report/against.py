"""Rows against their baseline: which one that is, and what can be told."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from caspr_cli.report import stats, words
from caspr_cli.report.model import Difference, Row
from caspr_cli.report.rows import called, without_name
from caspr_cli.report.stats import Comparison

DEFAULT_BASELINE = "adamw"


def compared(
    rows: Sequence[Row], wanted: str | None, *, higher_is_better: bool
) -> tuple[list[Row], str | None, list[str]]:
    """The same rows, each with its difference to the one it is compared with; what the table's baseline is; warnings.

    Args:
        wanted: label of a row; by default adamw's, if it has one row alone. Without an optimizer's name, as
            ``statistics=ema``: each optimizer's own row with these settings.
    """
    baselines, warnings = _baselines(rows, wanted)
    found = {
        row.label: stats.compare(_finals(row), _finals(base))
        for row in rows
        if (base := baselines.get(row.label)) is not None and base is not row
    }
    unfair = {row.label: _unfair(row, baselines[row.label]) for row in rows if row.label in found}
    ps = {label: None if unfair[label] else each.p_value for label, each in found.items()}
    corrected = dict(zip(ps, stats.holm(list(ps.values())), strict=True))
    tests = sum(p is not None for p in ps.values())
    chosen = {base.label for base in baselines.values()}
    made = []
    for row in rows:
        difference = None
        if row.label in found:
            each, base, p = found[row.label], baselines[row.label], corrected[row.label]
            share_of = stats.unit_of_shares(each.base)
            said = words.verdict(each, p, tests, share_of, unfair[row.label], higher_is_better=higher_is_better)
            difference = Difference(
                each.paired, each.n, each.value, each.low, each.high, ps[row.label], p, said,
                base.label, tests, share_of, *_in_test(row, base),
            )  # fmt: skip
        made.append(replace(row, difference=difference, is_baseline=row.label in chosen))
    own = wanted is not None and without_name(wanted)
    baseline = (wanted if own else next(iter(chosen))) if chosen else None
    return made, baseline, [*warnings, *_left_out(rows, baselines, found)]


def _baselines(rows: Sequence[Row], wanted: str | None) -> tuple[dict[str, Row], list[str]]:
    """For each row that has one, by label, the row it is compared with; and why others have none."""
    label = wanted or DEFAULT_BASELINE
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.optim if without_name(label) else ""].append(row)
    found: dict[str, Row] = {}
    warnings = []
    for optim, group in groups.items():
        meant = called(group, label)
        if len(meant) == 1:
            found |= {row.label: meant[0] for row in group}
        elif len(rows) > 1:
            warnings.append(_none(group, label, optim, meant))
    return found, warnings


def _none(group: Sequence[Row], label: str, optim: str, meant: Sequence[Row]) -> str:
    if optim:
        return (
            f"no baseline for {optim}: {words.count(len(meant), 'row')} with {label}"
            if meant
            else (f"no baseline for {optim}: no row with {label}")
        )
    why = f"{len(meant)} rows are {label}" if meant else f"there is no {label}"
    return f"no baseline: {why}; choose a row with --baseline, as {(meant or group)[0].label!r}"


def _unfair(row: Row, base: Row) -> str:
    """What leaves one side with the luckier seeds; empty if nothing does, or the same does on both.

    A larger share of them failed there, so that those that did well are left; or they chose the trial, so that the
    luckiest of several was taken: "better" would then be said of equal rows three to five times as often as it should.
    """
    ours, theirs = row.failed * len(base.runs), base.failed * len(row.runs)
    if ours != theirs:
        worse, whose = (row, "") if ours > theirs else (base, f" of {base.label}")
        return f"{worse.failed} of {words.count(len(worse.runs), 'seed')}{whose} failed; the others"
    if row.n and base.n and row.fresh != base.fresh:
        whose = f"seeds of {base.label}" if row.fresh else "its seeds"
        return f"{whose} chose its trial, which flatters it; the difference"
    return ""


def _in_test(row: Row, base: Row) -> tuple[float | None, float | None, float | None, float | None]:
    """The difference of the test metric with the same seeds, its interval, and what it is a share of."""
    found = stats.compare(_tests(row), _tests(base))
    return found.value, found.low, found.high, stats.unit_of_shares(found.base)


def _finals(row: Row) -> dict[int, float]:
    return {run.seed: run.final for run in row.runs if run.final is not None}


def _tests(row: Row) -> dict[int, float]:
    return {run.seed: run.test for run in row.runs if run.final is not None and run.test is not None}


def _left_out(rows: Sequence[Row], baselines: Mapping[str, Row], found: Mapping[str, Comparison]) -> Iterator[str]:
    """Seeds of one side that a paired test does without."""
    without: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for row in rows:
        if row.label not in found or not found[row.label].paired:
            continue
        ours, theirs = _finals(row), _finals(baselines[row.label])
        for label, other, more in (
            (row.label, baselines[row.label].label, ours.keys() - theirs.keys()),
            (baselines[row.label].label, row.label, theirs.keys() - ours.keys()),
        ):
            if more:
                without[label, tuple(sorted(more))].append(other)
    for (label, seeds), others in without.items():
        named = words.listed([str(seed) for seed in seeds])
        what = f"seed{'s' * (len(seeds) > 1)} {named} left out of the comparison with {words.listed(others, 5)}"
        yield f"{label}: {what}, which {'have' if len(others) > 1 else 'has'} no value there; means are over all"
