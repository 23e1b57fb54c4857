"""The first line of a report: which row has the best mean where, what is significant, and what a step costs.

It says what the tables say, of the same means and verdicts, over all tasks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from caspr_cli.common.format import count, listed
from caspr_cli.common.shape import DONE
from caspr_cli.report import format, provenance
from caspr_cli.report.model import Row, Run, Table
from caspr_cli.report.profile import names
from caspr_cli.report.selection import labels_across
from caspr_cli.report.stats import Comparison

MOST = 6  # rows in one list


def headline(tables: Sequence[Table]) -> str:
    """Return who wins where and by how much, what is significant, and what it costs in seconds, in few sentences."""
    across = labels_across([table.rows for table in tables])
    by_label = [dict(zip(labels, table.rows, strict=True)) for labels, table in zip(across, tables, strict=True)]
    parts = [*_best(tables, by_label), *_verdicts(tables, by_label), *_costs(tables, by_label)]
    return " ".join(f"{part}." for part in parts)


def _best(tables: Sequence[Table], by_label: Sequence[Mapping[str, Row]]) -> Iterator[str]:
    """Yield which rows have the best mean on which tasks, each with its difference to the baseline."""
    won: dict[str, list[str]] = defaultdict(list)
    alone, nothing = [], []
    for name, table, rows in zip(names(tables), tables, by_label, strict=True):
        valued = {label: row for label, row in rows.items() if row.mean is not None}
        if not valued:
            nothing.append(name)
        elif len(valued) == 1:
            alone.append(f"On {name} {next(iter(valued))} alone has a value")
        else:
            label, said = _winner(table, valued)
            won[label].append(f"{name}{said}")
    total = sum(map(len, won.values()))
    if total:
        ranked = sorted(won.items(), key=lambda item: -len(item[1]))
        each = [f"{label} on {len(where)} of {count(total, 'task')} ({'; '.join(where)})" for label, where in ranked]
        yield f"Best mean: {', '.join(each) if total > 1 else f'{ranked[0][0]} on {ranked[0][1][0]}'}"
    yield from alone
    if nothing:
        yield f"No run is done with a finite value on {listed(nothing, MOST)}"


def _winner(table: Table, rows: Mapping[str, Row]) -> tuple[str, str]:
    """Return the row with the best mean, or those, and what is to be said of it."""
    best = next(iter(rows.values()))  # rows with failed seeds stand behind the others
    same = [label for label, row in rows.items() if (row.mean, row.failed) == (best.mean, best.failed)]
    sign = 1 if table.higher_is_better else -1
    luckier = [label for label, row in rows.items() if sign * (row.mean or 0.0) > sign * (best.mean or 0.0)]
    but = f", but for {listed(luckier, MOST)}, of which seeds failed" if luckier else ""
    return listed(same, MOST), f"{_by(best)}{but}"


def _by(row: Row) -> str:
    """Return the difference of a row to its baseline, and whether it is significant."""
    if row.is_baseline:
        return ": the baseline"
    if row.difference is None or row.difference.value is None:
        return ""
    change = format.change(Comparison(value=row.difference.value), row.difference.share_of)
    said = {"better": "significant", "worse": "significant", format.NOT_SIGNIFICANT: "not significant"}
    return f": {change} against {row.difference.baseline}, {said.get(row.kind, row.kind)}"


def _verdicts(tables: Sequence[Table], by_label: Sequence[Mapping[str, Row]]) -> Iterator[str]:
    """Yield on how many tasks each row is significantly better or worse than its baseline, of those that test it."""
    bases = list(dict.fromkeys(format.baseline(table) for table in tables if table.baseline))
    tested: dict[str, list[str]] = defaultdict(list)
    for rows in by_label:
        for label, row in rows.items():
            if row.difference is not None:
                tested[label].append(row.kind)
    if not tested:
        if max(map(len, by_label)) > 1:
            why = f"No other row is tested against {listed(bases)}"
            yield why if bases else "There is no baseline, so no row is tested"
        return
    parts = []
    many = max(map(len, tested.values())) > 1
    better = f"significantly better than {listed(bases)}{' (tasks)' * many}"
    for said, kind in ((better, "better"), ("significantly worse", "worse")):
        parts.append(f"{said}: {_where(tested, kind) or 'none'}")
    if untested := _where(tested, format.NOT_TESTED):
        parts.append(f"{format.NOT_TESTED}: {untested}")
    yield format.sentence("; ".join(parts))


def _where(tested: Mapping[str, Sequence[str]], kind: str) -> str:
    """Return the rows with this verdict, those with the most tasks first, with the number of tasks."""
    counts = {label: kinds.count(kind) for label, kinds in tested.items() if kind in kinds}
    ranked = sorted(counts, key=lambda label: -counts[label])
    many = max(map(len, tested.values())) > 1
    words = [f"{label} {counts[label]} of {len(tested[label])}" if many else label for label in ranked]
    return listed(words, MOST) if words else ""


# ---- seconds -----------------------------------------------------------------------------------------------------


def _costs(tables: Sequence[Table], by_label: Sequence[Mapping[str, Row]]) -> Iterator[str]:
    """Yield the seconds of a training step of each row over those of the baseline, the median over tasks."""
    ratios: dict[str, list[float]] = defaultdict(list)
    bases = set()
    for table, rows in zip(tables, by_label, strict=True):
        base = next(((label, row) for label, row in rows.items() if row.is_baseline), None)
        if base is None or table.own_baselines:
            continue
        for label, row in rows.items():
            if label != base[0] and not row.untuned and (ratio := _ratio(row, base[1])) is not None:
                ratios[label].append(ratio)
                bases.add(base[0])
    if ratios and len(bases) == 1:
        ranked = sorted(ratios, key=lambda label: median(ratios[label]))
        first, *others = [f"{_times(median(ratios[label]))}" for label in ranked]
        more = "".join(f", {times} with {label}" for times, label in zip(others, ranked[1:], strict=True))
        yield f"By the clock of these runs a step took {first} as long with {ranked[0]} as with {bases.pop()}{more}"


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times" if ratio < 10 else f"{ratio:,.0f} times"


def _ratio(row: Row, base: Row) -> float | None:
    """Return the ratio of the seconds of a step; None where they are not known or from different hardware.

    All records count: a trial's steps take as long, and the more there are, the less does a busy moment matter.
    """
    ours, theirs = _step(row.records), _step(base.records)
    machines = {provenance.hardware(run) for side in (row, base) for run in side.records if run.state == DONE}
    return ours / theirs if ours and theirs and len(machines) == 1 else None


def _step(runs: Sequence[Run]) -> float | None:
    """Return the median seconds of a training step, of runs that are done."""
    found = [
        run.result["seconds"] / run.result["steps"]
        for run in runs
        if run.state == DONE and run.result.get("seconds") and run.result.get("steps")
    ]
    return median(found) if found else None
