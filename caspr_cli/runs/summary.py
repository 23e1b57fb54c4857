"""The last lines of a run and the table of a sweep, from records alone."""

import shlex
import sys
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from caspr_cli.common.exits import OK, TERMINATED
from caspr_cli.common.format import duration, size
from caspr_cli.common.format import table as aligned
from caspr_cli.recipe.checks import takes
from caspr_cli.recipe.schema import Recipe, Source
from caspr_cli.runs.launch import Outcome
from caspr_cli.runs.record import DONE, FAILED, PREEMPTED, Record, RecordDamagedError
from caspr_cli.runs.record import REFUSED as RECORD_REFUSED
from caspr_cli.runs.sweep import ENDED, LOST, REFUSED, WAITING, Job

# TensorBoard's page on which all seeds of a recipe have one colour.
COMPARISON = "http://localhost:6006/?runColorGroup=regex:(.*)/&smoothing=0"
# Keys of one run's own, and the flags that say that it is one run.
NOT_REPEATED = ("optim", "optim.lr", "seed", "resume", "debug", "search", "trial", "-r", "--run")
SEARCH = ["search=lr", "trial=range(6)"]
COMPARED = ("caspr", "shampoo", "adamw")  # where a run's own keys allow it


def footer(outcome: Outcome, *, anew: bool = False) -> list[str]:
    """Return the lines that say how a run ended and where its record is; ``anew``: the command has resume=never."""
    record, status = outcome.record, outcome.record.status
    state = status.get("state")
    if state is None:
        return [f"cut off  {record.path} was removed while the run wrote to it; the same command begins anew"]
    if state == DONE:
        return [*_results(record.result, ran=outcome.ran), f"record   {record.path}"]
    if state == FAILED:
        again = "add resume=retry to run it again" if not outcome.ran else f"log      {record.log}"
        return [f"failed   {status.get('error')}", again, f"record   {record.path}"]
    if state == RECORD_REFUSED:
        return [f"refused  {status.get('error')}", f"log      {record.log}", f"record   {record.path}"]
    if state == PREEMPTED:
        saved = _saved(record, status)
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
        f"{first}{duration(seconds)} of training, {_shown(result.get('steps'))} steps",
        f"result   {metric} {_value(result['final'], metric)} at the end, best {_value(best, metric)} "
        f"at step {_shown(best.get('step'))}; {tested}",
    ]
    if target.get("value") is not None:
        step = target.get("step")
        reached = "not reached" if step is None else f"reached at step {step}, after {duration(target.get('seconds'))}"
        lines.append(f"target   {metric} {target['value']:g}: {reached}")
    phases = {name: part for name, part in (result.get("optimizer_seconds") or {}).items() if part}
    if seconds and phases:
        parts = ", ".join(f"{name} {100 * part / seconds:.1f}" for name, part in phases.items())
        lines.append(
            f"optim    {100 * sum(phases.values()) / seconds:.1f} % of the time ({parts}); "
            f"state {size(result.get('optimizer_state_bytes') or 0)}"
        )
    return lines


def _saved(record: Record, status: dict[str, Any]) -> str:
    return f"saved at step {status.get('step')}" if record.last.exists() else "before the first checkpoint"


def next_commands(recipe: Recipe, command: list[str]) -> list[str]:
    """Return the commands that show the curves, and that repeat the given one over optimizers and seeds.

    A learning rate that was given is one optimizer's own, and none was tuned for data of the user: then each has a
    search for it in place of the seeds.
    """
    kept = [word for word in command[1:] if word.partition("=")[0] not in NOT_REPEATED]
    untuned = recipe.task.data == Source.files or "optim.lr" in {word.partition("=")[0] for word in command}
    over = SEARCH if untuned else ["seed=0,1,2"]
    keys = {word.split(".")[1].partition("=")[0] for word in kept if word.startswith("optim.")}
    others = [name for name in COMPARED if all(takes(name, key, getattr(recipe.optim, key)) for key in keys)]
    own = [] if recipe.optim.name in others else [recipe.optim.name]
    return [
        f"next     tensorboard --logdir {shlex.quote(recipe.output_dir)}",
        f"         {shlex.join(['caspr-train', '-m', *kept, 'optim=' + ','.join(own + others), *over])}",
    ]


def after_sweep(output_dir: str) -> list[str]:
    """Return the commands that compare the runs of a sweep, and TensorBoard's address."""
    return [
        f"next     caspr-report compare {shlex.quote(output_dir)}",
        f"         tensorboard --logdir {shlex.quote(output_dir)}",
        f"open     {COMPARISON}",
    ]


def names(jobs: list[Job]) -> list[str]:
    """Return for each job its overrides without those that all jobs have."""
    common = set(jobs[0].overrides).intersection(*(job.overrides for job in jobs[1:])) if len(jobs) > 1 else set()
    return [" ".join(word for word in job.overrides if word not in common) for job in jobs]


