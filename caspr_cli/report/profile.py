"""Performance profiles: how often is a row near the fastest, over all tasks?

After E. D. Dolan and J. J. Moré, *Benchmarking optimization software with performance profiles*, Mathematical
Programming 91 (2002). The score is AlgoPerf's integral (G. E. Dahl et al., *Benchmarking Neural Network Training
Algorithms*, arXiv:2306.07179; in mlcommons/algorithmic-efficiency, ``docs/DOCUMENTATION.md``, "Benchmark score using
performance profiles"): of the profile over linear tau from 1 to 4, divided by 3. It is not AlgoPerf's score: there
time is that of a clock, and of the trial that is the fastest to the target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from caspr_cli.report import across
from caspr_cli.report.model import Row, Table

LONGEST = 4.0  # times the fastest: later is never
SHOWN = (1.0, 1.5, 2.0, 4.0)  # in a terminal
NOT_ALGOPERF = (
    "AlgoPerf's takes times of a clock, and of the trial that is the fastest; here it is the one that ends best"
)


@dataclass(frozen=True)
class Profile:
    """Times to target over tasks.

    Args:
        unit: of time: ``steps`` or ``seconds``.
        tasks: those that have a target.
        ratios: by label, for each task the row's time over the task's best; infinite where it was not reached.
        left_out: what does not count, or counts as not reached, in words.
    """

    unit: str
    tasks: tuple[str, ...]
    ratios: dict[str, tuple[float, ...]]
    left_out: tuple[str, ...] = ()

    @property
    def scores(self) -> dict[str, float]:
        """The score of each label, the best first."""
        found = {label: score(ratios) for label, ratios in self.ratios.items()}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    @property
    def lines(self) -> list[str]:
        """For a terminal."""
        notes = [f"note: {text}" for text in self.left_out]
        if not self.tasks:
            return ["profile  no task has a target: there is nothing to compare", *notes]
        heads = ["optimizer", "score", *(f"rho({tau:g})" for tau in SHOWN), *self.tasks]
        cells = [
            [label, f"{points:.3f}", *(f"{rho(self.ratios[label], tau):.2f}" for tau in SHOWN)]
            + [times(ratio) for ratio in self.ratios[label]]
            for label, points in self.scores.items()
        ]
        widths = [max(len(row[k]) for row in [heads, *cells]) for k in range(len(heads))]
        table = [
            "  ".join(
                f"{cell:<{w}}" if k == 0 else f"{cell:>{w}}"
                for k, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in [heads, *cells]
        ]
        count = f"{len(self.tasks)} task{'s' * (len(self.tasks) > 1)}"
        return [
            f"profile  median {self.unit} to target on {count}, as a multiple of the fastest of the task",
            *table,
            "",
            f"rho(t)   share of tasks that are reached within t times the {self.unit} of the fastest",
            f"score    AlgoPerf's integral, the mean of rho from 1 to {LONGEST:g}: 1 is the fastest everywhere",
            f"         ({NOT_ALGOPERF})",
            *notes,
        ]


def profile(tables: Sequence[Table], unit: str) -> Profile:
    """Compare rows over tasks; rows with the same settings are one.

    A task without a target is left out. A row that a task does not have counts there as one that did not reach the
    target, as in AlgoPerf, and so do all rows of a task where nobody did.

    Args:
        unit: of time, ``steps`` or ``seconds``.
    """
    labelled = {
        name: (table, dict(zip(labels, table.rows, strict=True)))
        for name, table, labels in zip(names(tables), tables, across.labels(tables), strict=True)
    }
    judged = {name: rows for name, (table, rows) in labelled.items() if table.target is not None}
    labels = list(dict.fromkeys(label for rows in judged.values() for label in rows))
    columns = {name: _ratios(rows, unit) for name, rows in judged.items()}
    ratios = {label: tuple(column.get(label, math.inf) for column in columns.values()) for label in labels}
    left_out = [f"{name} has no target and is left out" for name in labelled if name not in judged]
    return Profile(unit, tuple(judged), ratios, (*left_out, *_never(judged, columns, labels, unit)))


def _never(
    judged: Mapping[str, Mapping[str, Row]],
    columns: Mapping[str, Mapping[str, float]],
    labels: Sequence[str],
    unit: str,
) -> Iterator[str]:
    """What counts as not reached, and why, where the table does not show it."""
    for name, column in columns.items():
        if not any(map(math.isfinite, column.values())):
            yield f"{name}: no row reached the target"
    for name, rows in judged.items():
        for label, row in rows.items():
            if unit == "seconds" and row.seconds_to_target is None and row.steps_to_target is not None:
                yield f"{label} reached the target of {name}, but has no times: counts as not reached"
    for label in labels:
        if missing := [name for name, column in columns.items() if label not in column]:
            yield f"{label} was not run on {', '.join(missing)}, which counts as not reached"


def _ratios(rows: Mapping[str, Row], unit: str) -> dict[str, float]:
    found = {label: row.steps_to_target if unit == "steps" else row.seconds_to_target for label, row in rows.items()}
    taken = {label: math.inf if time is None else time for label, time in found.items()}
    best = min(taken.values(), default=math.inf)
    return {label: _ratio(time, best) for label, time in taken.items()}


def _ratio(time: float, best: float) -> float:
    if not math.isfinite(time):
        return math.inf
    return 1.0 if time == best else time / best if best else math.inf


def rho(ratios: Sequence[float], tau: float) -> float:
    """Share of tasks within ``tau`` times the best; 0 where there are none."""
    return sum(ratio <= tau for ratio in ratios) / max(len(ratios), 1)


def score(ratios: Sequence[float]) -> float:
    """The mean of rho over tau in [1, 4], exactly: a task with ratio r adds to it from r on."""
    return sum(max(LONGEST - ratio, 0.0) for ratio in ratios) / (LONGEST - 1) / max(len(ratios), 1)


def names(tables: Sequence[Table]) -> list[str]:
    """What tells each table from the others: its task, with as much more as it takes; in the end a number."""
    parts = [(made.task, made.scale, made.data, made.metric, (made.data_hash or "-")[:8]) for made in tables]
    found = []
    for k, own in enumerate(parts):
        more = next((m for m in range(1, 6) if all(own[:m] != p[:m] for i, p in enumerate(parts) if i != k)), 0)
        found.append(" ".join(own[:more]) if more else f"{' '.join(own)} {1 + parts[:k].count(own)}")
    return found


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if math.isfinite(ratio) else "never"
