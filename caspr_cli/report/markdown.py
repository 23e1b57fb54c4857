"""Tables as Markdown: results, budgets, and what each row ran with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from caspr_cli.report import format, tuning
from caspr_cli.report.headline import costs, headline
from caspr_cli.report.model import Table
from caspr_cli.report.render import markdown, markdown_text


def compared(tables: Sequence[Table], command: str) -> str:
    """Return all tables with their warnings, and how to read them."""
    parts = [f"**{markdown_text(headline(tables))}**", markdown_text(costs(tables))]
    parts += [part for table in tables for part in _table(table)]
    return "\n\n".join(
        filter(
            None,
            [*parts, f"{format.LEGEND} {format.BOLD} {format.sentence(format.LEGEND_OF_MARKS)}", f"    {command}\n"],
        )
    )


def _table(table: Table) -> Iterator[str]:
    yield f"## {markdown_text(format.title(table))}"
    yield markdown(format.cells(table), strong=format.strong(table))
    if table.warnings:
        yield "\n".join(f"- {markdown_text(warning)}" for warning in table.warnings)
    for caption, cells in tuning.beside(table):
        yield f"{markdown_text(caption)}\n\n{markdown(cells)}"


def trials(tables: Sequence[Table], command: str) -> str:
    """Return every trial of each table."""
    parts = [
        f"## {markdown_text(format.title(table))}\n\n{markdown_text(tuning.TRIALS)}\n\n{markdown(cells)}"
        for table in tables
        if len(cells := tuning.trials(table)) > 1
    ]
    return "\n\n".join([*parts, f"    {command}\n"])
