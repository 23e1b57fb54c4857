"""The values of a report: records are read into these, tables and figures are made from these."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from caspr_cli.common.selection import finite
from caspr_cli.common.shape import DONE, FAILED, KINDS, DamagedError
from caspr_cli.report.stats import Comparison


@dataclass(frozen=True)
class Point:
    """The metric of a task at one validation."""

    step: int
    seconds: float | None  # of training so far; None if the record does not have it
    value: float | None  # None: not finite


def point(step: Any, seconds: Any, value: Any) -> Point:
    """Return a validation; what is not finite is None.

    Raises:
        DamagedError: the step is no integer, or another of the three no number.
    """
    if not KINDS["integer"](step) or not all(x is None or type(x) in (int, float) for x in (seconds, value)):
        raise DamagedError("a validation has other values than numbers")
    return Point(step, None if seconds is None or not KINDS["number"](seconds) else float(seconds), finite(value))


@dataclass(frozen=True)
class Run:
    """One record.

    Args:
        path: its directory; for a packed record, ``<file>:<path it had>``.
        config: dotted keys of the recipe, as ``optim.lr``; a list is one value.
        status, result, provenance: the JSON files; empty where there is none yet.
        curve: the validations, by step.
    """

    path: str
    config: dict[str, Any]
    status: dict[str, Any]
    result: dict[str, Any]
    provenance: dict[str, Any]
    curve: tuple[Point, ...] = ()

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


@dataclass(frozen=True)
class Trial:
    """One setting of the tuned keys, with its runs."""

    values: dict[str, Any]  # of the tuned keys
    runs: tuple[Run, ...]  # by seed
    index: int | None = None  # in a search


@dataclass(frozen=True)
class Difference(Comparison):
    """A row minus its baseline.

    Args:
        p_value: None also where the comparison would not be fair: more seeds failed, or chose the trial, on one side.
        p_holm: after Holm's correction for the other rows of the table.
        verdict: "better", "worse", or why there is none, in words.
        baseline: its label.
        tests: how many p-values the table has.
        share_of: what percentages are of; None where that is too near 0, and differences are in units of the metric.
        test, test_share_of: the same comparison of the test metric.
    """

    p_holm: float | None = None
    verdict: str = ""
    baseline: str = ""
    tests: int = 1
    share_of: float | None = None
    test: Comparison = field(default_factory=Comparison)
    test_share_of: float | None = None


@dataclass(frozen=True)
class OwnSchedule:
    """The shortest run whose schedule ends where it reached the target, among whole runs of one recipe.

    Args:
        steps, seconds: of training; None if no length reached it, or the seconds are not known.
        tried: the lengths that all seeds of the row were run with.
    """

    steps: int | None
    seconds: float | None
    tried: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One line of a table: an optimizer, or a variant of it, tuned.

    Args:
        label: what distinguishes it from the other rows, as ``caspr optim.eps=1e-4``.
        trials: all of them, also failed and unfinished ones.
        selected: the best trial; None if none is done.
        runs: those that are reported: the held-out seeds of the selected trial where there are two, else all.
        held_out: whether the reported seeds took no part in the selection.
        n: how many of ``runs`` are done with a finite value.
        steps_to_target, seconds_to_target: medians over ``runs``, where one that did not reach the target is infinite;
            None where the median is infinite or there is no target.
        reached: how many of ``runs`` reached the target; None if there is none.
        scores: the mean of each trial that was compared, by its place in ``trials``, over the seeds that all of them
            share; None if one failed or is not finite.
        best_of: the expected validation of the best of k trials, for k = 1, 2, ...; without those that came after a
            best value at the edge.
        budget: trials by state, as ``{"done": 5, "failed": 1}``.
        test_n: how many of the ``n`` have a test value.
        settings: the keys that distinguish rows, whether the label shows them or not.
        tuned: the keys that its trials differ in.
        records: all its runs.
        duplicates: each run that does not count, and the one of the same trial and seed that does.
        selecting: the seeds by which the trial was selected; empty if there was nothing to choose.
        unscored: how many trials that ended have no run with these seeds.
        own_schedule: None if no run of its settings is shorter.
    """

    task: str
    optim: str
    label: str
    trials: tuple[Trial, ...]
    selected: Trial | None
    runs: tuple[Run, ...]
    held_out: bool
    n: int
    mean: float | None
    sd: float | None
    ci_low: float | None
    ci_high: float | None
    test_mean: float | None
    test_sd: float | None
    test_n: int
    steps_to_target: float | None
    seconds_to_target: float | None
    reached: int | None
    best_of: tuple[float, ...]
    budget: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)
    difference: Difference | None = None  # None for a baseline, or without one
    is_baseline: bool = False
    tuned: tuple[str, ...] = ()
    records: tuple[Run, ...] = ()
    duplicates: tuple[tuple[Run, Run], ...] = ()
    selecting: frozenset[int] = frozenset()
    unscored: int = 0
    scores: dict[int, float | None] = field(default_factory=dict)
    own_schedule: OwnSchedule | None = None

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

    @property
    def failed(self) -> int:
        """The number of reported seeds without a finite value."""
        return len(self.runs) - self.n


@dataclass(frozen=True)
class Table:
    """All rows of one task, scale, data set and length: the best mean first, rows with failed seeds at the end.

    Args:
        data_hash: a hash of the data's content; None if no record has it.
        steps: the length that all its runs are planned for; None if they do not say it, or rows are tuned over it.
        baseline: a label; or settings, as ``statistics=ema``, of which each optimizer has a row of its own.
    """

    task: str
    scale: str
    data: str
    metric: str
    higher_is_better: bool
    target: float | None
    baseline: str | None
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()
    data_hash: str | None = None
    steps: int | None = None

    @property
    def own_baselines(self) -> bool:
        """Whether each optimizer has a baseline of its own."""
        return sum(row.is_baseline for row in self.rows) > 1
