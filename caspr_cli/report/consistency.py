"""Warnings: what a reader of a table should know before believing it, one line each."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from caspr_cli.common.format import count, listed
from caspr_cli.common.shape import DONE, FAILED
from caspr_cli.report import provenance
from caspr_cli.report.format import interval
from caspr_cli.report.model import HELD_OUT, Row, Run, Trial
from caspr_cli.report.selection import ABSENT
from caspr_cli.report.settings import SPACE, differing, joined, plain, ranges, setting, values_of
from caspr_cli.report.trials import edges, why

FEW = 3  # a mean over fewer seeds gets a warning
MOST_VALUES = 4  # of a setting that differs, in a warning
BOUNDED = ("accuracy", "map")  # metrics from 0 to 1


def warnings(rows: Sequence[Row]) -> list[str]:
    """Return all warnings about the rows of a table, the most important first."""
    return [
        *(line for row in rows for line in _unfinished(row)),
        *_list(f"fewer than {FEW} seeds", [f"{row.label} (n = {row.n})" for row in rows if 0 < row.n < FEW]),
        *_list(
            "the reported seeds selected the trial, too, which flatters it",
            [row.label for row in rows if row.runs and not row.held_out],
        ),
        *(line for row in rows for line in _selected_oddly(row)),
        *_unequal_tuning(rows),
        *_list(
            "ranges that grew, as the best value lay at the edge",
            [f"{row.label} ({listed(keys)})" for row in rows if (keys := _grown(row))],
        ),
        *(line for row in rows for line in (*_budget(row), *_duplicates(row), *_edges(row))),
        *_list(
            "intervals beyond what the metric can be, so they cover less than 95 %",
            [f"{row.label} ({interval(row.validation)})" for row in rows if _beyond(row)],
        ),
        *_differences(rows),
    ]


def _list(what: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        yield f"{what}: {listed(names, 5)}"


def _unfinished(row: Row) -> Iterator[str]:
    """Yield a warning for reported seeds that have no value, and for seeds that have not finished."""
    if row.selected is None:
        states = ", ".join(f"{n} {state}" for state, n in row.budget.items())
        yield f"{row.label}: no run is done with a finite value (trials: {states})"
        return
    if bad := [f"{run.seed} ({why(run)})" for run in row.runs if run.final is None]:
        counted = f"{row.n} of {len(row.runs)} seeds count"
        yield f"{row.label}: {counted}: not seed {listed(bad)}; the mean is over the others"
    if going := [f"{run.seed} ({run.state})" for run in row.selected.runs if not run.ended]:
        yield f"{row.label}: not finished: seed {listed(going)}"


def _selected_oddly(row: Row) -> Iterator[str]:
    """Yield a warning if no value selected the trial, or if another trial has the held-out seeds."""
    if row.selected is None or not row.selecting:
        return

    def held_out(trial: Trial) -> int:
        return len(trial.ended.keys() - row.selecting)

    chosen, seeds = joined(row.selected.values), listed(sorted(row.selecting))
    if all(score is None for score in row.scores.values()):
        yield f"{row.label}: every trial failed with seed {seeds}, which selects: nothing selected {chosen}"
    if not row.held_out:
        most = max(row.trials, key=held_out)
        if (n := held_out(most)) >= HELD_OUT:
            values = f"{joined(most.values)} has {n} held-out seeds"
            yield f"{row.label}: {values}, but seed {seeds} selects {chosen}: run held-out seeds of that"


def _unequal_tuning(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a warning if rows differ in their numbers of trials, or of seeds that select."""
    trials = {row.label: len(row.trials) for row in rows if not row.untuned}
    selecting = {row.label: len(row.selecting) for row in rows if row.selecting}
    for what, numbers in (("trials", trials), ("seeds that select", selecting)):
        if len(set(numbers.values())) > 1:
            yield f"unequal tuning, {what}: {listed([f'{label} {n}' for label, n in numbers.items()], 6)}"


def _grown(row: Row) -> list[str]:
    """Return the keys whose ranges grew during the search (search.extend); those of a refined trial are points."""
    found: dict[bool, set[tuple[str, str]]] = {True: set(), False: set()}
    for run in row.records:
        spaces = ranges(run.config).items()
        found[run.further] |= {(key, plain(numbers)) for key, (kind, numbers) in spaces if kind != "choice"}
    return sorted({key for key, _ in found[True] - found[False]})


