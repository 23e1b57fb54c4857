"""The first line of a report, one sentence: which row has the best mean where, and what one row is better than.

It says what the tables say, of the same means and verdicts, over all tasks.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median

from caspr_cli.common.format import count, duration, listed
from caspr_cli.common.shape import DONE
from caspr_cli.report import format, provenance
from caspr_cli.report.compare import compared
from caspr_cli.report.model import Row, Run, Table
from caspr_cli.report.profile import names
from caspr_cli.report.selection import with_common_labels

MOST = 6  # rows in one list
SUBJECT = "caspr"  # the row that is compared with all others, where there is one
TURNED = {"better": "worse", "worse": "better"}


def headline(tables: Sequence[Table]) -> str:
    """Return which row has the best mean on how many tasks, and which rows one row is better or worse than."""
    tables = with_common_labels(tables)
    best, ranked = _best(tables)
    if not ranked:
        return f"{best}."
    subject = SUBJECT if any(row.label == SUBJECT for table in tables for row in table.rows) else ranked[0]
    said = _verdicts(tables, subject)
    same = said.startswith(f"{subject} is") and best.endswith(f": {subject}")
    return f"{best}, which {said.removeprefix(f'{subject} ')}." if same else f"{best}; {said}."


def _best(tables: Sequence[Table]) -> tuple[str, list[str]]:
    """Return which rows have the best mean on how many tasks, in words, and these rows, the most frequent first."""
    won: dict[str, int] = defaultdict(int)
    alone, luckier = dict[str, list[str]](), list[str]()
    for name, table in zip(names(tables), tables, strict=True):
        valued = [row for row in table.rows if row.mean is not None]
        if len(valued) > 1:
            best = valued[0]  # rows with failed seeds stand behind the others
            same = [row.label for row in valued if (row.mean, row.failed) == (best.mean, best.failed)]
            won[listed(same, MOST)] += 1
            sign = 1 if table.higher_is_better else -1
            luckier += [row.label for row in valued if sign * (row.mean or 0.0) > sign * (best.mean or 0.0)]
        elif valued:
            alone.setdefault(valued[0].label, []).append(name)
    ranked = sorted(won, key=lambda label: -won[label])
    if not ranked:
        only = [f"only {label} has a value on {listed(where, MOST)}" for label, where in alone.items()]
        said = "; ".join(only) or f"no run is done with a finite value on {listed(names(tables), MOST)}"
        return format.sentence(said), ranked
    total = sum(won.values())
    each = [f"{label} on {won[label]}" for label in ranked] if total > 1 else ranked
    if total > 1:
        each[0] += f" of {count(total, 'table' if len({table.task for table in tables}) < total else 'task')}"
    but = f" (without {listed(dict.fromkeys(luckier), MOST)}, of which seeds failed)" if luckier else ""
    return f"Best mean: {listed(each, MOST)}{but}", ranked


def _verdicts(tables: Sequence[Table], subject: str) -> str:
    """Return which rows ``subject`` is significantly better and worse than; with own baselines, each row's verdict."""
    kinds: dict[str, list[str]] = defaultdict(list)
    own = [format.baseline(table) for table in tables if table.own_baselines]
    for table in tables:
        of_rows = [(row.label, row.kind) for row in table.rows if row.difference is not None]
        for label, kind in of_rows if own else _against(table.rows, subject):
            kinds[label].append(kind)
    said = {kind: _where(kinds, kind) for kind in ("better", "worse", format.NOT_SIGNIFICANT, format.NOT_TESTED)}
    if not any(said[kind] for kind in ("better", "worse", format.NOT_SIGNIFICANT)):
        return "no difference is tested"
    untested = f" (not tested: {said[format.NOT_TESTED]})" if said[format.NOT_TESTED] else ""
    better, worse = (said[kind] or "none" for kind in ("better", "worse"))
    if own:
        return f"significantly better than {own[0]}: {better}; worse: {worse}{untested}"
    if len(tables) > 1 and (said["better"] or said["worse"]):
        return f"{subject} is significantly better than {better}, and worse than {worse}{untested}"
    found = {"better than": said["better"], "worse than": said["worse"], "different from": said[format.NOT_SIGNIFICANT]}
    parts = [f"{'not ' * (how == 'different from')}significantly {how} {who}" for how, who in found.items() if who]
    return f"{subject} is {', and '.join(filter(None, [', '.join(parts[:-1]), parts[-1]]))}{untested}"