def result_of(job: Job) -> tuple[str, str, str]:
    """Return a job's state, its result or error in one line, and where to look."""
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
        final, tested = _value(result.get("final") or {}, metric), _value(result.get("test") or {}, test)
        took = duration(result.get("seconds"))
        return f"done{before}", f"{metric} {final}  {test} {tested}  {took}", job.record
    error = (job.why or status.get("error") or "").partition("\n")[0].removesuffix(f"; see {record.log}")
    if status.get("state") == PREEMPTED:
        saved = _saved(record, status)
        return "cut off", f"{error}; {saved}" if error else saved, job.record
    return "refused" if status.get("state") == RECORD_REFUSED else f"failed{before}", error, str(record.log)


MOST_ROWS = 40  # of a table on the terminal


def left(jobs: list[Job], seconds: float) -> str:
    """Return about how long the jobs that have not ended take, after so many seconds; empty if it is not known."""
    ended = [job for job in jobs if job.state in (ENDED, REFUSED)]
    ran = sum(job.ran and job.state == ENDED for job in ended)
    if not ran or len(ended) == len(jobs):
        return ""
    return f", {roughly(seconds / ran * (len(jobs) - len(ended)))} left"


def roughly(seconds: float) -> str:
    """Return a duration in its largest unit, as ``2 min``."""
    for unit, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def brief(job: Job) -> list[str]:
    """Return how a job ended, in as few words as possible."""
    state, result, where = result_of(job)
    if not state.startswith("done"):
        return [state, result, where]
    found = Record(Path(job.record or "")).result
    metric = (found.get("target") or {}).get("metric") or ""
    return [f"{metric} {_value(found.get('final') or {}, metric)}", duration(found.get("seconds")), state[5:]]


def table(jobs: list[Job], width: int = sys.maxsize) -> list[str]:
    """Return the number of jobs by state, and a line for each; if they fill more than a screen, one for each recipe.

    Where lines are longer than ``width``, the records are left out.
    """
    rows = [(str(job.number), name, *result_of(job)) for job, name in zip(jobs, names(jobs), strict=True)]
    counts = Counter(state for _, _, state, _, _ in rows)
    head = f"sweep    {len(jobs)} jobs: {', '.join(f'{n} {state}' for state, n in counts.items())}"
    titles, more = ("", "job", "state", "result", "record, or log of what failed"), list[str]()
    if len(rows) > MOST_ROWS:
        titles = ("jobs", "of", "state", "result: mean ± sd over seeds", "records, or log of what failed")
        rows = _over_seeds(jobs, rows)
    if (cut := len(rows) - MOST_ROWS) > 0:
        rows.sort(key=lambda row: row[2].startswith("done"))  # failures first
        rows, more = rows[:MOST_ROWS], [f"... and {cut} more: caspr-report list"]
    # The column of results is as wide as those of runs that are done; an error may be longer.
    widest = max(len(row[3]) for row in [titles, *rows] if row[2].startswith(("state", "of", "done")))
    cells = [(*row[:3], f"{row[3]:<{widest}}  {row[4]}") for row in [titles, *rows]]
    lines = aligned(cells, right=[False] * 4)
    if max(map(len, lines)) > width:
        done = [(*row[:4], "" if row[2].startswith(("done", "of", "state")) else row[4]) for row in [titles, *rows]]
        lines = aligned([(*row[:3], f"{row[3]}  {row[4]}".rstrip()) for row in done], right=[False] * 4)
        more.append("(no room for the records: caspr-report list has them)")
    return [head, *lines, *more]


Line = tuple[str, str, str, str, str]


def _over_seeds(jobs: list[Job], rows: list[Line]) -> list[Line]:
    """Return one row for all seeds of a recipe that are done, and the other rows as they are."""
    groups: dict[str, list[tuple[Job, Line]]] = {}
    for job, row in zip(jobs, rows, strict=True):
        done = row[2].startswith("done") and job.record is not None
        key = str(Path(job.record or "").parent) if done else f"job {job.number}"
        groups.setdefault(key, []).append((job, row))
    return [group[0][1] if key.startswith("job ") else _mean(key, group) for key, group in groups.items()]


def _mean(folder: str, group: list[tuple[Job, Line]]) -> Line:
    """Return one row for the seeds of a recipe."""
    results = [Record(Path(job.record)).result for job, _ in group if job.record]
    metric = results[0]["target"]["metric"]
    test = metric.replace("val/", "test/")
    what = "  ".join(f"{name} {_spread([result[part].get(name) for result in results])}"
                     for part, name in (("final", metric), ("test", test)))  # fmt: skip
    name = " ".join(word for word in group[0][1][1].split(" ") if not word.startswith("seed="))
    states = " and ".join(dict.fromkeys(row[2] for _, row in group))
    return str(len(group)), name, states, f"{what}  n = {len(group)}", folder


def _spread(values: list[float | None]) -> str:
    """Return mean and standard deviation of the values that are numbers."""
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
