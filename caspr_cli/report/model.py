"""What a report says, as plain values: records are read into these, tables and figures are made of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

DONE = "done"
LARGEST = 1e50  # of a metric: far beyond float32, and tests square it twice; what is larger counts as not finite


def finite(value: float | None) -> float | None:
    """The value of a metric; None where it is not finite."""
    return float(value) if value is not None and abs(value) <= LARGEST else None


@dataclass(frozen=True)
class Point:
    """The metric that a task is judged by, at one validation."""

    step: int
    seconds: float | None  # of training so far; None in records that did not say
    value: float | None  # None: not finite


@dataclass(frozen=True)
class Run:
    """One record.

    Args:
        path: of its directory; of a packed record, ``<file>:<path it had>``.
        config: dotted keys of the recipe, as ``optim.lr``; a list is one value.
        status, result, provenance: the JSON files; empty where there is none yet.
        curve: by step.
        seeds_of: what is the same for all seeds of one recipe: the directory above.
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
    def metric(self) -> str:
        return str(self.config["task.target.metric"])

    @property
    def state(self) -> str:
        return str(self.status.get("state", "new"))

    @cached_property
    def final(self) -> float | None:
        """The metric at the end of a run that is done; None where it is not done, or the value not finite."""
        value = (self.result.get("final") or {}).get(self.metric) if self.state == DONE else None
        return finite(value)

    @cached_property
    def test(self) -> float | None:
        name = self.metric.replace("val/", "test/")
        value = (self.result.get("test") or {}).get(name) if self.state == DONE else None
        return finite(value)


@dataclass(frozen=True)
class Trial:
    """One setting of the tuned keys, with its seeds."""

    values: dict[str, Any]  # of the tuned keys
    runs: tuple[Run, ...]  # by seed
    index: int | None = None  # in a search


@dataclass(frozen=True)
class Row:
    """One line of a table: an optimizer, or one of its variants, tuned.

    Args:
        label: as ``caspr`` or ``caspr optim.eps=1e-4``: what tells it from the other rows.
        trials: all of them, also failed and unfinished ones.
        selected: the one with the best validation at the end, over the seeds that all trials share; None if no trial
            is done.
        runs: those that are reported: of the selected trial, fresh seeds (that selected nothing) where there are two.
        n: how many of them are done with a finite value.
        steps_to_target, seconds_to_target: medians over all reported runs, where one that did not reach it is
            infinite; None where that median is infinite or there is no target.
        reached: how many of ``runs`` reached it; None if there is no target.
        best_of: of k trials drawn from these, k = 1, 2, ...: the expected validation of the best.
        budget: trials by state, as ``{"done": 5, "failed": 1}``.
    """

    task: str
    optim: str
    label: str
    trials: tuple[Trial, ...]
    selected: Trial | None
    runs: tuple[Run, ...]
    fresh: bool
    n: int
    mean: float | None
    sd: float | None
    ci_low: float | None
    ci_high: float | None
    test_mean: float | None
    test_sd: float | None
    steps_to_target: float | None
    seconds_to_target: float | None
    reached: int | None
    best_of: tuple[float, ...]
    budget: dict[str, int]
    difference: Difference | None = None  # to the baseline; None for the baseline itself or without one


@dataclass(frozen=True)
class Difference:
    """A row against the baseline.

    Args:
        paired: over the seeds that both have; otherwise Welch's test over all.
        value: row minus baseline, in units of the metric.
        low, high: 95 % interval of it.
        p_value: two-sided; ``p_holm`` the same after Holm's correction for the other rows of the table.
        verdict: "better", "worse", or as "cannot tell: n = 3 separates 0.9 %, the difference is 0.3 %; about 14 seeds
            would"
    """

    paired: bool
    n: int
    value: float | None
    low: float | None
    high: float | None
    p_value: float | None
    p_holm: float | None
    verdict: str


@dataclass(frozen=True)
class Table:
    """All rows of one task at one scale, on the same kind of data; the best mean first."""

    task: str
    scale: str
    data: str
    metric: str
    higher_is_better: bool
    target: float | None
    baseline: str | None  # label of a row
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = field(default=())
