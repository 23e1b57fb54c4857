"""A question of theory and its answer: what ``caspr-verify`` computes, and how it is printed and written.

The tables are pandas DataFrames, made by :func:`table`, which keeps their title and formats in ``attrs``.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caspr_cli.common.files import write_output
from caspr_cli.common.format import count, finite, listed, wrapped
from caspr_cli.report import render
from caspr_cli.report.render import Column, Sheet

if TYPE_CHECKING:
    from pandas import DataFrame

WIDTH = 120  # of a terminal that does not say its own
WIDEST = 40  # characters of a cell, in a table that is too wide for the terminal
YES, MIXED, NO = "Yes", "Mixed", "No"
MARKS = {True: ("✓", "held"), False: ("✗", "failed")}


@dataclass(frozen=True)
class Figure:
    """A picture: SVG as ``report.style`` makes it, and what it shows in words."""

    name: str
    title: str
    svg: str
    alt: str


@dataclass(frozen=True)
class Answer:
    """The findings of one command of ``caspr-verify``."""

    name: str
    question: str
    finding: str = ""  # the answer in one sentence of at most 30 words, made from the numbers
    verdict: str = YES  # the answer in a word, made from the numbers, where all claims held
    formula: str = ""  # what the question is about, as plain text: `X_Shampoo`, `F~^½`, `(1 − x)^(−1/p)`
    tables: Mapping[str, DataFrame] = field(default_factory=dict)  # by the name of their CSV file, each made by `table`
    figures: tuple[Figure, ...] = ()
    # each statement that should hold, and whether it held wherever it was checked; if one did not, the command fails
    claims: tuple[tuple[str, bool], ...] = ()
    counterexamples: tuple[str, ...] = ()  # statements that do not hold in general, each with how often it failed here
    text: tuple[str, ...] = ()  # more paragraphs, where the tables do not suffice
    command: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def word(self) -> str:
        """Yes, Mixed or No; where a claim failed, it is no Yes."""
        held = [held for _, held in self.claims]
        if held and not any(held):
            return NO
        return MIXED if self.verdict == YES and not all(held) else self.verdict


def judged(found: Sequence[bool]) -> str:
    return YES if all(found) else MIXED if any(found) else NO


def table(
    rows: Sequence[Mapping[str, Any]] | DataFrame,
    title: str,
    *,
    heads: Mapping[str, str] | None = None,
    formats: Mapping[str, str] | None = None,
    note: str = "",
    shown: int | None = None,
) -> DataFrame:
    """Return the rows as a table of an answer.

    Args:
        rows: with the same keys, which are the columns of CSV and JSON files; None or NaN: not known.
        heads: by key, what people read above the column, with the unit; by default the key.
        formats: by key, the format specification of a number, as ``.3g``.
        shown: how many rows people see; 0: the table is for files alone; None: all. Files have all rows.
    """
    from pandas import DataFrame  # slow to import

    made = DataFrame(rows, dtype=object)  # integers stay integers beside None
    made.attrs = {"title": title, "heads": heads or {}, "formats": formats or {}, "note": note, "shown": shown}
    return made


def cell(value: Any, form: str = "") -> str:
    """Return a value as people read it; a dash where it is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, form) if isinstance(value, (int, float)) else str(value)


def sheet(made: DataFrame) -> Sheet:
    """Return the rows that people see; columns without text are aligned to the right."""
    heads, formats, shown = (made.attrs[name] for name in ("heads", "formats", "shown"))
    rows = made if shown is None else made.head(shown)
    columns = [
        Column(
            str(heads.get(key, key)),
            [cell(value, formats.get(key, "")) for value in rows[key]],
            right=not any(isinstance(value, str) for value in made[key]),
            spare=max(place - 1, 0),
        )
        for place, key in enumerate(made.columns)
    ]
    return Sheet(columns, made.attrs["title"])


def rest(name: str, made: DataFrame) -> str:
    """Return how many rows are not shown, and which file has them; empty if all are shown."""
    left = 0 if made.attrs["shown"] is None else len(made) - made.attrs["shown"]
    return f"{count(left, 'more row')} in {name}.csv" if left > 0 else ""


def visible(answer: Answer) -> dict[str, DataFrame]:
    """Return the tables that are not for files alone."""
    return {name: made for name, made in answer.tables.items() if len(made) and made.attrs["shown"] != 0}


def lines(answer: Answer, width: int = WIDTH) -> Iterator[str]:
    yield from textwrap.wrap(answer.question, width)
    if answer.formula:
        yield from ["", f"  {answer.formula}"]
    for text in filter(None, (said(answer), *answer.text)):
        yield ""
        yield from textwrap.wrap(text, width)
    if answer.claims:
        yield ""
    for text, held in answer.claims:
        yield from wrapped(f"{MARKS[held][1]:<9}{text}", width)
    for text in answer.counterexamples:
        yield from wrapped(f"{'not true':<9}{text}", width)
    for name, made in visible(answer).items():
        yield ""
        yield from table_lines(name, made, width)


