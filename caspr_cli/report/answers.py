"""Answers as lines of a terminal and as files in a directory."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from caspr_cli.report.answer import Answer, Column, Sheet
from caspr_cli.report.files import write_whole
from caspr_cli.report.terminal import wrapped
from caspr_cli.report.words import count, listed

WIDTH = 120
WIDE = 40  # characters of a cell that a terminal shows in a table of several columns
MARKS = {True: ("✓", "held"), False: ("✗", "failed")}


# ---- cells -------------------------------------------------------------------------------------------------------


def cell(value: Any, form: str) -> str:
    """A value as people read it; nothing known is a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, form) if isinstance(value, (int, float)) else str(value)


def rows_of(sheet: Sheet) -> list[list[str]]:
    """The rows that people are shown."""
    return [
        [cell(row.get(column.key), column.form) for column in sheet.columns] for row in islice(sheet.rows, sheet.shown)
    ]


def textual(sheet: Sheet, column: Column) -> bool:
    return any(isinstance(row.get(column.key), str) for row in sheet.rows)


def rest(sheet: Sheet) -> str:
    """Where the other rows are."""
    left = 0 if sheet.shown is None else len(sheet.rows) - sheet.shown
    return f"{count(left, 'more row')} in {sheet.name}.csv" if left > 0 else ""


def shown(answer: Answer) -> Iterator[Sheet]:
    """Sheets that are not for files alone."""
    return (sheet for sheet in answer.sheets if sheet.rows and sheet.shown != 0)


# ---- a terminal --------------------------------------------------------------------------------------------------


def lines(answer: Answer, width: int = WIDTH) -> Iterator[str]:
    """Question, words, statements and tables."""
    yield from textwrap.wrap(answer.question, width)
    for text in answer.words:
        yield ""
        yield from textwrap.wrap(text, width)
    if answer.holds:
        yield ""
    for text, held in answer.holds:
        yield from wrapped(f"{MARKS[held][1]:<9}{text}", width)
    for text in answer.fails:
        yield from wrapped(f"{'no law':<9}{text}", width)
    for sheet in shown(answer):
        yield ""
        yield from sheet_lines(sheet, width)


def sheet_lines(sheet: Sheet, width: int) -> Iterator[str]:
    """Title, as many columns as there is room for, and the note."""
    yield from textwrap.wrap(sheet.title, width)
    grid = [[column.head for column in sheet.columns], *rows_of(sheet)]
    texts = [textual(sheet, column) for column in sheet.columns]
    if sum(_widths(grid)) + 2 * len(texts) > width:
        grid = [[_cut(text) for text in row] for row in grid]
    widths = _widths(grid)
    fits = len(widths)
    while fits > 2 and sum(widths[:fits]) + 2 * (fits - 1) > width:
        fits -= 1
    for row in grid:
        parts = zip(row[:fits], widths, texts, strict=False)
        yield "  ".join(text.ljust(w) if left else text.rjust(w) for text, w, left in parts).rstrip()
    gone = [column.head for column in sheet.columns[fits:]]
    notes = [f"no room for: {listed(gone)}" if gone else "", rest(sheet)]
    if told := "; ".join(filter(None, notes)):
        yield from textwrap.wrap(f"({told})", width)
    yield from textwrap.wrap(sheet.note, width)


def _widths(grid: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*grid, strict=True)]


def _cut(text: str) -> str:
    return text if len(text) <= WIDE else text[: WIDE - 1] + "…"


# ---- files -------------------------------------------------------------------------------------------------------


def files(answer: Answer) -> dict[str, str]:
    """Content by name: a page in Markdown, everything in JSON, a CSV for each sheet, an SVG for each figure."""
    return {
        f"{answer.name}.md": as_markdown(answer),
        f"{answer.name}.json": as_json(answer),
        **{f"{sheet.name}.csv": as_csv(sheet) for sheet in answer.sheets},
        **{f"{figure.name}.svg": figure.svg for figure in answer.figures},
    }


def write(answer: Answer, directory: Path) -> list[Path]:
    """Write all files of an answer, each whole or not at all, and say which.

    Raises:
        ReportError: nothing can be written there.
    """
    made = files(answer)
    for name, content in made.items():
        write_whole(directory / name, content)
    return [directory / name for name in made]


def as_csv(sheet: Sheet) -> str:
    """All rows, in full precision."""
    text = io.StringIO()
    keys = [column.key for column in sheet.columns]
    writer = csv.DictWriter(text, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sheet.rows)
    return text.getvalue()


def plain(answer: Answer) -> dict[str, Any]:
    """The answer as what JSON can hold; figures are files of their own."""
    found: dict[str, Any] = _finite(
        {
            "name": answer.name,
            "question": answer.question,
            "words": answer.words,
            "holds": [{"statement": text, "held": held} for text, held in answer.holds],
            "fails": answer.fails,
            "sheets": {sheet.name: _sheet(sheet) for sheet in answer.sheets},
            "figures": {figure.name: {"title": figure.title, "alt": figure.alt} for figure in answer.figures},
            "command": answer.command,
            "provenance": answer.provenance,
        }
    )
    return found


def _sheet(sheet: Sheet) -> dict[str, Any]:
    columns = {column.key: column.head for column in sheet.columns}
    return {"title": sheet.title, "note": sheet.note, "columns": columns, "rows": sheet.rows}


def _finite(value: Any) -> Any:
    """JSON has neither infinity nor NaN: they become text, and None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def as_json(answer: Answer | Sequence[Answer]) -> str:
    """One answer as an object, several as a list."""
    made = plain(answer) if isinstance(answer, Answer) else [plain(one) for one in answer]
    return json.dumps(made, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def as_markdown(answer: Answer) -> str:
    """A page that stands beside its figures."""
    parts = [f"# {answer.question}", *answer.words]
    listing = [f"- {MARKS[held][0]} {text} ({MARKS[held][1]})" for text, held in answer.holds]
    listing += [f"- no law: {text}" for text in answer.fails]
    if listing:
        parts.append("\n".join(listing))
    parts += [_markdown_table(sheet) for sheet in shown(answer)]
    parts += [f"![{_one_line(figure.alt)}]({figure.name}.svg)\n\n{figure.title}" for figure in answer.figures]
    if answer.command:
        parts.append(f"Made by\n\n    {answer.command}")
    told = "; ".join(f"{key} {value}" for key, value in said(answer.provenance))
    return "\n\n".join([*parts, *([told] if told else [])]) + "\n"


def _markdown_table(sheet: Sheet) -> str:
    rule = ["---" if textual(sheet, column) else "---:" for column in sheet.columns]
    rows = [[column.head for column in sheet.columns], rule, *rows_of(sheet)]
    body = "\n".join(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |" for row in rows)
    notes = " ".join(filter(None, [sheet.note, f"({rest(sheet)}.)" if rest(sheet) else ""]))
    return "\n\n".join(filter(None, [f"## {sheet.title}", body, notes]))


def _one_line(text: str) -> str:
    return re.sub(r"[\[\]\s]+", " ", text).strip()


def said(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Flat, for people: what is nested is left to JSON."""
    return [(key, str(value)) for key, value in provenance.items() if isinstance(value, (str, int, float))]