def _budget(row: Row) -> Iterator[str]:
    ended = row.budget.get(DONE, 0) + row.budget.get(FAILED, 0)
    planned = [int(run.config.get("search.trials") or 0) for run in row.records if run.config.get("search.name")]
    if ended < (total := max(*planned, len(row.trials), 0)):
        rest = [f", {n} {state}" for state, n in row.budget.items() if state not in (DONE, FAILED)]
        yield f"{row.label}: {ended} of {total} trials ended{''.join(rest)}"
    if n := sum(bool(trial.ended) for trial in row.trials) - len(row.scores):
        yield f"{row.label}: {count(n, 'trial')} without seed {listed(sorted(row.selecting))}, which selects, left out"


def _duplicates(row: Row) -> Iterator[str]:
    """Yield a warning for several records of one trial and seed, with the keys in which they differ."""
    several = [runs for _, seeds in row.by_trial for runs in seeds.values() if len(runs) > 1]
    found = set()
    for runs in several:
        keys = {key for run in runs for key in run.config} - {"output_dir", "resume"}
        found |= set(differing({key: run.config.get(key) for key in keys} for run in runs))
        found |= {"code"} if len(set(map(provenance.code, runs))) > 1 else set()
    if several:
        how = f"differing in {listed(sorted(found), 5)}" if found else "with the same settings"
        more = count(sum(len(runs) - 1 for runs in several), "record")
        what = f"{more} of a trial and seed that another has too, {how}"
        yield f"{row.label}: {what}: the one that came further, or later, counts"


def _edges(row: Row) -> Iterator[str]:
    """Yield a warning for each selected value that is the smallest or the largest that was tried."""
    for key, end, tried in edges(row):
        best = setting(key, tried[0 if end == "smallest" else -1])
        span = f"{len(tried)} tried ({plain(tried[0])} to {plain(tried[-1])})"
        yield f"{row.label}: {best} is the {end} of {span}: beyond it may be better"


def _beyond(row: Row) -> bool:
    """Return whether the interval contains values that the metric cannot have."""
    of = row.validation
    bounded = row.runs and row.runs[0].metric.rpartition("/")[2] in BOUNDED
    return bool(bounded) and 0 <= (of.mean or 0.0) <= 1 and any(not 0 <= end <= 1 for end in of.ends)


def targets_differ(rows: Sequence[Row], target: float | None) -> list[str]:
    values = {run.config.get("task.target.value") for row in rows for trial in row.trials for run in trial.runs}
    if len(values) < 2 or target is None:
        return []
    given = ", ".join(sorted(plain(value) for value in values))
    return [f"targets of the runs differ ({given}): times are to {plain(target)}; --target TASK=VALUE sets one for all"]


def _differences(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a warning for each setting, range, code, version and hardware that is not the same in all runs."""
    searched = sorted({key for row in rows for run in row.records for key in ranges(run.config)})
    asked: list[tuple[str, Callable[[Row, Run], str | None]]] = [
        *((key, lambda row, _, key=key: _shown(row.settings, key)) for key in _unequal(rows)),
        ("trainer.val_every", lambda _, run: _shown(run.config, "trainer.val_every")),  # when a target is noticed
        *((f"{SPACE}{key}", partial(_range, key)) for key in searched),
        ("code", lambda _, run: provenance.code(run) or None),
        ("torch", lambda _, run: (run.provenance.get("packages") or {}).get("torch")),
        ("hardware", lambda _, run: provenance.hardware(run) or None),
    ]
    for what, of in asked:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for row in rows:
            for run in row.records:
                if run.ended and (value := of(row, run)) is not None:
                    counts[value][row.label] += 1
        if len(counts) > 1:
            yield f"different {what}: {'; '.join(_groups(counts, len(rows)))}"


def _groups(counts: dict[str, Counter[str]], rows: int) -> Iterator[str]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1].total(), item[0]))
    for value, labels in ranked[:MOST_VALUES]:
        where = "all rows" if len(labels) == rows > 1 else listed(list(labels), 3)
        yield f"{value} ({where}, {count(labels.total(), 'run')})"
    if len(ranked) > MOST_VALUES:
        yield f"{len(ranked) - MOST_VALUES} more"


def _unequal(rows: Sequence[Row]) -> list[str]:
    """Return the keys, except the optimizers' own, whose values differ between optimizers.

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


def _shown(settings: Mapping[str, Any], key: str) -> str | None:
    return None if settings.get(key, ABSENT) == ABSENT else plain(settings[key])


def _range(key: str, row: Row, run: Run) -> str | None:
    """Return ``log 0.001,0.1``; None if this run's search does not vary the key, or its range may have grown."""
    kind, numbers = ranges(run.config).get(key, ("", None))
    return None if run.further or not kind else f"{kind} {plain(numbers)}"
