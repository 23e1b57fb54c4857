"""The last lines of a run, from its record alone."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from caspr_cli.recipe.schema import OPTIMIZERS, Recipe
from caspr_cli.runs import record as records
from caspr_cli.runs.launch import OK, TERMINATED, Outcome
from caspr_cli.runs.record import DONE, FAILED, PREEMPTED, Record, RecordDamagedError
from caspr_cli.runs.sweep import ENDED, LOST, REFUSED, WAITING, Job

# Where TensorBoard gives one colour to all seeds of a recipe.
COMPARISON = "http://localhost:6006/?runColorGroup=regex:(.*)/&smoothing=0"
COMPARED = ("caspr", "shampoo", "adamw")  # where a run's own keys allow it


def footer(outcome: Outcome, *, anew: bool = False) -> list[str]:
    """What came of it and where it is.

    Args:
        anew: the command says resume=never, and would delete what there is.
    """
    record, status = outcome.record, outcome.record.status
    state = status.get("state")
    if state == DONE:
        return [*_results(record.result, ran=outcome.ran), f"record   {record.path}"]
    if state == FAILED:
        again = "add resume=retry to run it again" if not outcome.ran else f"log      {record.log}"
        return [f"failed   {status.get('error')}", again, f"record   {record.path}"]
    if state == records.REFUSED:
        return [f"refused  {status.get('error')}", f"log      {record.log}", f"record   {record.path}"]
    if state == PREEMPTED:
        saved = f"saved at step {status.get('step')}" if record.last.exists() else "before the first checkpoint"
        why = status.get("error") or "stopped on a signal"
        again = "the same command, without resume=never," if anew else "the same command"
        return [f"cut off  {why}", f"         {saved}; {again} continues", f"record   {record.path}"]
    return [f"record   {record.path}"]


def _results(result: dict[str, Any], *, ran: bool) -> list[str]:
    first = "done     " if ran else "skipped  this run is done already (resume=never runs it anew): "
    target, best, test = (result.get(part) or {} for part in ("target", "best", "test"))
    metric, seconds = target.get("metric") or "", result.get("seconds")
    tested = "  ".join(f"{name} {_value(test, name)}" for name in test) or "no test"
    lines = [
        f"{first}{_time(seconds)} of training, {_shown(result.get('steps'))} steps",
        f"result   {metric} {_value(result['final'], metric)} at the end, best {_value(best, metric)} "
        f"at step {_shown(best.get('step'))}; {tested}",
    ]
    if target.get("value") is not None:
        step = target.get("step")
        reached = "not reached" if step is None else f"reached at step {step}, after {_time(target.get('seconds'))}"
        lines.append(f"target   {metric} {target['value']:g}: {reached}")
    phases = {name: part for name, part in (result.get("optimizer_seconds") or {}).items() if part}
    if seconds and phases:
        parts = ", ".join(f"{name} {100 * part / seconds:.1f}" for name, part in phases.items())
        lines.append(
            f"optim    {100 * sum(phases.values()) / seconds:.1f} % of the time ({parts}); "
            f"state {(result.get('optimizer_state_bytes') or 0) / 1e6:.1f} MB"
        )
    return lines


def next_commands(recipe: Recipe, command: list[str]) -> list[str]:
    """How to see the curves, and how to compare: the command as given, over optimizers and seeds."""
    kept = [word for word in command[1:] if word.partition("=")[0] not in ("optim", "seed", "resume")]
    keys = {word.split(".")[1].partition("=")[0] for word in kept if word.startswith("optim.")}
    others = [name for name in COMPARED if keys <= {f.name for f in fields(OPTIMIZERS[name])}]
    own = [] if recipe.optim.name in others else [recipe.optim.name]
    return [
        f"next     tensorboard --logdir {shlex.quote(recipe.output_dir)}",
        f"         {shlex.join(['caspr-train', '-m', *kept, 'optim=' + ','.join(own + others), 'seed=0,1,2'])}",
    ]


def after_sweep(output_dir: str) -> list[str]:
    """How to compare what a sweep has made."""
    return [
        f"next     caspr-report compare {shlex.quote(output_dir)}",
        f"         tensorboard --logdir {shlex.quote(output_dir)}    and open {COMPARISON}",
    ]


def names(jobs: list[Job]) -> list[str]:
    """What tells each job from the others: its overrides without those that all have."""
    common = set(jobs[0].overrides).intersection(*(job.overrides for job in jobs[1:])) if len(jobs) > 1 else set()
    return [" ".join(word for word in job.overrides if word not in common) for job in jobs]


def result_of(job: Job) -> tuple[str, str, str]:
    """Its state, what came of it in one line, and where to look."""
    if job.state == WAITING:
        return "not started", "", ""
    if job.state == REFUSED or job.record is None:
        states: dict[int | None, str] = {OK: "planned", TERMINATED: "cut off"}
        return states.get(job.exit_code, "refused"), (job.why or "").partition("\n")[0], ""
    if job.state != ENDED:
        why = "its process is gone; the same command continues" if job.state == LOST else ""
        return ("lost" if job.state == LOST else "running"), why, job.record
    record = Record(Path(job.record))
    before = "" if job.ran else " before"
    try:
        status, result = record.status, record.result
    except RecordDamagedError as damage:
        return "damaged", str(damage), job.record
    if status.get("state") == DONE:
        metric = (result.get("target") or {}).get("metric") or ""
        test = metric.replace("val/", "test/")
        scores = (
            f"{metric} {_value(result.get('final') or {}, metric)}  {test} {_value(result.get('test') or {}, test)}"
        )
        return f"done{before}", f"{scores}  {_time(result.get('seconds'))}", job.record
    error = (job.why or status.get("error") or "").partition("\n")[0].removesuffix(f"; see {record.log}")
    if status.get("state") == PREEMPTED:
        saved = f"saved at step {status.get('step')}" if record.last.exists() else "before the first checkpoint"
        return "cut off", f"{error}; {saved}" if error else saved, job.record
    return "refused" if status.get("state") == records.REFUSED else f"failed{before}", error, str(record.log)


MOST_ROWS = 40  # of a table on the terminal


def table(jobs: list[Job]) -> list[str]:
    """How many jobs came to what, and one line for each; of more than a screen, one for all seeds of a recipe."""
    rows = [(str(job.number), name, *result_of(job)) for job, name in zip(jobs, names(jobs), strict=True)]
    counts = Counter(state for _, _, state, _, _ in rows)
    head = f"sweep    {len(jobs)} jobs: {', '.join(f'{n} {state}' for state, n in counts.items())}"
    titles, more = ("", "job", "state", "result", "record, or log of what failed"), list[str]()
    if len(rows) > MOST_ROWS:
        titles = ("jobs", "of", "state", "result: mean ± sd over seeds", "records, or log of what failed")
        rows = _over_seeds(jobs, rows)
    if (cut := len(rows) - MOST_ROWS) > 0:
        rows.sort(key=lambda row: row[2].startswith("done"))  # what failed is said first
        rows, more = rows[:MOST_ROWS], [f"... and {cut} more: caspr-report list"]
    rows.insert(0, titles)
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    # As wide as the results of those that are done; an error may be longer.
    widths.append(max(len(row[3]) for row in rows if row[2].startswith(("state", "done"))))
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows]
    return [head, *lines, *more]


Line = tuple[str, str, str, str, str]


def _over_seeds(jobs: list[Job], rows: list[Line]) -> list[Line]:
    """The rows of jobs that are done, one for all seeds of a recipe; the others as they are."""
    groups: dict[str, list[tuple[Job, Line]]] = {}
    for job, row in zip(jobs, rows, strict=True):
        done = row[2].startswith("done") and job.record is not None
        key = str(Path(job.record or "").parent) if done else f"job {job.number}"
        groups.setdefault(key, []).append((job, row))
    return [group[0][1] if key.startswith("job ") else _mean(key, group) for key, group in groups.items()]


def _mean(folder: str, group: list[tuple[Job, Line]]) -> Line:
    """One line for the seeds of a recipe."""
    results = [Record(Path(job.record)).result for job, _ in group if job.record]
    metric = results[0]["target"]["metric"]
    test = metric.replace("val/", "test/")
    what = "  ".join(f"{name} {_spread([result[part].get(name) for result in results])}"
                     for part, name in (("final", metric), ("test", test)))  # fmt: skip
    name = " ".join(word for word in group[0][1][1].split(" ") if not word.startswith("seed="))
    states = " and ".join(dict.fromkeys(row[2] for _, row in group))
    return str(len(group)), name, states, f"{what}  n = {len(group)}", folder


def _spread(values: list[float | None]) -> str:
    """Mean and standard deviation of those that are numbers."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return f"{known[0]:.4f}" if known else "-"
    lost = f" ({len(values) - len(known)} without)" if len(known) < len(values) else ""
    return f"{mean(known):.4f} ± {stdev(known):.4f}{lost}"


def _value(scores: dict[str, Any], metric: str) -> str:
    value = scores.get(metric)  # null where it was no number: nothing to measure it on
    return "-" if value is None else f"{value:.4f}"


def _shown(value: float | None) -> str:
    return "-" if value is None else str(value)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
