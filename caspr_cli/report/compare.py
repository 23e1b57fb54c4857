"""From records to tables: one for each task, scale and data set, with each row tuned, summarized and compared."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from caspr_cli.common.errors import UserError, nearest
from caspr_cli.common.format import count, listed
from caspr_cli.report import consistency, stats
from caspr_cli.report.format import verdict
from caspr_cli.report.horizon import HORIZON, LENGTH, own_schedule
from caspr_cli.report.model import Row, Run, Table
from caspr_cli.report.provenance import data_hash
from caspr_cli.report.selection import (
    ALWAYS_TUNED,
    UNTUNED,
    OwnValue,
    matching,
    own_values,
    rows_of,
    set_by_hand,
    without_name,
)
from caspr_cli.report.settings import ranges
from caspr_cli.report.stats import Comparison

DEBUG = "debug"  # runs with it only try whether everything works
DEFAULT_BASELINE = "adamw"


def tables(
    runs: Sequence[Run],
    *,
    baseline: str | None = None,
    tuned: Sequence[str] | None = None,
    wanted: Mapping[str, float] | None = None,
) -> list[Table]:
    """Return all tables, by task. Raises UserError if no table has such a row, or no record such a task or key.

    Args:
        baseline: label of a row, by default adamw's, where there is one; or settings alone, as ``statistics=ema``,
            for each optimizer's own row with these.
        tuned: keys that rows are tuned over, in place of the learning rate and those of the searches.
        wanted: targets by task, in place of those of the recipes.
    """
    wanted = wanted or {}
    _check(runs, tuned, wanted)
    left_out = [run for run in runs if run.config.get(DEBUG) not in (None, "none")]
    found = subjects([run for run in runs if run.config.get(DEBUG) in (None, "none")])
    budgets, own_of = LENGTH not in (tuned or ()), own_values(runs)
    made = [
        _table(replace(subject, steps=steps, target=wanted.get(subject.task)), own, every, own_of, baseline, tuned)
        for subject, every in found.items()
        for steps, own in (by_steps(every) if budgets else {None: every}).items()
    ]
    if not made:
        what = f"{count(len(runs), 'record')} with {_debug(left_out)}, which is left out" if left_out else "no records"
        raise UserError(f"nothing to compare: {what}")
    rows = [row for table in made for row in table.rows]
    if baseline is not None and not matching(rows, baseline):
        labels = list(dict.fromkeys(row.label for row in rows))
        known = f"{nearest(baseline, labels)} (rows: {listed(labels, 12)})"
        raise UserError(f"--baseline {baseline}: no row has this name.{known}")
    more = [(*table.warnings, *_others(table, made), *_debugged(table, made, left_out)) for table in made]
    return [replace(table, warnings=own) for table, own in zip(made, more, strict=True)]


def _check(runs: Sequence[Run], tuned: Sequence[str] | None, wanted: Mapping[str, float]) -> None:
    keys = {key for run in runs for key in run.config}
    for key in tuned or ():
        if key not in keys and key.rpartition(".")[0] not in keys:
            raise UserError(f"--tuned {key}: no record has this key.{nearest(key, keys)}")
    tasks = {str(run.config["task.name"]) for run in runs}
    for task in wanted:
        if task not in tasks:
            raise UserError(f"--target {task}: no record is of this task.{nearest(task, tasks)}")


def subjects(runs: Sequence[Run]) -> dict[Table, list[Run]]:
    """Return the runs of each table by the table, still without rows: one task on the same data, by the data's hash.

    Runs without a hash failed before they had the data, and count to the data of the most runs.
    """
    kinds: dict[Table, list[Run]] = defaultdict(list)
    for run in runs:
        scale, data = (str(run.config.get(key, "-")) for key in ("scale", "task.data"))
        higher = bool(run.config.get("task.target.higher_is_better", False))
        kinds[Table(str(run.config["task.name"]), scale, data, run.metric, higher)].append(run)
    found: dict[Table, list[Run]] = defaultdict(list)
    for subject in sorted(kinds, key=lambda s: (s.task, s.scale, s.data, s.metric)):
        counts = Counter(known for run in kinds[subject] if (known := data_hash(run)))
        commonest = min(counts, key=lambda known: (-counts[known], known), default=None)
        for known in sorted(counts):
            found[replace(subject, data_hash=known)] = []
        for run in kinds[subject]:
            found[replace(subject, data_hash=data_hash(run) or commonest)].append(run)
    return found


def by_steps(runs: Sequence[Run]) -> dict[int | None, list[Run]]:
    """Return the runs by their length, the longest first: only runs of one length are compared.

    Runs with ``horizon`` have no table of their own, where there are others: they show how soon a whole run can reach
    the target.
    """
    whole = [run for run in runs if run.config.get(HORIZON) is None] or runs
    found: dict[int | None, list[Run]] = defaultdict(list)
    for run in sorted(whole, key=lambda run: -(run.config.get(LENGTH) or 0)):
        found[run.config.get(LENGTH)].append(run)
    return found


def _others(table: Table, made: Sequence[Table]) -> Iterator[str]:
    """Yield a warning if the same task has another table, on other data or with another length."""
    same = [other for other in made if (other.task, other.scale, other.data) == (table.task, table.scale, table.data)]
    others = list(dict.fromkeys(str(o.data_hash)[:8] for o in same if o.data_hash != table.data_hash))
    lengths = [f"{o.steps or 0:,}" for o in same if o.data_hash == table.data_hash and o.steps != table.steps]
    if lengths:
        yield f"runs of {table.task} for {listed(lengths, 4)} steps have a table of their own"
    if others:
        here = f"records of {table.task} on different data: these are on {str(table.data_hash)[:8]}"
        yield f"{here}, those on {listed(others, 4)} have a table of their own"


def _debugged(table: Table, made: Sequence[Table], left_out: Sequence[Run]) -> Iterator[str]:
    """Yield how many records of this task were left out; the first table also counts those of tasks without a table."""
    tasks = {other.task for other in made}
    own = [run for run in left_out if run.config["task.name"] == table.task]
    own += [run for run in left_out if table is made[0] and run.config["task.name"] not in tasks]
    if own:
        yield f"{count(len(own), 'record')} with {_debug(own)} left out"


def _debug(runs: Sequence[Run]) -> str:
    return listed(sorted({f"{DEBUG}={run.config[DEBUG]}" for run in runs}))


def _table(
    subject: Table,
    runs: Sequence[Run],
    every: Sequence[Run],
    known: Collection[OwnValue],
    baseline: str | None,
    tuned: Sequence[str] | None,
) -> Table:
    """Return the table of ``subject``, whose target is the one that the user wants.

    Args:
        every: runs of any length.
        known: the values that optimizers have by themselves (:func:`own_values`).
    """
    higher = subject.higher_is_better
    target = common_target(runs, higher_is_better=higher) if subject.target is None else subject.target
    by_optimizer: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_optimizer[str(run.config["optim.name"])].append(run)
    named = set_by_hand(runs, known)
    rows, shorter = list[Row](), list[Row]()
    for name, own in sorted(by_optimizer.items()):
        searched = {key for run in own for key in ranges(run.config)}
        keys = sorted({*searched, ALWAYS_TUNED}) if tuned is None else tuned
        others = [run for run in every if run.config["optim.name"] == name and run.config.get(LENGTH) != subject.steps]
        parts = [[run for run in own if (UNTUNED in run.config.items()) == untuned] for untuned in (False, True)]
        for part, into in zip((*parts, others), (rows, rows, shorter), strict=True):
            into += rows_of(part, keys, named, known, higher_is_better=higher, target=target)
    rows = sorted((row.but(own_schedule=own_schedule(row, [*rows, *shorter])) for row in rows), key=_place)
    rows, chosen, unmatched = compared(rows, baseline)
    differ = consistency.targets_differ(rows, target) if subject.target is None else []
    warnings = (*consistency.warnings(rows), *differ, *unmatched)
    return replace(subject, target=target, baseline=chosen, rows=tuple(rows), warnings=warnings)


def common_target(runs: Iterable[Run], *, higher_is_better: bool) -> float | None:
    """Return the target of most runs, of equally many the hardest; None if none has one."""
    counts = Counter(value for run in runs if (value := run.config.get("task.target.value")) is not None)
    sign = 1 if higher_is_better else -1
    return float(max(counts, key=lambda value: (counts[value], sign * value))) if counts else None


def _place(row: Row) -> tuple[bool, bool, float, str]:
    """Return a key to sort rows by: the best mean first; rows with failed seeds last, as the mean is of lucky ones."""
    mean = 0.0 if row.mean is None else -row.mean if row.higher_is_better else row.mean
    return row.mean is None, row.failed > 0, mean, row.label


def compared(rows: Sequence[Row], wanted: str | None) -> tuple[list[Row], str | None, list[str]]:
    """Return the rows, each with its difference to its baseline; the name of the baseline; and warnings.

    ``wanted`` is the ``baseline`` of :func:`tables`.
    """
    baselines, warnings = _baselines(rows, wanted)
    pairs = [(row, base) for row in rows if (base := baselines.get(row.label)) and base is not row]
    unfair = [_unfair(row, base) for row, base in pairs]
    found = [stats.compare(row.values, base.values) for row, base in pairs]
    found = [replace(each, p_value=None) if why else each for each, why in zip(found, unfair, strict=True)]
    p_values = [each.p_value for each in found]
    tests = sum(p is not None for p in p_values)
    differences: dict[str, Comparison] = {}
    for (row, base), each, why, p in zip(pairs, found, unfair, stats.holm(p_values), strict=True):
        said = verdict(each, p, tests, why, higher_is_better=row.higher_is_better)
        test = stats.compare(row.tests, base.tests)
        differences[row.label] = replace(each, p_holm=p, tests=tests, baseline=base.label, verdict=said, test=test)
    chosen = {base.label for base in baselines.values()}
    made = [row.but(difference=differences.get(row.label), is_baseline=row.label in chosen) for row in rows]
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
            many = f"{len(candidates)} rows" if candidates else "no row"
            warnings.append(f"no baseline for {optim}: {many} with {label}")
        elif len(rows) > 1:
            why = f"{len(candidates)} rows are {label}" if candidates else f"there is no {label}"
            example = (candidates or group)[0].label
            warnings.append(f"no baseline: {why}; choose a row with --baseline, as {example!r}")
    return found, warnings


def _unfair(row: Row, base: Row) -> str:
    """Return what biases the comparison; empty if nothing does, or if both sides have the same bias.

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


def _unpaired(pairs: Sequence[tuple[Row, Row]], found: Sequence[Comparison]) -> Iterator[str]:
    """Yield a warning for seeds of one side that a paired test leaves out."""
    without: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for (row, base), each in zip(pairs, found, strict=True):
        if each.paired:
            for one, other in ((row, base), (base, row)):
                if more := one.values.keys() - other.values.keys():
                    without[one.label, tuple(sorted(more))].append(other.label)
    for (label, seeds), others in without.items():
        named = f"seed{'s' * (len(seeds) > 1)} {listed([str(seed) for seed in seeds])}"
        has = "have" if len(others) > 1 else "has"
        where = f"the comparison with {listed(others, 5)}, which {has} no value there"
        yield f"{label}: {named} left out of {where}; means are over all"
