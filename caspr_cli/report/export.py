"""Tables as files: JSON, CSV, Markdown and LaTeX."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from caspr_cli.common.format import finite
from caspr_cli.report import format, render, tuning
from caspr_cli.report.headline import clock, headline
from caspr_cli.report.model import Row, Table
from caspr_cli.report.render import markdown_text
from caspr_cli.report.stats import Comparison

OF_TABLE = ("task", "scale", "data", "data_hash", "steps", "metric", "higher_is_better", "target", "baseline")
DIFFERENCE = {"": "value", "_low": "low", "_high": "high"}
OF_DIFFERENCE = ("verdict", "p_value", "p_holm", "paired")


def entries(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Return a flat object for each row of each table, in units of the metric, steps and seconds; None: not known."""
    return [_entry(table, row) for table in tables for row in table.rows]


def _entry(table: Table, row: Row) -> dict[str, Any]:
    found, value, test = row.difference, row.validation, row.test
    entry = {
        **{name: getattr(table, name) for name in OF_TABLE},
        "optim": row.optim,
        "label": row.label,
        **{"n": value.n, "mean": value.mean, "sd": value.sd, "ci_low": value.low, "ci_high": value.high},
        **{"test_mean": test.mean, "test_sd": test.sd, "test_n": test.n},
        **{name: getattr(row, name) for name in ("steps_to_target", "seconds_to_target", "reached")},
        "seeds": [run.seed for run in row.runs],
        "failed": row.failed,
        "fresh": row.held_out,
        "trials": len(row.trials),
        "budget": row.budget,
        "best_of": list(row.best_of),
        "selected": row.selected.values if row.selected else None,
        **_difference("difference", found),
        "own_schedule_steps": row.own_schedule and row.own_schedule.steps,
        "own_schedule_seconds": row.own_schedule and row.own_schedule.seconds,
        **_difference("test_difference", found.test if found else None),
        "pairs_or_seeds": found and found.n,
        **{name: found and getattr(found, name) for name in OF_DIFFERENCE},
        "against": found and found.baseline,
        "tests": found and found.tests,
        "values": {str(run.seed): run.final for run in row.runs},
        "warnings": list(table.warnings),
    }
    return {key: finite(value) for key, value in entry.items()}  # JSON has no infinity, which optim.order may be


def _difference(name: str, found: Comparison | None) -> dict[str, float | None]:
    return {f"{name}{end}": getattr(found, key) if found else None for end, key in DIFFERENCE.items()}


def as_json(tables: Sequence[Table]) -> str:
    return json.dumps(entries(tables), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def as_csv(tables: Sequence[Table]) -> str:
    """Return the same as CSV, with lists and objects as JSON."""
    from pandas import DataFrame  # slow to import

    return render.csv(DataFrame(entries(tables), dtype=object))


def as_latex(tables: Sequence[Table], command: str) -> str:
    """Return tables for the package booktabs, with their warnings as notes."""
    parts = [f"% {command}\n% \\usepackage{{booktabs}}\n"]
    for table in tables:
        made = format.sheet(table, format.comparison)
        made = replace(made, caption=f"{made.caption}. {format.LEGEND} {format.BOLD}")
        parts.append(render.latex(made, table.warnings))
    return "\n".join(parts)


def as_markdown(tables: Sequence[Table], command: str) -> str:
    parts = [f"**{markdown_text(headline(tables))}**", markdown_text(clock(tables))]
    parts += [part for table in tables for part in _table(table)]
    parts.append(f"{format.LEGEND} {format.BOLD} {format.sentence(format.LEGEND_OF_MARKS)}")
    return "\n\n".join(filter(None, [*parts, f"    {command}\n"]))


def _table(table: Table) -> Iterator[str]:
    made = format.sheet(table)
    yield f"## {markdown_text(made.caption)}"
    yield render.markdown(made)
    if table.warnings:
        yield "\n".join(f"- {markdown_text(warning)}" for warning in table.warnings)
    for beside in tuning.beside(table):
        yield f"{markdown_text(beside.caption)}\n\n{render.markdown(beside)}"


def trials_as_markdown(tables: Sequence[Table], command: str) -> str:
    """Return every trial of each table; an empty text if no row has several."""
    parts = [
        f"## {markdown_text(format.title(table))}\n\n{markdown_text(made.caption)}\n\n{render.markdown(made)}"
        for table in tables
        if (made := tuning.trials(table))
    ]
    return "\n\n".join([*parts, f"    {command}\n"]) if parts else ""
