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
        test_n: how many of the ``n`` have a test value.
        settings: keys by which rows are told apart, whether the label shows them or not.
        is_baseline: whether others are compared with it.
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
    test_n: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    is_baseline: bool = False

    @property
    def failed(self) -> int:
        """Reported seeds without a finite value."""
        return len(self.runs) - self.n


@dataclass(frozen=True)
class Difference:
    """A row against the baseline.

    Args:
        paired: where all seeds of the one are seeds of the other; otherwise Welch's test over all.
        n: pairs, or the smaller of the two numbers of seeds.
        value: row minus baseline, in units of the metric.
        low, high: 95 % interval of it, not corrected.
        p_value: two-sided; ``p_holm`` the same after Holm's correction for the other rows of the table; None where
            more seeds failed, or chose the trial, on one side than on the other: they are no fair sample.
        verdict: "better", "worse", or as "cannot tell: -0.38 % (-0.94 to +0.18); n = 5 separates 0.56 %; if that is
            the true difference, about 14 seeds would find it"
        against: label of the baseline.
        tests: how many p-values the table has.
        share_of: what percentages are of; None where that is too near 0, and units of the metric are said.
        test, test_low, test_high: the same difference and interval of the test metric.
    """

    paired: bool
    n: int
    value: float | None
    low: float | None
    high: float | None
    p_value: float | None
    p_holm: float | None
    verdict: str
    against: str = ""
    tests: int = 1
    share_of: float | None = None
    test: float | None = None
    test_low: float | None = None
    test_high: float | None = None
    test_share_of: float | None = None


@dataclass(frozen=True)
class Table:
    """All rows of one task at one scale, on the same data: the best mean first, rows with failed seeds behind.

    Args:
        data_hash: of its content; None if no record says it.
        baseline: label of a row, or settings, as ``statistics=ema``, that each optimizer has a row of its own with.
    """

    task: str
    scale: str
    data: str
    metric: str
    higher_is_better: bool
    target: float | None
    baseline: str | None
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = field(default=())
    data_hash: str | None = None
