"""Performance profiles: how often a row is near the fastest, over all tasks.

After E. D. Dolan and J. J. Moré, *Benchmarking optimization software with performance profiles*, Mathematical
Programming 91 (2002). The score is AlgoPerf's integral (G. E. Dahl et al., *Benchmarking Neural Network Training
Algorithms*, arXiv:2306.07179; in mlcommons/algorithmic-efficiency, ``docs/DOCUMENTATION.md``, "Benchmark score using
performance profiles"): of the profile over linear tau from 1 to 4, divided by 3. It is not AlgoPerf's score: there
time is that of a clock, and of the trial that is the fastest to the target.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from caspr_cli.report.model import Row, Table
from caspr_cli.report.render import Column, Sheet, best
from caspr_cli.report.selection import with_common_labels

LONGEST = 4.0  # times the fastest: later is never
SHOWN = (1.0, 1.5, 2.0, 4.0)  # of rho, in tables
NOT_ALGOPERF = "AlgoPerf's is of wall-clock times, and of the fastest trial; here the trial is the one that ends best"


@dataclass(frozen=True)
class Profile:
    unit: str  # of time: `steps` or `seconds`
    tasks: tuple[str, ...]  # those that have a target
    # by label, for each task the row's time over the task's best; infinite where it was not reached
    ratios: dict[str, tuple[float, ...]]
    left_out: tuple[str, ...] = ()  # what does not count, or counts as not reached, in words

    @property
    def scores(self) -> dict[str, float]:
        found = {label: score(ratios) for label, ratios in self.ratios.items()}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def profile(tables: Sequence[Table], unit: str) -> Profile:
    """Return the profile of all rows over tasks; rows with the same settings are one. ``unit``: steps or seconds.

    A task without a target is left out. A row that a task does not have counts there as one that did not reach the
    target, as in AlgoPerf, and so do all rows of a task where none did.
    """
    called = names(tables)
    other_lengths = dict(_other_lengths(tables, called))
    taken = [one for one in zip(called, with_common_labels(tables), strict=True) if one[0] not in other_lengths]
    judged = {name: {row.label: row for row in table.rows} for name, table in taken if table.target is not None}
    labels = list(dict.fromkeys(label for rows in judged.values() for label in rows))
    columns = {name: _ratios(rows, unit) for name, rows in judged.items()}
    ratios = {label: tuple(column.get(label, math.inf) for column in columns.values()) for label in labels}
    untargeted = [f"{name} has no target and is left out" for name, _ in taken if name not in judged]
    left_out = (*untargeted, *other_lengths.values(), *_never(judged, labels, unit))
    return Profile(unit, tuple(judged), ratios, left_out)


def _other_lengths(tables: Sequence[Table], called: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the tables that are left out because another length of the task has more runs, and a note on it."""
    groups: dict[Table, list[tuple[str, Table]]] = {}
    for name, table in zip(called, tables, strict=True):
        subject = replace(table, steps=None, rows=(), warnings=(), target=None, baseline=None)
        groups.setdefault(subject, []).append((name, table))
    for group in groups.values():
        most, _ = max(group, key=lambda one: sum(len(row.records) for row in one[1].rows))
        for name, table in group:
            if name != most:
                instead = f"--where max_steps={table.steps} takes it instead"
                yield name, f"{name} is left out: {most} has more runs ({instead})"


def _never(judged: Mapping[str, Mapping[str, Row]], labels: Sequence[str], unit: str) -> Iterator[str]:
    """Yield a note for each row that counts as not reached, if the table does not show why."""
    for name, rows in judged.items():
        if all(row.steps_to_target is None for row in rows.values()):
            yield f"{name}: no row reached the target"
    for name, rows in judged.items():
        for label, row in rows.items():
            if unit == "seconds" and row.seconds_to_target is None and row.steps_to_target is not None:
                yield f"{label} reached the target of {name}, but has no times: counts as not reached"
    for label in labels:
        if missing := [name for name, rows in judged.items() if label not in rows]:
            yield f"{label} was not run on {', '.join(missing)}, which counts as not reached"


def _ratios(rows: Mapping[str, Row], unit: str) -> dict[str, float]:
    found = {label: row.steps_to_target if unit == "steps" else row.seconds_to_target for label, row in rows.items()}
    known = {label: time for label, time in found.items() if time is not None}
    best = min(known.values(), default=math.inf)
    ratios = {label: 1.0 if time == best else time / best if best else math.inf for label, time in known.items()}
    return {label: ratios.get(label, math.inf) for label in rows}


def rho(ratios: Sequence[float], tau: float) -> float:
    """Return the share of tasks within ``tau`` times the best; 0 where there are none."""
    return sum(ratio <= tau for ratio in ratios) / max(len(ratios), 1)


def score(ratios: Sequence[float]) -> float:
    """Return the mean of rho over tau in [1, 4]: a task with ratio r counts from r on."""
    return sum(max(LONGEST - ratio, 0.0) for ratio in ratios) / (LONGEST - 1) / max(len(ratios), 1)


def as_sheet(found: Profile) -> Sheet:
    """Return for each row its score, the shares within multiples of the fastest, and its times."""
    scores = found.scores
    ratios = [found.ratios[label] for label in scores]
    columns = [
        Column("optimizer", list(scores), right=False),
        Column("score", [f"{score:.3f}" for score in scores.values()], best=best([*scores.values()])),
    ]
    for spare, tau in enumerate(SHOWN, 2):
        shares = [rho(own, tau) for own in ratios]
        columns.append(Column(f"ρ({tau:g})", [f"{share:.2f}" for share in shares], spare=spare, best=best(shares)))
    for task, own in zip(found.tasks, zip(*ratios, strict=True), strict=True):
        columns.append(Column(task, list(map(times, own)), spare=1, best=best(own, higher=False)))
    caption = f"Median {found.unit} to target as a multiple of the fastest row of the task, and what follows."
    return Sheet(columns, caption)


def names(tables: Sequence[Table]) -> list[str]:
    """Return a name for each table: its task, with what distinguishes it from others of this task, or a number."""
    found: list[str] = []
    for made in tables:
        same = [_parts(other) for other in tables if other.task == made.task]
        columns = list(zip(*same, strict=True))
        alone = next((k for k, values in enumerate(columns) if len(set(values)) == len(same) > 1), None)
        differing = [k for k, values in enumerate(columns) if len(set(values)) > 1] if alone is None else [alone]
        name = " ".join([made.task, *(_parts(made)[k] for k in differing)])
        number = sum(known == name or known.startswith(f"{name} (") for known in found)
        found.append(f"{name} ({number + 1})" if number else name)
    return found


def _parts(table: Table) -> tuple[str, ...]:
    steps = f"{table.steps:,} steps" if table.steps else "-"
    return table.scale, table.data, table.metric, steps, (table.data_hash or "-")[:8]


def times(ratio: float) -> str:
    return f"{ratio:.2f}x" if math.isfinite(ratio) else "never"
