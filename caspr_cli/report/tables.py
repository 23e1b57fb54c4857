"""From records to tables: one for each task, scale and kind of data; each row tuned, summed up and compared."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from caspr_cli.report import checks, stats, targets, words
from caspr_cli.report.against import compared
from caspr_cli.report.errors import ReportError, nearest
from caspr_cli.report.model import DONE, Row, Run, Table, Trial
from caspr_cli.report.rows import Group, called, ended, grouped, trials, tuned_keys
from caspr_cli.report.selection import Selection, reported, select

NOT_COMPARED = "debug"  # runs with it are looks at whether everything works


@dataclass(frozen=True)
class Question:
    """What all rows of a table are asked."""

    task: str
    scale: str
    data: str
    metric: str
    higher_is_better: bool
    data_hash: str | None = None

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
        baseline: label of a row, by default adamw's, where there is one; or settings alone, as ``statistics=ema``,
            for each optimizer's own row with these.
        tuned: keys that rows are tuned over, in place of the learning rate and those of the searches.
        wanted: targets by task, in place of those of the recipes.

    Raises:
        ReportError: no table has such a row, no record such a task, or no record such a key.
    """
    _check(runs, tuned, wanted or {})
    left_out = [run for run in runs if _not_compared(run)]
    found = questions([run for run in runs if not _not_compared(run)])
    made = [
        _table(question, own, baseline, tuned, (wanted or {}).get(question.task)) for question, own in found.items()
    ]
    if not made:
        raise ReportError(f"all {words.count(len(runs), 'record')} have {_debug(left_out)}, which is not compared")
    rows = [row for table in made for row in table.rows]
    if baseline is not None and not called(rows, baseline):
        labels = list(dict.fromkeys(row.label for row in rows))
        have = words.listed(labels, 12)
        raise ReportError(f"--baseline {baseline}: no row is called so.{nearest(baseline, labels)} (rows: {have})")
    return _saying(made, left_out)


def questions(runs: Sequence[Run]) -> dict[Question, list[Run]]:
    """What was asked, by task, and the runs that answer it: on the same data, by the hash of its content.

    Those that do not say their data, as they failed before they had it, are taken to be on that of the most runs.
    """
    kinds: dict[Question, list[Run]] = defaultdict(list)
    for run in runs:
        kinds[Question.of(run)].append(run)
    found: dict[Question, list[Run]] = defaultdict(list)
    for question in sorted(kinds, key=lambda q: (q.task, q.scale, q.data, q.metric)):
        counts = Counter(known for run in kinds[question] if (known := data_hash(run)))
        commonest = min(counts, key=lambda known: (-counts[known], known), default=None)
        for known in sorted(counts):
            found[replace(question, data_hash=known)] = []
        for run in kinds[question]:
            found[replace(question, data_hash=data_hash(run) or commonest)].append(run)
    return found


def data_hash(run: Run) -> str | None:
    return (run.provenance.get("data") or {}).get("hash")


def _saying(made: Sequence[Table], left_out: Sequence[Run]) -> list[Table]:
    """The same tables, with what can only be said of all of them together."""
    found = []
    for k, table in enumerate(made):
        said = list(table.warnings)
        alike = [
            other
            for other in made
            if (other.task, other.scale, other.data) == (table.task, table.scale, table.data)
            and other.data_hash != table.data_hash
        ]
        if alike:
            others = words.listed(list(dict.fromkeys(str(other.data_hash)[:8] for other in alike)), 4)
            said.append(
                f"records of {table.task} on different data: these are on {str(table.data_hash)[:8]}, "
                f"those on {others} have a table of their own"
            )
        own = [run for run in left_out if run.config["task.name"] == table.task]
        homeless = [run for run in left_out if all(run.config["task.name"] != other.task for other in made)]
        if out := own + (homeless if k == 0 else []):
            said.append(f"{words.count(len(out), 'record')} with {_debug(out)} left out")
        found.append(replace(table, warnings=tuple(said)))
    return found


def _not_compared(run: Run) -> bool:
    return run.config.get(NOT_COMPARED) not in (None, "none")


def _debug(runs: Sequence[Run]) -> str:
    return words.listed(sorted({f"{NOT_COMPARED}={run.config[NOT_COMPARED]}" for run in runs}))


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
        _built(name, group, keys, higher, target)
        for name, own in sorted(by_optimizer.items())
        for keys in [tuned_keys(own, tuned)]
        for group in grouped(own, keys)
    ]
    built.sort(key=lambda each: _place(each.row, higher))
    rows, chosen, said = compared([each.row for each in built], baseline, higher_is_better=higher)
    warnings = checks.warnings(built) + (checks.targets_differ(rows, target) if not given else [])
    return Table(**vars(question), target=target, baseline=chosen, rows=tuple(rows), warnings=(*warnings, *said))


def _place(row: Row, higher: bool) -> tuple[bool, bool, float, str]:
    """The best mean first; behind, rows with seeds that failed, as the mean is of those that were lucky."""
    return row.mean is None, row.failed > 0, 0.0 if row.mean is None else -row.mean if higher else row.mean, row.label


def _built(optim: str, group: Group, tuned: Sequence[str], higher: bool, target: float | None) -> checks.Built:
    made, twice = trials(group.runs, tuned)
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
        task=str(group.runs[0].config["task.name"]),
        optim=optim,
        label=group.label,
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
        test_n=len(tests),
        settings=group.settings,
    )
    return checks.Built(row, selection, tuple(tuned), group.runs, twice)


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
