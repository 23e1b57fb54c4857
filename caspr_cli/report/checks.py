"""What a reader of a table should know before believing it: one line for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from caspr_cli.report import alike
from caspr_cli.report.model import DONE, Row, Run, Trial
from caspr_cli.report.rows import Twice, ended, plain, setting
from caspr_cli.report.selection import FRESH, Selection
from caspr_cli.report.words import count, listed, number

FEW = 3  # fewer seeds than this are warned of
EDGE = 3  # so many values make a range
BOUNDED = ("accuracy", "map")  # metrics from 0 to 1


@dataclass(frozen=True)
class Built:
    """A row, and how it came about: ``runs`` are all of it, also those that are there ``twice``."""

    row: Row
    selection: Selection
    tuned: tuple[str, ...]
    runs: tuple[Run, ...]
    twice: tuple[Twice, ...]


def warnings(built: Sequence[Built]) -> list[str]:
    """All of them, in the order in which they matter."""
    rows = [each.row for each in built]
    return [
        *_unfinished(rows),
        *_few_seeds(rows),
        *_selected_by_reported(built),
        *(line for each in built for line in _chosen_oddly(each)),
        *_unequal_tuning(built),
        *(line for each in built for line in (*_budget(each), *_edges(each))),
        *_beyond(rows),
        *alike.differences([(each.row, each.runs) for each in built]),
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


def _chosen_oddly(each: Built) -> Iterator[str]:
    """A trial that nothing chose, or one that is not the one that was run at fresh seeds."""
    row, selection = each.row, each.selection
    if row.selected is None or not selection.seeds:
        return
    chosen, seeds = _values(row.selected), listed([str(seed) for seed in sorted(selection.seeds)])
    if all(score is None for score in selection.scores):
        yield f"{row.label}: every trial failed with seed {seeds}, which chooses: nothing chose {chosen}"
    if not row.fresh:
        most = max(row.trials, key=lambda trial: _fresh(trial, selection))
        if (n := _fresh(most, selection)) >= FRESH:
            yield (
                f"{row.label}: {_values(most)} has {n} seeds that chose nothing, but seed {seeds} chose {chosen}: "
                "run that at fresh seeds"
            )


def _fresh(trial: Trial, selection: Selection) -> int:
    return sum(ended(run) and run.seed not in selection.seeds for run in trial.runs)


def _values(trial: Trial) -> str:
    return " ".join(setting(key, value) for key, value in trial.values.items())


def _unequal_tuning(built: Sequence[Built]) -> Iterator[str]:
    """Other numbers of trials, or of seeds by which they were chosen."""
    trials = {each.row.label: len(each.row.trials) for each in built}
    choosing = {each.row.label: len(each.selection.seeds) for each in built if each.selection.seeds}
    for what, numbers in (("trials", trials), ("seeds that choose", choosing)):
        if len(set(numbers.values())) > 1:
            yield f"unequal tuning, {what}: {listed([f'{label} {n}' for label, n in numbers.items()], 6)}"


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
        keys = alike.telling_apart(each.twice)
        how = f"differing in {listed(keys, 5)}" if keys else "with the same settings"
        what = f"{count(len(each.twice), 'record')} of a trial and seed that another has too, {how}"
        yield f"{row.label}: {what}: the one that came further, or later, counts"


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


def _beyond(rows: Sequence[Row]) -> Iterator[str]:
    """Intervals that contain what the metric cannot be."""
    over = [
        f"{row.label} ({number(row.ci_low, row.sd)} to {number(row.ci_high, row.sd)})"
        for row in rows
        if row.runs and row.runs[0].metric.rpartition("/")[2] in BOUNDED and row.mean is not None and 0 <= row.mean <= 1
        if row.ci_low is not None and row.ci_high is not None and (row.ci_low < 0 or row.ci_high > 1)
    ]
    if over:
        yield f"intervals beyond what the metric can be, so they cover less than 95 %: {listed(over, 5)}"
