"""Warnings: what a reader of a table should know before believing it, one line each."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from caspr_cli.common.format import count, listed
from caspr_cli.common.shape import DONE, FAILED
from caspr_cli.report.format import interval
from caspr_cli.report.model import Row, Run, Trial
from caspr_cli.report.selection import (
    ABSENT,
    HELD_OUT,
    SPACE,
    Duplicate,
    Selection,
    frozen,
    plain,
    searched_keys,
    setting,
    settings,
    values_of,
)

FEW = 3  # a mean over fewer seeds gets a warning
EDGE = 3  # so many values make a range
BOUNDED = ("accuracy", "map")  # metrics from 0 to 1
NO_DIFF = hashlib.sha256(b"").hexdigest()[:16]


@dataclass(frozen=True)
class Built:
    """A row, and how it was made: ``runs`` are all its records, also the duplicates."""

    row: Row
    selection: Selection
    tuned: tuple[str, ...]
    runs: tuple[Run, ...]
    duplicates: tuple[Duplicate, ...]


def warnings(built: Sequence[Built]) -> list[str]:
    """Return all warnings about the rows of a table, the most important first."""
    rows = [each.row for each in built]
    return [
        *(line for row in rows for line in _unfinished(row)),
        *_list(f"fewer than {FEW} seeds", [f"{row.label} (n = {row.n})" for row in rows if 0 < row.n < FEW]),
        *_list(
            "the reported seeds selected the trial, too, which flatters it",
            [row.label for row in rows if row.runs and not row.held_out],
        ),
        *(line for each in built for line in _selected_oddly(each)),
        *_unequal_tuning(built),
        *(line for each in built for line in (*_budget(each), *_duplicates(each), *_edges(each))),
        *_list(
            "intervals beyond what the metric can be, so they cover less than 95 %",
            [f"{row.label} ({interval(row)})" for row in rows if _beyond(row)],
        ),
        *_differences(built),
    ]


def _list(what: str, names: Sequence[str], most: int = 5) -> Iterator[str]:
    if names:
        yield f"{what}: {listed(names, most)}"


def _numbers(seeds: Iterable[int]) -> str:
    return listed([str(seed) for seed in sorted(seeds)])


# ---- seeds and trials --------------------------------------------------------------------------------------------


def _unfinished(row: Row) -> Iterator[str]:
    """Yield the seeds that are reported, or would be, and have no value."""
    if row.selected is None:
        states = ", ".join(f"{n} {state}" for state, n in row.budget.items())
        yield f"{row.label}: no run is done with a finite value (trials: {states})"
        return
    if bad := [f"{run.seed} ({_why(run)})" for run in row.runs if run.final is None]:
        counted = f"{row.n} of {len(row.runs)} seeds count"
        yield f"{row.label}: {counted}: not seed {listed(bad)}; the mean is over the others"
    if going := [f"{run.seed} ({run.state})" for run in row.selected.runs if not run.ended]:
        yield f"{row.label}: not finished: seed {listed(going)}"


def _why(run: Run) -> str:
    if run.state == DONE:
        return "not finite"
    error = str(run.status.get("error") or "").partition("\n")[0]
    return f"failed: {error[:60]}{'...' * (len(error) > 60)}" if error else "failed"


def _selected_oddly(each: Built) -> Iterator[str]:
    """Yield where nothing selected the trial, or another one has the held-out seeds."""
    row, selection = each.row, each.selection
    if row.selected is None or not selection.seeds:
        return

    def held_out(trial: Trial) -> int:
        return sum(run.ended and run.seed not in selection.seeds for run in trial.runs)

    chosen, seeds = settings(row.selected.values), _numbers(selection.seeds)
    if all(score is None for score in selection.scores):
        yield f"{row.label}: every trial failed with seed {seeds}, which selects: nothing selected {chosen}"
    if not row.held_out:
        most = max(row.trials, key=held_out)
        if (n := held_out(most)) >= HELD_OUT:
            values = f"{settings(most.values)} has {n} held-out seeds"
            yield f"{row.label}: {values}, but seed {seeds} selects {chosen}: run held-out seeds of that"


def _unequal_tuning(built: Sequence[Built]) -> Iterator[str]:
    """Yield where rows have other numbers of trials, or of seeds that selected one."""
    trials = {each.row.label: len(each.row.trials) for each in built}
    selecting = {each.row.label: len(each.selection.seeds) for each in built if each.selection.seeds}
    for what, numbers in (("trials", trials), ("seeds that select", selecting)):
        if len(set(numbers.values())) > 1:
            yield f"unequal tuning, {what}: {listed([f'{label} {n}' for label, n in numbers.items()], 6)}"


def _budget(each: Built) -> Iterator[str]:
    row = each.row
    ended = row.budget.get(DONE, 0) + row.budget.get(FAILED, 0)
    planned = max(
        int(run.config.get("search.trials") or 0) if run.config.get("search.name") else 0 for run in each.runs
    )
    if ended < (total := max(planned, len(row.trials))):
        rest = [f", {n} {state}" for state, n in row.budget.items() if state not in (DONE, FAILED)]
        yield f"{row.label}: {ended} of {total} trials ended{''.join(rest)}"
    if n := each.selection.left_out:
        yield f"{row.label}: {count(n, 'trial')} without seed {_numbers(each.selection.seeds)}, which selects, left out"


def _duplicates(each: Built) -> Iterator[str]:
    if each.duplicates:
        keys = _differing(each.duplicates)
        how = f"differing in {listed(keys, 5)}" if keys else "with the same settings"
        what = f"{count(len(each.duplicates), 'record')} of a trial and seed that another has too, {how}"
        yield f"{each.row.label}: {what}: the one that came further, or later, counts"


def _differing(duplicates: Iterable[Duplicate]) -> list[str]:
    """Return the keys in which records of one trial and seed differ, and ``code`` where it is another."""
    found = set()
    for one in duplicates:
        ours, theirs = one.left_out.config, one.kept.config
        keys = (ours.keys() | theirs.keys()) - {"output_dir", "resume"}
        found |= {key for key in keys if frozen(ours.get(key)) != frozen(theirs.get(key))}
        found |= {"code"} if _code(one.left_out) != _code(one.kept) else set()
    return sorted(found)


def _edges(each: Built) -> Iterator[str]:
    """Yield selected values that are the smallest or largest of those tried."""
    row = each.row
    for key in each.tuned if row.selected else ():
        values = [trial.values[key] for trial in row.trials if key in trial.values and any(r.ended for r in trial.runs)]
        tried = sorted({v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)})
        best = row.selected.values.get(key) if row.selected else None
        if len(tried) >= EDGE and best in (tried[0], tried[-1]):
            end = "smallest" if best == tried[0] else "largest"
            span = f"{len(tried)} tried ({plain(tried[0])} to {plain(tried[-1])})"
            yield f"{row.label}: {setting(key, best)} is the {end} of {span}: beyond it may be better"


def _beyond(row: Row) -> bool:
    """Return whether an interval contains what the metric cannot be."""
    bounded = row.runs and row.runs[0].metric.rpartition("/")[2] in BOUNDED
    if not bounded or row.mean is None or row.ci_low is None or row.ci_high is None:
        return False
    return 0 <= row.mean <= 1 and (row.ci_low < 0 or row.ci_high > 1)


def targets_differ(rows: Sequence[Row], target: float | None) -> list[str]:
    values = {run.config.get("task.target.value") for row in rows for trial in row.trials for run in trial.runs}
    if len(values) < 2 or target is None:
        return []
    given = ", ".join(sorted(plain(value) for value in values))
    return [f"targets of the runs differ ({given}): times are to {plain(target)}; --target TASK=VALUE sets one for all"]


# ---- what should be the same in all runs -------------------------------------------------------------------------


def _differences(built: Sequence[Built]) -> Iterator[str]:
    """Yield settings, ranges of a search, code, versions and hardware of which rows or runs have several."""
    asked: list[tuple[str, Callable[[Row, Run], str | None]]] = [
        *((key, partial(_setting, key)) for key in _unequal([each.row for each in built])),
        ("trainer.val_every", lambda _, run: _value(run, "trainer.val_every")),  # when a target is noticed
        *((f"{SPACE}{key}", partial(_range, key)) for key in sorted(searched_keys(r for e in built for r in e.runs))),
        ("code", lambda _, run: _code(run)),
        ("torch", lambda _, run: (run.provenance.get("packages") or {}).get("torch")),
        ("hardware", lambda _, run: _hardware(run)),
    ]
    for what, of in asked:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for each in built:
            for run in each.runs:
                if run.ended and (value := of(each.row, run)) is not None:
                    counts[value][each.row.label] += 1
        if len(counts) > 1:
            yield f"different {what}: {'; '.join(_groups(counts, len(built)))}"


def _groups(counts: dict[str, Counter[str]], rows: int, most: int = 4) -> Iterator[str]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1].total(), item[0]))
    for value, labels in ranked[:most]:
        where = "all rows" if len(labels) == rows > 1 else listed(list(labels), 3)
        yield f"{value} ({where}, {count(labels.total(), 'run')})"
    if len(ranked) > most:
        yield f"{len(ranked) - most} more"


def _unequal(rows: Sequence[Row]) -> list[str]:
    """Return keys, but the optimizers' own, of which one optimizer has other values than another.

    Where all have the same several values they are variants, and labels show them.
    """
    by_optimizer: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_optimizer[row.optim].append({key: value for key, value in row.settings.items() if value != ABSENT})
    found: dict[str, set[frozenset[str]]] = defaultdict(set)
    for configs in by_optimizer.values():
        for key, values in values_of(configs).items():
            found[key].add(frozenset(values))
    return sorted(key for key, own in found.items() if len(own) > 1 and not key.startswith("optim."))


def _setting(key: str, row: Row, run: Run) -> str | None:
    return plain(row.settings[key]) if row.settings.get(key, ABSENT) != ABSENT else None


def _value(run: Run, key: str) -> str | None:
    return plain(run.config[key]) if key in run.config else None


def _range(key: str, row: Row, run: Run) -> str | None:
    """Return ``log 0.001,0.1``; None if this run's search does not vary the key."""
    kinds = (name for name in run.config if name.rpartition(".")[0] == f"{SPACE}{key}")
    return " ".join(f"{name.rpartition('.')[2]} {plain(run.config[name])}" for name in sorted(kinds)) or None


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
    return f"{name}, {processes_and_threads(device)}"


def processes_and_threads(device: dict[str, Any]) -> str:
    processes, threads = (int(device.get(key) or 1) for key in ("processes", "threads"))
    return f"{count(processes, 'process', 'es')}, {count(threads, 'thread')}"
