"""From records to tables: one for each task, scale and data set, with each row tuned, summarized and compared."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from caspr_cli.common.errors import UserError, nearest
from caspr_cli.common.format import count, listed
from caspr_cli.common.shape import DONE, FAILED
from caspr_cli.report import consistency, stats
from caspr_cli.report.format import verdict
from caspr_cli.report.horizon import HORIZON, LENGTH, with_own_schedules
from caspr_cli.report.model import Difference, Row, Run, Table, Trial
from caspr_cli.report.provenance import data_hash
from caspr_cli.report.selection import (
    ALWAYS_TUNED,
    UNTUNED,
    Group,
    Selection,
    common_target,
    grouped,
    matching,
    median,
    planned,
    searched_keys,
    select,
    time_to,
    trials,
    without_name,
)
from caspr_cli.report.stats import Comparison

DEBUG = "debug"  # runs with it only try whether everything works
DEFAULT_BASELINE = "adamw"


@dataclass(frozen=True)
class Subject:
    """The task, scale, data and planned steps that all rows of a table share."""

    task: str
    scale: str
    data: str
    metric: str
    higher_is_better: bool
    data_hash: str | None = None
    steps: int | None = None

    @classmethod
    def of(cls, run: Run) -> Subject:
        config = run.config
        scale, data = (str(config.get(key, "-")) for key in ("scale", "task.data"))
        higher = bool(config.get("task.target.higher_is_better", False))
        return cls(str(config["task.name"]), scale, data, run.metric, higher)


def tables(
    runs: Sequence[Run],
    *,
    baseline: str | None = None,
    tuned: Sequence[str] | None = None,
    wanted: Mapping[str, float] | None = None,
) -> list[Table]:
    """Return all tables, by task.

    Args:
        baseline: label of a row, by default adamw's, where there is one; or settings alone, as ``statistics=ema``,
            for each optimizer's own row with these.
        tuned: keys that rows are tuned over, in place of the learning rate and those of the searches.
        wanted: targets by task, in place of those of the recipes.

    Raises:
        UserError: no table has such a row, no record such a task, or no record such a key.
    """
    wanted = wanted or {}
    _check(runs, tuned, wanted)
    left_out = [run for run in runs if run.config.get(DEBUG) not in (None, "none")]
    found = subjects([run for run in runs if run.config.get(DEBUG) in (None, "none")])
    budgets = LENGTH not in (tuned or ())
    made = [
        _table(replace(subject, steps=steps), own, every, baseline, tuned, wanted.get(subject.task))
        for subject, every in found.items()
        for steps, own in (by_steps(every) if budgets else {None: every}).items()
    ]
    if not made:
        raise UserError(f"all {count(len(runs), 'record')} have {_debug(left_out)}, which is not compared")
    rows = [row for table in made for row in table.rows]
    if baseline is not None and not matching(rows, baseline):
        labels = list(dict.fromkeys(row.label for row in rows))
        raise UserError(
            f"--baseline {baseline}: no row is called so.{nearest(baseline, labels)} (rows: {listed(labels, 12)})"
        )
    return [
        replace(table, warnings=(*table.warnings, *_others(table, made), *_debugged(table, made, left_out)))
        for table in made
    ]


def _check(runs: Sequence[Run], tuned: Sequence[str] | None, wanted: Mapping[str, float]) -> None:
    keys = {key for run in runs for key in run.config}
    for key in tuned or ():
        if key not in keys and key.rpartition(".")[0] not in keys:
            raise UserError(f"--tuned {key}: no record has this key.{nearest(key, keys)}")
    tasks = {str(run.config["task.name"]) for run in runs}
    for task in wanted:
        if task not in tasks:
            raise UserError(f"--target {task}: no record is of this task.{nearest(task, tasks)}")


def subjects(runs: Sequence[Run]) -> dict[Subject, list[Run]]:
    """Return the runs of each table: those of one task on the same data, by the hash of its content.

    Runs without a hash failed before they had the data, and count to the data of the most runs.
    """
    kinds: dict[Subject, list[Run]] = defaultdict(list)
    for run in runs:
        kinds[Subject.of(run)].append(run)
    found: dict[Subject, list[Run]] = defaultdict(list)
    for subject in sorted(kinds, key=lambda s: (s.task, s.scale, s.data, s.metric)):
        counts = Counter(known for run in kinds[subject] if (known := data_hash(run)))
        commonest = min(counts, key=lambda known: (-counts[known], known), default=None)
        for known in sorted(counts):
            found[replace(subject, data_hash=known)] = []
        for run in kinds[subject]:
            found[replace(subject, data_hash=data_hash(run) or commonest)].append(run)
    return found


def by_steps(runs: Sequence[Run]) -> dict[int | None, list[Run]]:
    """Return the runs of each length, the longest first: runs of other lengths are not alike.

    Runs with ``horizon`` have no table of their own, where there are others: they show how soon a whole run can reach
    the target.
    """
    whole = [run for run in runs if run.config.get(HORIZON) is None] or runs
    found: dict[int | None, list[Run]] = defaultdict(list)
    for run in sorted(whole, key=lambda run: -(run.config.get(LENGTH) or 0)):
        found[run.config.get(LENGTH)].append(run)
    return found


def _others(table: Table, made: Sequence[Table]) -> Iterator[str]:
    """Yield where the same task on other data, or with other lengths, has a table of its own."""
    same = [other for other in made if (other.task, other.scale, other.data) == (table.task, table.scale, table.data)]
    others = list(dict.fromkeys(str(o.data_hash)[:8] for o in same if o.data_hash != table.data_hash))
    lengths = [f"{o.steps or 0:,}" for o in same if o.data_hash == table.data_hash and o.steps != table.steps]
    if lengths:
        yield f"runs of {table.task} for {listed(lengths, 4)} steps have a table of their own"
    if others:
        yield (
            f"records of {table.task} on different data: these are on {str(table.data_hash)[:8]}, "
            f"those on {listed(others, 4)} have a table of their own"
        )


def _debugged(table: Table, made: Sequence[Table], left_out: Sequence[Run]) -> Iterator[str]:
    """Yield how many records were left out of this task; the first table has those of tasks without a table, too."""
    tasks = {other.task for other in made}
    own = [run for run in left_out if run.config["task.name"] == table.task]
    own += [run for run in left_out if table is made[0] and run.config["task.name"] not in tasks]
    if own:
        yield f"{count(len(own), 'record')} with {_debug(own)} left out"


def _debug(runs: Sequence[Run]) -> str:
    return listed(sorted({f"{DEBUG}={run.config[DEBUG]}" for run in runs}))


def _table(
    subject: Subject,
    runs: Sequence[Run],
    every: Sequence[Run],
    baseline: str | None,
    tuned: Sequence[str] | None,
    given: float | None,
) -> Table:
    """Return one table.

    Args:
        every: the runs of all lengths: of these ``runs`` have one.
        baseline, tuned, given: as of :func:`tables`, with the target of this task.
    """
    higher = subject.higher_is_better
    target = common_target(runs, higher_is_better=higher) if given is None else given
    by_optimizer: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_optimizer[str(run.config["optim.name"])].append(run)
    rows, shorter = list[Row](), list[Row]()
    for name, own in sorted(by_optimizer.items()):
        keys = tuple(tuned) if tuned is not None else tuple(sorted({*searched_keys(own), ALWAYS_TUNED}))
        parts = [[run for run in own if (UNTUNED in run.config.items()) == untuned] for untuned in (False, True)]
        rows += [_row(name, group, keys, higher, target) for part in parts for group in grouped(part, keys)]
        others = [run for run in every if run.config["optim.name"] == name and run.config.get(LENGTH) != subject.steps]
        shorter += [_row(name, group, keys, higher, target) for group in grouped(others, keys)]
    rows = with_own_schedules(rows, shorter, target, higher_is_better=higher)
    rows.sort(key=lambda row: _place(row, higher))
    rows, chosen, unmatched = compared(rows, baseline, higher_is_better=higher)
    differ = consistency.targets_differ(rows, target) if given is None else []
    warnings = (*consistency.warnings(rows), *differ, *unmatched)
    return Table(**vars(subject), target=target, baseline=chosen, rows=tuple(rows), warnings=warnings)


def _place(row: Row, higher: bool) -> tuple[bool, bool, float, str]:
    """The best mean first; rows with failed seeds at the end, as their mean is of the lucky ones."""
    return row.mean is None, row.failed > 0, 0.0 if row.mean is None else -row.mean if higher else row.mean, row.label


def _row(optim: str, group: Group, tuned: tuple[str, ...], higher: bool, target: float | None) -> Row:
    made, duplicates = trials(group.runs, tuned)
    selection = select(made, higher_is_better=higher)
    runs = selection.runs
    finals = [run.final for run in runs if run.final is not None]
    tests = [run.test for run in runs if run.final is not None and run.test is not None]
    times = [] if target is None else [time_to(target, run, higher_is_better=higher) for run in runs]
    mean, sd = stats.mean_sd(finals)
    low, high = stats.interval(finals)
    test_mean, test_sd = stats.mean_sd(tests)
    return Row(
        task=str(group.runs[0].config["task.name"]),
        optim=optim,
        label=group.label,
        trials=made,
        selected=selection.trial,
        runs=runs,
        held_out=selection.held_out,
        n=len(finals),
        mean=mean,
        sd=sd,
        ci_low=low,
        ci_high=high,
        test_mean=test_mean,
        test_sd=test_sd,
        test_n=len(tests),
        steps_to_target=median([step for step, _ in times]),
        seconds_to_target=median([seconds for _, seconds in times]),
        reached=None if target is None else sum(math.isfinite(step) for step, _ in times),
        best_of=stats.best_of(planned(made, selection.scores), higher_is_better=higher),
        budget=dict(Counter(_outcome(trial, selection) for trial in made)),
        settings=group.settings,
        tuned=tuned,
        records=group.runs,
        duplicates=duplicates,
        selecting=selection.seeds,
        unscored=selection.left_out,
        scores=selection.scores,
    )


def _outcome(trial: Trial, selection: Selection) -> str:
    """Return the state of a trial: done if some seed is, unless a seed that selects failed."""
    deciding = [run for run in trial.runs if run.seed in selection.seeds] or list(trial.runs)
    ends = [run.final for run in deciding if run.ended]
    if not ends:
        return deciding[0].state
    enough = all if selection.seeds else any
    return DONE if enough(final is not None for final in ends) else FAILED


def compared(
    rows: Sequence[Row], wanted: str | None, *, higher_is_better: bool
) -> tuple[list[Row], str | None, list[str]]:
    """Return the rows, each with its difference to its baseline; the name of the baseline; and warnings.

    Args:
        wanted: label of a row; by default adamw's, if it has one row alone. Without an optimizer's name, as
            ``statistics=ema``: each optimizer's own row with these settings.
    """
    baselines, warnings = _baselines(rows, wanted)
    pairs = {row.label: (row, base) for row in rows if (base := baselines.get(row.label)) and base is not row}
    found = {label: stats.compare(values_by_seed(row), values_by_seed(base)) for label, (row, base) in pairs.items()}
    unfair = {label: _unfair(row, base) for label, (row, base) in pairs.items()}
    p_values = {label: None if unfair[label] else each.p_value for label, each in found.items()}
    corrected = dict(zip(p_values, stats.holm(list(p_values.values())), strict=True))
    tests = sum(p is not None for p in p_values.values())

    def difference(row: Row) -> Difference | None:
        if row.label not in pairs:
            return None
        each, base, p = found[row.label], baselines[row.label], corrected[row.label]
        share_of, test = stats.unit_of_shares(each.base), stats.compare(_tests(row), _tests(base))
        said = verdict(each, p, tests, share_of, unfair[row.label], higher_is_better=higher_is_better)
        return Difference(
            **vars(each) | {"p_value": p_values[row.label]}, p_holm=p, verdict=said, baseline=base.label, tests=tests,
            share_of=share_of, test=test, test_share_of=stats.unit_of_shares(test.base),
        )  # fmt: skip

    chosen = {base.label for base in baselines.values()}
    made = [replace(row, difference=difference(row), is_baseline=row.label in chosen) for row in rows]
    own = wanted is not None and without_name(wanted)
    baseline = (wanted if own else next(iter(chosen))) if chosen else None
    return made, baseline, [*warnings, *_unpaired(pairs, found)]


def _baselines(rows: Sequence[Row], wanted: str | None) -> tuple[dict[str, Row], list[str]]:
    """Return the baseline of each row that has one, by the row's label; and why others have none.

    Untuned rows are compared with nothing, unless one is wanted: each test would take power from the others.
    """
    label = wanted or DEFAULT_BASELINE
    rows = [row for row in rows if not row.untuned or "untuned" in label.split()]
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.optim if without_name(label) else ""].append(row)
    found: dict[str, Row] = {}
    warnings = []
    for optim, group in groups.items():
        candidates = matching(group, label)
        if len(candidates) == 1:
            found |= {row.label: candidates[0] for row in group}
        elif len(rows) > 1 and optim:
            warnings.append(
                f"no baseline for {optim}: {len(candidates) or 'no'} row{'s' * bool(candidates)} with {label}"
            )
        elif len(rows) > 1:
            why = f"{len(candidates)} rows are {label}" if candidates else f"there is no {label}"
            example = (candidates or group)[0].label
            warnings.append(f"no baseline: {why}; choose a row with --baseline, as {example!r}")
    return found, warnings


def _unfair(row: Row, base: Row) -> str:
    """Return what biases the comparison; empty if nothing does, or the same does on both sides.

    A larger share of the seeds failed on one side, so that the good ones are left; or they selected the trial, so that
    the luckiest of several was taken: equal rows would then be "better" three to five times as often as they should.
    """
    ours, theirs = row.failed * len(base.runs), base.failed * len(row.runs)
    if ours != theirs:
        worse, whose = (row, "") if ours > theirs else (base, f" of {base.label}")
        return f"{worse.failed} of {count(len(worse.runs), 'seed')}{whose} failed; the others"
    if row.n and base.n and row.held_out != base.held_out:
        whose = f"the seeds of {base.label}" if row.held_out else "its seeds"
        return f"{whose} selected the trial, too, which flatters it; the difference"
    return ""


def values_by_seed(row: Row) -> dict[int, float]:
    """Return the values of the reported seeds, without those that failed."""
    return {run.seed: run.final for run in row.runs if run.final is not None}


def _tests(row: Row) -> dict[int, float]:
    return {run.seed: run.test for run in row.runs if run.final is not None and run.test is not None}


def _unpaired(pairs: Mapping[str, tuple[Row, Row]], found: Mapping[str, Comparison]) -> Iterator[str]:
    """Yield the seeds of one side that a paired test leaves out."""
    without: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for label, (row, base) in pairs.items():
        if found[label].paired:
            for one, other in ((row, base), (base, row)):
                if more := values_by_seed(one).keys() - values_by_seed(other).keys():
                    without[one.label, tuple(sorted(more))].append(other.label)
    for (label, seeds), others in without.items():
        named = f"seed{'s' * (len(seeds) > 1)} {listed([str(seed) for seed in seeds])}"
        has = "have" if len(others) > 1 else "has"
        yield (
            f"{label}: {named} left out of the comparison with {listed(others, 5)}, which {has} no value there; "
            "means are over all"
        )