def said(answer: Answer) -> str:
    """Return the answer in a word, and the sentence that has its numbers."""
    return f"{answer.word}. {answer.finding}" if answer.finding else ""


def table_lines(name: str, made: DataFrame, width: int) -> Iterator[str]:
    """Yield title, as many columns as there is room for, and the note."""
    whole = sheet(made)
    yield from textwrap.wrap(whole.caption, width)
    lines, omitted = render.terminal(whole, width)
    if omitted or max(map(len, lines)) > width:
        columns = [replace(c, head=_cut(c.head), cells=list(map(_cut, c.cells))) for c in whole.columns]
        lines, omitted = render.terminal(Sheet(columns), width)
    yield from lines
    if left_out := "; ".join(filter(None, [f"no room for: {listed(omitted)}" if omitted else "", rest(name, made)])):
        yield from textwrap.wrap(f"({left_out})", width)
    yield from textwrap.wrap(made.attrs["note"], width)


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


def write(answer: Answer, directory: Path) -> list[Path]:
    """Write all files of an answer, each whole or not at all, and return their paths.

    A page in Markdown, everything in JSON, a CSV for each table, an SVG for each figure. Raises UserError if nothing
    can be written there.
    """
    contents = {
        f"{answer.name}.md": as_markdown(answer),
        f"{answer.name}.json": as_json(answer),
        **{f"{name}.csv": render.csv(made) for name, made in answer.tables.items()},
        **{f"{figure.name}.svg": figure.svg for figure in answer.figures},
    }
    for name, content in contents.items():
        write_output(directory / name, content)
    return [directory / name for name in contents]


def as_json(answer: Answer | Sequence[Answer]) -> str:
    """Return one answer as an object, several as a list; figures are files of their own."""
    made = _plain(answer) if isinstance(answer, Answer) else [_plain(one) for one in answer]
    return json.dumps(finite(made), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(answer: Answer) -> dict[str, Any]:
    tables = {
        name: {
            "title": made.attrs["title"],
            "note": made.attrs["note"],
            "columns": {key: made.attrs["heads"].get(key, key) for key in made.columns},
            "rows": made.to_dict("records"),
        }
        for name, made in answer.tables.items()
    }
    return {
        **{name: getattr(answer, name) for name in ("name", "question", "formula", "finding", "text")},
        "answer": answer.word,
        "claims": [{"statement": text, "held": held} for text, held in answer.claims],
        "counterexamples": answer.counterexamples,
        "tables": tables,
        "figures": {figure.name: {"title": figure.title, "alt": figure.alt} for figure in answer.figures},
        "command": answer.command,
        "provenance": answer.provenance,
    }


def as_markdown(answer: Answer) -> str:
    """Return a page that stands beside its figures."""
    claims = [f"- {MARKS[held][0]} {text} ({MARKS[held][1]})" for text, held in answer.claims]
    claims += [f"- not true in general: {text}" for text in answer.counterexamples]
    figures = []
    for figure in answer.figures:
        label = re.sub(r"[\[\]\s]+", " ", figure.alt).strip()  # can stand in the brackets of a link
        figures.append(f"![{label}]({figure.name}.svg)\n\n{figure.title}")
    tables = []
    for name, made in visible(answer).items():
        more = rest(name, made)
        note = " ".join(filter(None, [made.attrs["note"], f"({more}.)" if more else ""]))
        lines = render.markdown(sheet(made), aligned=True)
        tables.append("\n\n".join(filter(None, [f"## {made.attrs['title']}", lines, note])))
    made_by = f"Made by\n\n    {answer.command}" if answer.command else ""
    formula = f"    {answer.formula}" if answer.formula else ""
    parts = [f"# {answer.question}", formula, said(answer), *answer.text, "\n".join(claims), *tables, *figures, made_by]
    return "\n\n".join(filter(None, [*parts, origin(answer)])) + "\n"


def origin(answer: Answer) -> str:
    """Return what people read of the provenance; what is nested is left to JSON."""
    plain = {key: value for key, value in answer.provenance.items() if isinstance(value, (str, int, float))}
    return "; ".join(f"{key} {value}" for key, value in plain.items())


def summary(answer: Answer) -> str:
    held = sum(held for _, held in answer.claims)
    said = [f"{held} of {count(len(answer.claims), 'statement')} held"] if answer.claims else []
    if n := len(answer.counterexamples):
        said.append(f"{count(n, 'statement')} checked that {'are' if n > 1 else 'is'} not true in general")
    return "; ".join(said)