def _against(rows: Sequence[Row], subject: str) -> list[tuple[str, str]]:
    """Return the verdict of ``subject`` against each other row, with the label of that row.

    With the baseline, and if it is that itself, it is what the table says; the others are tested against it, corrected
    for the number of rows as in a table.
    """
    own = next((row for row in rows if row.label == subject and row.mean is not None), None)
    if own is None:
        return []
    found = []
    for row, tested in zip(rows, rows if own.is_baseline else compared(rows, own.label)[0], strict=True):
        if row.is_baseline and own.difference is not None:
            found.append((row.label, own.kind))
        elif tested.difference is not None and row.mean is not None:
            found.append((row.label, TURNED.get(tested.kind, tested.kind)))
    return found


def _where(kinds: Mapping[str, Sequence[str]], kind: str) -> str:
    """Return the rows with this verdict, the most frequent first, with numbers of tasks if there are several."""
    counts = {label: found.count(kind) for label, found in kinds.items() if kind in found}
    ranked = sorted(counts, key=lambda label: -counts[label])
    many = max(map(len, kinds.values()), default=0) > 1
    return listed([f"{label} on {counts[label]}" if many else label for label in ranked], MOST) if ranked else ""


# ---- seconds -----------------------------------------------------------------------------------------------------


def clock(tables: Sequence[Table]) -> str:
    """Return what a step costs, see :func:`costs`, and how long all runs took. Empty where it is not known."""
    runs = [run for table in tables for row in table.rows for run in row.records]
    seconds = [taken for run in runs if (taken := run.result.get("seconds")) is not None]
    trained = f"{count(len(seconds), 'run')} trained for {duration(sum(seconds))} in all." if seconds else ""
    return " ".join(filter(None, [costs(tables), trained]))


def costs(tables: Sequence[Table]) -> str:
    """Return the seconds of a training step of each row over those of the baseline, the median over tasks.

    Empty where they are not known.
    """
    ratios: dict[str, list[float]] = defaultdict(list)
    bases = set()
    for table in with_common_labels(tables):
        base = next((row for row in table.rows if row.is_baseline), None)
        if base is None or table.own_baselines:
            continue
        for row in table.rows:
            if row is not base and not row.untuned and (ratio := _ratio(row, base)) is not None:
                ratios[row.label].append(ratio)
                bases.add(base.label)
    if not ratios or len(bases) > 1:
        return ""
    ranked = sorted(ratios, key=lambda label: median(ratios[label]))
    middles = [median(ratios[label]) for label in ranked]
    first, *others = [f"{ratio:.2g} times" if ratio < 10 else f"{ratio:,.0f} times" for ratio in middles]
    more = "".join(f", {times} with {label}" for times, label in zip(others, ranked[1:], strict=True))
    return f"By the clock of these runs a step took {first} as long with {ranked[0]} as with {bases.pop()}{more}."


def _ratio(row: Row, base: Row) -> float | None:
    """Return the ratio of the seconds of a step; None where they are not known or from different hardware.

    All records count: a trial's steps take as long, and the more there are, the less does a busy moment matter.
    """
    ours, theirs = _step(row.records), _step(base.records)
    machines = {provenance.hardware(run) for side in (row, base) for run in side.records if run.state == DONE}
    return ours / theirs if ours and theirs and len(machines) == 1 else None


def _step(runs: Sequence[Run]) -> float | None:
    found = [
        run.result["seconds"] / run.result["steps"]
        for run in runs
        if run.state == DONE and run.result.get("seconds") and run.result.get("steps")
    ]
    return median(found) if found else None
