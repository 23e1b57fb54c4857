"""What a reader of a table should know before believing it: one line for each."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from caspr_cli.report.model import DONE, Row, Run
from caspr_cli.report.rows import ended, frozen, plain, setting
from caspr_cli.report.selection import Selection
from caspr_cli.report.words import count, listed

FEW = 3  # fewer seeds than this are warned of
EDGE = 3  # so many values make a range
NO_DIFF = hashlib.sha256(b"").hexdigest()[:16]


@dataclass(frozen=True)
class Built:
    """A row, and how it came about."""

    row: Row
    selection: Selection
    tuned: tuple[str, ...]
    twice: int


def warnings(built: Sequence[Built]) -> list[str]:
    """All of them, in the order in which they matter."""
    rows = [each.row for each in built]
    return [
        *_unfinished(rows),
        *_few_seeds(rows),
        *_selected_by_reported(built),
        *_unequal_tuning(rows),
        *(line for each in built for line in (*_budget(each), *_edges(each))),
        *_differences(rows),
    ]


def _unfinished(rows: Sequence[Row]) -> Iterator[str]:
    """Seeds that are reported, or would be, and have no number."""
    for row in rows:
        if row.selected is None:
            states = ", ".join(f"{n} {state}" for state, n in row.budget.items())
            yield f"{row.label}: no run is done with a finite value (trials: {states})"
            continue
        if bad := [run for run in row.runs if run.final is None]:
            seeds = listed([f"{run.seed} ({_why(run)})" for run in bad])
            yield f"{row.label}: {row.n} of {len(row.runs)} seeds count: not seed {seeds}; the mean is over the others"
        if going := [run for run in row.selected.runs if not ended(run)]:
            seeds = listed([f"{run.seed} ({run.state})" for run in going])
            yield f"{row.label}: not finished: seed {seeds}"


def _why(run: Run) -> str:
    if run.state == DONE:
        return "not finite"
    error = str(run.status.get("error") or "").partition("\n")[0]
    return f"failed: {error[:60]}{'...' * (len(error) > 60)}" if error else "failed"


def _few_seeds(rows: Sequence[Row]) -> Iterator[str]:
    if few := [f"{row.label} (n = {row.n})" for row in rows if 0 < row.n < FEW]:
        yield f"fewer than {FEW} seeds: {listed(few, 5)}"


def _selected_by_reported(built: Sequence[Built]) -> Iterator[str]:
    if labels := [each.row.label for each in built if each.row.runs and not each.row.fresh]:
        yield f"seeds that chose the trial are among those reported, which flatters: {listed(labels, 5)}"


def _unequal_tuning(rows: Sequence[Row]) -> Iterator[str]:
    numbers = {row.label: len(row.trials) for row in rows}
    if len(set(numbers.values())) > 1:
        yield f"unequal tuning, trials: {listed([f'{label} {n}' for label, n in numbers.items()], 6)}"


def _budget(each: Built) -> Iterator[str]:
    row = each.row
    over = sum(n for state, n in row.budget.items() if state in (DONE, "failed"))
    planned = max((_planned(run) for trial in row.trials for run in trial.runs), default=0)
    if over < max(planned, len(row.trials)):
        rest = [f"{n} {state}" for state, n in row.budget.items() if state not in (DONE, "failed")]
        yield f"{row.label}: {over} of {max(planned, len(row.trials))} trials ended{''.join(f', {r}' for r in rest)}"
    if each.selection.left_out:
        seeds = listed([str(seed) for seed in sorted(each.selection.seeds)])
        yield f"{row.label}: {count(each.selection.left_out, 'trial')} without seed {seeds}, which chooses, left out"
    if each.twice:
        yield f"{row.label}: {count(each.twice, 'record')} of a trial and seed that another has too: one of each counts"


def _planned(run: Run) -> int:
    return int(run.config.get("search.trials") or 0) if run.config.get("search.name") else 0


def _edges(each: Built) -> Iterator[str]:
    """Selected values with nothing beyond them among those tried."""
    row = each.row
    for key in each.tuned if row.selected else ():
        values = [trial.values[key] for trial in row.trials if key in trial.values and any(map(ended, trial.runs))]
        tried = sorted({v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)})
        best = row.selected.values.get(key) if row.selected else None
        if len(tried) >= EDGE and best in (tried[0], tried[-1]):
            end = "smallest" if best == tried[0] else "largest"
            yield (
                f"{row.label}: {setting(key, best)} is the {end} of {len(tried)} tried "
                f"({plain(tried[0])} to {plain(tried[-1])}): beyond it may be better"
            )


def targets_differ(rows: Sequence[Row], target: float | None) -> list[str]:
    values = {run.config.get("task.target.value") for run in _runs(rows)}
    if len(values) < 2 or target is None:
        return []
    given = ", ".join(sorted(plain(value) for value in values))
    return [f"targets of the runs differ ({given}): times are to {plain(target)}; --target TASK=VALUE sets one for all"]


def _runs(rows: Sequence[Row]) -> Iterator[Run]:
    return (run for row in rows for trial in row.trials for run in trial.runs)


def _differences(rows: Sequence[Row]) -> Iterator[str]:
    """What should be the same in all runs of a table."""
    asked: list[tuple[str, Callable[[Run], str | None]]] = [
        ("trainer.max_steps", lambda run: _config(run, "trainer.max_steps")),
        ("trainer.val_every", lambda run: _config(run, "trainer.val_every")),  # when a target is noticed
        ("task.batch_size", lambda run: _config(run, "task.batch_size")),
        ("data", lambda run: (run.provenance.get("data") or {}).get("hash")),
        ("code", _code),
        ("torch", lambda run: (run.provenance.get("packages") or {}).get("torch")),
        ("hardware", _hardware),
    ]
    for what, of in asked:
        counts: dict[str, Counter[str]] = {}
        for row in rows:
            for run in _runs([row]):
                if ended(run) and (value := of(run)) is not None:
                    counts.setdefault(value, Counter())[row.label] += 1
        if len(counts) > 1:
            yield f"different {what}: {'; '.join(_groups(counts, rows))}"


def _config(run: Run, key: str) -> str | None:
    return None if key not in run.config else frozen(run.config[key])


def _groups(counts: dict[str, Counter[str]], rows: Sequence[Row], most: int = 4) -> Iterator[str]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1].total(), item[0]))
    for value, labels in ranked[:most]:
        where = "all rows" if len(labels) == len(rows) > 1 else listed(list(labels), 3)
        yield f"{value} ({where}, {count(labels.total(), 'run')})"
    if len(ranked) > most:
        yield f"{len(ranked) - most} more"


def _code(run: Run) -> str | None:
    code: dict[str, Any] | None = run.provenance.get("code")
    if not code:
        version = run.provenance.get("caspr_cli")
        return f"version {version}" if version else None
    commit, diff = str(code.get("commit"))[:8], code.get("diff_sha256")
    return commit if diff in (None, NO_DIFF) else f"{commit} with changes {str(diff)[:8]}"


def _hardware(run: Run) -> str | None:
    device = run.provenance.get("device") or {}
    if not device:
        return None
    machine = run.provenance.get("machine") or {}
    name = device.get("name") if device.get("type") != "cpu" else machine.get("processor") or "cpu"
    processes, threads = (int(device.get(key) or 1) for key in ("processes", "threads"))
    width = f"{count(processes, 'process', 'es')}, {count(threads, 'thread')}"
    return f"{name}, {width}, {run.config.get('trainer.precision')}"
