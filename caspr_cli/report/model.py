"""The values of a report: records are read into these, tables and figures are made from these."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from caspr_cli.common.selection import Choice, choose, finite, reaches
from caspr_cli.common.shape import DONE, FAILED, KINDS, DamagedError
from caspr_cli.report import stats
from caspr_cli.report.settings import expanded, frozen, plain
from caspr_cli.report.stats import Comparison, Summary

HELD_OUT = 2  # with so many seeds that took no part in the selection, only these are reported


@dataclass(frozen=True)
class Point:
    """The metric of a task at one validation."""

    step: int
    seconds: float | None  # of training so far; None if the record does not have it
    value: float | None  # None: not finite


def point(step: Any, seconds: Any, value: Any) -> Point:
    """Return a validation; what is not finite is None.

    Raises DamagedError if the step is no integer, or another of the three no number.
    """
    if not KINDS["integer"](step) or not all(x is None or type(x) in (int, float) for x in (seconds, value)):
        raise DamagedError("a validation has other values than numbers")
    return Point(step, None if seconds is None or not KINDS["number"](seconds) else float(seconds), finite(value))


@dataclass(frozen=True)
class Run:
    path: str  # its directory; for a packed record, `<file>:<path it had>`
    config: dict[str, Any]  # dotted keys of the recipe, as `optim.lr`; a list is one value
    status: dict[str, Any]  # status, result, provenance: the JSON files; empty where there is none yet
    result: dict[str, Any]
    provenance: dict[str, Any]
    curve: tuple[Point, ...] = ()  # the validations, by step

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def folder(self) -> str:
        """The directory of all its seeds."""
        return self.path.rpartition("/")[0] or self.path

    @property
    def metric(self) -> str:
        return str(self.config["task.target.metric"])

    @property
    def state(self) -> str:
        return str(self.status.get("state", "new"))

    @property
    def ended(self) -> bool:
        return self.state in (DONE, FAILED)

    @cached_property
    def final(self) -> float | None:
        """The metric at the end; None if the run is not done, or the value not finite."""
        return self._at_the_end("final", self.metric)

    @cached_property
    def test(self) -> float | None:
        return self._at_the_end("test", self.metric.replace("val/", "test/"))

    def _at_the_end(self, part: str, metric: str) -> float | None:
        return finite((self.result.get(part) or {}).get(metric)) if self.state == DONE else None

    @property
    def further(self) -> bool:
        """Whether its trial is none of the first, so that it follows from others (search.extend, search.refine)."""
        trial, planned = self.config.get("trial"), self.config.get("search.trials")
        follow = self.config.get("search.extend") or self.config.get("search.refine")
        return bool(follow) and isinstance(trial, int) and planned is not None and trial >= planned

    def time_to(self, target: float, *, higher_is_better: bool) -> tuple[float, float | None]:
        """Return step and seconds of the first validation that reaches it: infinite if none does; None: not known."""
        own = self.result.get("target") or {}
        if self.state == DONE and own.get("value") == target:
            return (math.inf, math.inf) if own.get("step") is None else (own["step"], own.get("seconds"))
        for point in self.curve:
            if point.value is not None and reaches(point.value, target, higher_is_better=higher_is_better):
                return point.step, point.seconds
        return math.inf, math.inf


@dataclass(frozen=True)
class Trial:
    """One setting of the tuned keys, with its runs."""

    values: dict[str, Any]  # of the tuned keys
    runs: tuple[Run, ...]  # by seed
    index: int | None = None  # in a search

    @property
    def ended(self) -> dict[int, float | None]:
        """The final values of the runs that have ended, by seed."""
        return {run.seed: run.final for run in self.runs if run.ended}


@dataclass(frozen=True)
class OwnSchedule:
    """The shortest run whose schedule ends where it reached the target, among whole runs of one recipe."""

    steps: int | None  # steps, seconds: of training; None if no length reached it, or the seconds are not known
    seconds: float | None
    tried: tuple[int, ...]  # the lengths that all seeds of the row were run with


@dataclass(frozen=True)
class Row:
    """One line of a table: an optimizer, or a variant of it, tuned. Its numbers follow from its records."""

    label: str  # what distinguishes it from the other rows, as `caspr optim.eps=1e-4`
    settings: dict[str, Any]  # the keys that distinguish rows, whether the label shows them or not
    records: tuple[Run, ...]  # all its runs, also failed and unfinished ones
    tuned: tuple[str, ...] = ()  # the keys in which its trials differ
    higher_is_better: bool = False
    target: float | None = None  # a value of the metric; None: there is none
    difference: Comparison | None = None  # this row minus its baseline; None for a baseline, or without one
    is_baseline: bool = False
    own_schedule: OwnSchedule | None = None  # None if no run of its settings is shorter

    def but(self, **changes: Any) -> Row:
        """Return the row with another label or comparison; what was computed from its records is kept."""
        made = replace(self, **changes)
        vars(made).update(vars(self) | vars(made))
        return made

    @property
    def optim(self) -> str:
        return str(self.settings["optim.name"])

    @property
    def untuned(self) -> bool:
        """Whether it is an optimizer with its own defaults, which nothing tuned."""
        return self.settings.get("trial") == "default"

    @property
    def kind(self) -> str:
        """The verdict in a word or three, "baseline", or nothing."""
        if self.difference:
            return self.difference.verdict.partition(":")[0]
        return "baseline" if self.is_baseline else ""

    # ---- trials ----

    @cached_property
    def by_trial(self) -> list[tuple[dict[str, Any], dict[int, list[Run]]]]:
        """The records of each trial: the values of its tuned keys, and the records of each seed."""
        found: dict[str, tuple[dict[str, Any], dict[int, list[Run]]]] = {}
        for run in self.records:
            config = expanded(run.config, self.tuned)
            values = {key: config[key] for key in self.tuned if key in config}
            found.setdefault(frozen(values), (values, {}))[1].setdefault(run.seed, []).append(run)
        return list(found.values())

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """The trials, in the order of a search or of their values.

        Of several records of one seed that one counts which has come further, then the later one.
        """
        made = []
        for values, seeds in self.by_trial:
            runs = tuple(max(seeds[seed], key=_progress) for seed in sorted(seeds))
            index = next((k for run in runs if isinstance(k := run.config.get("trial"), int)), None)
            made.append(Trial(values, runs, index))
        return tuple(sorted(made, key=self._place))

    def _place(self, trial: Trial) -> list[tuple[bool, float, str]]:
        return [_sortable(value) for value in (trial.index, *map(trial.values.get, self.tuned))]

    @cached_property
    def choice(self) -> Choice:
        """The trial with the best validation at the end, and how it was chosen."""
        rerank = max((run.config.get("search.rerank") or 0 for trial in self.trials for run in trial.runs), default=0)
        ends = [trial.ended for trial in self.trials]
        return choose(ends, higher_is_better=self.higher_is_better, rerank=rerank)

    @property
    def selected(self) -> Trial | None:
        return None if self.choice.best is None else self.trials[self.choice.best]

    @property
    def scores(self) -> dict[int, float | None]:
        """The mean of each trial that was compared, over the seeds that all share, by its place; None if one failed."""
        return self.choice.scores

    @cached_property
    def selecting(self) -> frozenset[int]:
        """The seeds by which the trial was selected; empty if there was nothing to choose."""
        return self.choice.seeds if sum(bool(trial.ended) for trial in self.trials) > 1 else frozenset()

    @cached_property
    def budget(self) -> dict[str, int]:
        """Trials by state, as ``{"done": 5, "failed": 1}``."""
        return dict(Counter(map(self._state, self.trials)))

    def _state(self, trial: Trial) -> str:
        """Return ``done`` if some seed is, unless a seed that selects failed."""
        deciding = [run for run in trial.runs if run.seed in self.selecting] or list(trial.runs)
        ends = [run.final for run in deciding if run.ended]
        if not ends:
            return deciding[0].state
        enough = all if self.selecting else any
        return DONE if enough(final is not None for final in ends) else FAILED

    @cached_property
    def planned(self) -> list[float | None]:
        """The scores of a search without further trials, which are drawn around the best of the others.

        These alone are exchangeable, so that any k of them say what a search of k trials comes to.
        """
        return [score for k, score in self.scores.items() if not any(run.further for run in self.trials[k].runs)]

    @cached_property
    def best_of(self) -> tuple[float, ...]:
        """The expected validation of the best of k of the planned trials, for k = 1, 2, ..."""
        return stats.best_of(self.planned, higher_is_better=self.higher_is_better)

    # ---- reported runs ----

    @cached_property
    def _held_out(self) -> tuple[Run, ...]:
        return tuple(r for r in self.selected.runs if r.ended and r.seed not in self.selecting) if self.selected else ()

    @property
    def held_out(self) -> bool:
        """Whether the reported seeds took no part in the selection."""
        return self.selected is not None and (not self.selecting or len(self._held_out) >= HELD_OUT)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The runs that are reported: the held-out seeds of the selected trial where there are two, else all."""
        if self.selected is None or self.held_out:
            return self._held_out
        return tuple(run for run in self.selected.runs if run.ended)

    @cached_property
    def values(self) -> dict[int, float]:
        """The finite values at the end, by seed."""
        return {run.seed: run.final for run in self.runs if run.final is not None}

    @cached_property
    def tests(self) -> dict[int, float]:
        """The values of the test metric of the same runs, by seed."""
        return {run.seed: run.test for run in self.runs if run.final is not None and run.test is not None}

    @cached_property
    def validation(self) -> Summary:
        return stats.summary(self.values.values())

    @cached_property
    def test(self) -> Summary:
        return stats.summary(self.tests.values())

    @property
    def n(self) -> int:
        """The number of reported runs with a finite value."""
        return self.validation.n

    @property
    def mean(self) -> float | None:
        return self.validation.mean

    @property
    def failed(self) -> int:
        """The number of reported seeds without a finite value."""
        return len(self.runs) - self.n

    # ---- target ----

    @cached_property
    def _times(self) -> list[tuple[float, float | None]]:
        if self.target is None:
            return []
        return [run.time_to(self.target, higher_is_better=self.higher_is_better) for run in self.runs]

    @property
    def steps_to_target(self) -> float | None:
        """The median over reported runs, where one that did not reach it is infinite; None: infinite, or no target."""
        return stats.median([step for step, _ in self._times])

    @property
    def seconds_to_target(self) -> float | None:
        return stats.median([seconds for _, seconds in self._times])

    @property
    def reached(self) -> int | None:
        """How many of the reported runs reached the target; None if there is none."""
        return None if self.target is None else sum(math.isfinite(step) for step, _ in self._times)


def _progress(run: Run) -> tuple[int, str, str, str]:
    """Return a key to sort by progress, and then by content, so that the order of reading does not matter."""
    rank = {DONE: 2, FAILED: 1}.get(run.state, 0)
    return rank, str(run.status.get("updated", "")), frozen([run.result, run.config]), run.path


def _sortable(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, (int, float))
    return not number, float(value) if number else 0.0, plain(value)


@dataclass(frozen=True)
class Table:
    """All rows of one task, scale, data set and length: the best mean first, rows with failed seeds at the end."""

    task: str
    scale: str
    data: str
    metric: str
    higher_is_better: bool
    data_hash: str | None = None  # a hash of the data's content; None if no record has it
    # the length that all its runs are planned for; None if they do not say it, or rows are tuned over it
    steps: int | None = None
    target: float | None = None
    # a label; or settings, as `statistics=ema`, of which each optimizer has a row of its own
    baseline: str | None = None
    rows: tuple[Row, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def own_baselines(self) -> bool:
        """Whether each optimizer has a baseline of its own."""
        return sum(row.is_baseline for row in self.rows) > 1
