"""From records to tables: one for each task, scale and kind of data; each row tuned, summed up and compared."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from caspr_cli.report import checks, stats, targets, words
from caspr_cli.report.errors import ReportError, nearest
from caspr_cli.report.model import DONE, Difference, Row, Run, Table, Trial
from caspr_cli.report.rows import called, ended, grouped, trials, tuned_keys
from caspr_cli.report.selection import Selection, reported, select

DEFAULT_BASELINE = "adamw"


@dataclass(frozen=True)
class Question:
    """What all rows of a table are asked."""

    task: str
    scale: str
    data: str
    metric: str
    higher_is_better: bool

    @classmethod
    def of(cls, run: Run) -> Question:
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
    """All tables, by task.

    Args:
        baseline: label of a row; by default the row of adamw, where there is one.
        tuned: keys that rows are tuned over, in place of the learning rate and those of the searches.
        wanted: targets by task, in place of those of the recipes.

    Raises:
        ReportError: no table has such a row, no record such a task, or no record such a key.
    """
    _check(runs, tuned, wanted or {})
    found: dict[Question, list[Run]] = defaultdict(list)
    for run in runs:
        found[Question.of(run)].append(run)
    questions = sorted(found, key=lambda q: (q.task, q.scale, q.data, q.metric))
    made = [
        _table(question, found[question], baseline, tuned, (wanted or {}).get(question.task)) for question in questions
    ]
    labels = [row.label for table in made for row in table.rows]
    if baseline is not None and not called(labels, baseline):
        have = words.listed(list(dict.fromkeys(labels)), 12)
        raise ReportError(f"--baseline {baseline}: no row is called so.{nearest(baseline, labels)} (rows: {have})")
    return made


def _check(runs: Sequence[Run], tuned: Sequence[str] | None, wanted: Mapping[str, float]) -> None:
    keys = {key for run in runs for key in run.config}
    for key in tuned or ():
        if key not in keys and key.rpartition(".")[0] not in keys:
            raise ReportError(f"--tuned {key}: no record has this key.{nearest(key, keys)}")
    tasks = {str(run.config["task.name"]) for run in runs}
    for task in wanted:
        if task not in tasks:
            raise ReportError(f"--target {task}: no record is of this task.{nearest(task, tasks)}")


def _table(
    question: Question,
    runs: Sequence[Run],
    baseline: str | None,
    tuned: Sequence[str] | None,
    target: float | None,
) -> Table:
    higher = question.higher_is_better
    given = target is not None
    target = target if given else targets.of_table(runs, higher_is_better=higher)
    by_optimizer: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_optimizer[str(run.config["optim.name"])].append(run)
    built = [
        _built(name, label, group, keys, higher, target)
        for name, own in sorted(by_optimizer.items())
        for keys in [tuned_keys(own, tuned)]
        for label, group in grouped(own, keys).items()
    ]
    built.sort(key=lambda each: _place(each.row, higher))
    rows = [each.row for each in built]
    base = _baseline(rows, baseline)
    warnings = checks.warnings(built) + (checks.targets_differ(rows, target) if not given else [])
    if base is None and len(rows) > 1:
        warnings.append(_no_baseline(rows, baseline))
    return Table(
        **vars(question),
        target=target,
        baseline=base.label if base else None,
        rows=tuple(compared(rows, base, higher_is_better=higher)),
        warnings=tuple(warnings),
    )


def _place(row: Row, higher: bool) -> tuple[float, str]:
    return math.inf if row.mean is None else -row.mean if higher else row.mean, row.label


def _baseline(rows: Sequence[Row], label: str | None) -> Row | None:
    """The one row that may be called so; without a label adamw's, if it has one row alone."""
    meant = called([row.label for row in rows], label or DEFAULT_BASELINE)
    return next(row for row in rows if row.label == meant[0]) if len(meant) == 1 else None


def _no_baseline(rows: Sequence[Row], label: str | None) -> str:
    wanted = label or DEFAULT_BASELINE
    several = called([row.label for row in rows], wanted)
    why = f"{len(several)} rows are {wanted}" if several else f"there is no {wanted}"
    return f"no baseline: {why}; choose a row with --baseline, as {(several or [rows[0].label])[0]!r}"


def _built(
    optim: str, label: str, runs: Sequence[Run], tuned: Sequence[str], higher: bool, target: float | None
) -> checks.Built:
    made, twice = trials(runs, tuned)
    selection = select(made, higher_is_better=higher)
    shown, fresh = reported(selection)
    finals = [run.final for run in shown if run.final is not None]
    tests = [run.test for run in shown if run.final is not None and run.test is not None]
    times = [] if target is None else [targets.reached(run, target, higher_is_better=higher) for run in shown]
    steps, seconds = targets.medians(times)
    mean, sd = stats.mean_sd(finals)
    low, high = stats.interval(finals)
    test_mean, test_sd = stats.mean_sd(tests)
    row = Row(
        task=str(runs[0].config["task.name"]),
        optim=optim,
        label=label,
        trials=made,
        selected=selection.trial,
        runs=shown,
        fresh=fresh,
        n=len(finals),
        mean=mean,
        sd=sd,
        ci_low=low,
        ci_high=high,
        test_mean=test_mean,
        test_sd=test_sd,
        steps_to_target=steps,
        seconds_to_target=seconds,
        reached=None if target is None else sum(math.isfinite(step) for step, _ in times),
        best_of=stats.best_of(selection.scores, higher_is_better=higher),
        budget=_budget(made, selection),
    )
    return checks.Built(row, selection, tuple(tuned), twice)


def _budget(made: Sequence[Trial], selection: Selection) -> dict[str, int]:
    """Trials by state; one that has some seeds done is done, unless a seed that selects failed."""
    counts: dict[str, int] = Counter()
    for trial in made:
        deciding = [run for run in trial.runs if run.seed in selection.seeds] or list(trial.runs)
        ends = [run for run in deciding if ended(run)]
        if not ends:
            counts[deciding[0].state] += 1
        else:
            counts[
                DONE if any(run.final is not None for run in ends) and _all_finite(ends, selection) else "failed"
            ] += 1
    return dict(counts)


def _all_finite(runs: Sequence[Run], selection: Selection) -> bool:
    return not selection.seeds or all(run.final is not None for run in runs)


def compared(rows: Sequence[Row], base: Row | None, *, higher_is_better: bool) -> list[Row]:
    """The same rows, each but the baseline with its difference to it."""
    if base is None:
        return list(rows)
    others = [row for row in rows if row is not base]
    found = [stats.compare(_finals(row), _finals(base)) for row in others]
    corrected = stats.holm([each.p_value for each in found])
    differences: dict[str, Any] = {
        row.label: Difference(
            paired=each.paired,
            n=each.n,
            value=each.value,
            low=each.low,
            high=each.high,
            p_value=each.p_value,
            p_holm=p,
            verdict=words.verdict(each, p, base.mean, higher_is_better=higher_is_better),
        )
        for row, each, p in zip(others, found, corrected, strict=True)
    }
    return [replace(row, difference=differences.get(row.label)) for row in rows]


def _finals(row: Row) -> dict[int, float]:
    return {run.seed: run.final for run in row.runs if run.final is not None}
