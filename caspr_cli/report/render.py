"""Tables of text, as lines of a terminal, Markdown and LaTeX (pages have them by a macro); data frames as CSV."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from caspr_cli.common.format import table

if TYPE_CHECKING:
    from pandas import DataFrame

# Characters that mean something to LaTeX or Markdown; to Markdown an underscore within a word does not.
LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"$<$", ">": r"$>$", "|": r"\textbar{}",
})  # fmt: skip
MARKDOWN = re.compile(r"[\\`*|\[]|<(?=[A-Za-z/!?])|(?<!\w)_|_(?!\w)")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet computes what begins with one of these
MORE = "a wider terminal, --json or --to"


@dataclass(frozen=True)
class Column:
    head: str
    cells: Sequence[str]
    right: bool = True
    spare: int = 0  # a narrow terminal leaves out the columns with the highest number first, and never one with 0
    best: frozenset[int] = frozenset()  # the rows whose cell is bold


@dataclass(frozen=True)
class Sheet:
    """A table for people: texts in columns, the first of which names the rows."""

    columns: Sequence[Column]
    caption: str = ""

    def __len__(self) -> int:
        return len(self.columns[0].cells)

    @property
    def heads(self) -> list[str]:
        return [column.head for column in self.columns]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        return list(zip(*(column.cells for column in self.columns), strict=True))


def sheet(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str = "",
    *,
    left: Sequence[str] = (),
    spare: Sequence[int] | None = None,
) -> Sheet:
    """Return a sheet of rows; the columns with the heads ``left`` are aligned to the left, as the first is.

    By default the last of more than two columns is left out first.
    """
    spare = spare or [max(k - 1, 0) for k in range(len(heads))]
    columns = zip(*rows, strict=True) if (rows := list(rows)) else [()] * len(heads)
    right = [k > 0 and head not in left for k, head in enumerate(heads)]
    return Sheet(list(map(Column, heads, columns, right, spare)), caption)


def best(values: Sequence[float | None], *, higher: bool = True) -> frozenset[int]:
    """Return the places of the best value; none if all have it."""
    top = (max if higher else min)((value for value in values if value is not None), default=None)
    found = frozenset(k for k, value in enumerate(values) if value is not None and value == top)
    return found if len(found) < len(values) else frozenset()


def terminal(made: Sheet, width: int, *, bold: bool = False) -> tuple[list[str], list[str]]:
    """Return the lines of a table that is at most so wide, heads first, and the heads of the columns left out for it.

    With ``bold`` the best cells have the codes of a terminal for it.
    """
    shown = list(made.columns)
    widths = {id(column): max(map(len, (column.head, *column.cells))) + 2 for column in shown}
    while sum(widths[id(column)] for column in shown) - 2 > width and any(column.spare for column in shown):
        shown.remove(max(shown, key=lambda column: column.spare))
    places = {(row + 1, k) for k, column in enumerate(shown) for row in column.best if bold}
    lines = [[column.head for column in shown], *zip(*(column.cells for column in shown), strict=True)]
    return table(lines, [column.right for column in shown], places), [c.head for c in made.columns if c not in shown]


def lines(made: Sheet, width: int, *, bold: bool = False, more: str = MORE) -> list[str]:
    """Return a table as lines of a terminal; the last line names the columns that did not fit, and what has all."""
    found, omitted = terminal(made, width, bold=bold)
    return [*found, *no_room(omitted, width, more)]


def no_room(omitted: Sequence[str], width: int, more: str = MORE) -> list[str]:
    """Return a note on columns that are not shown, and what shows them."""
    return textwrap.wrap(f"(no room for: {', '.join(omitted)}; {more} has all)", width) if omitted else []


def markdown(made: Sheet, *, aligned: bool = False) -> str:
    """Return a table of Markdown; ``aligned``: it says which columns are aligned to the right."""
    rule = ["---:" if aligned and column.right else "---" for column in made.columns]
    heads, *rows = _emphasized(made, markdown_text, "**{}**")
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, rule, *rows])


def markdown_text(text: str) -> str:
    """Return a text that Markdown shows as it is."""
    return MARKDOWN.sub(r"\\\g<0>", text)


def latex(made: Sheet, notes: Iterable[str]) -> str:
    """Return a table for the package booktabs, whose last column has sentences, with notes below."""
    from pandas import DataFrame  # slow to import

    heads, *rows = _emphasized(made, lambda text: text.translate(LATEX), r"\textbf{{{}}}")
    form = "".join("r" if column.right else "l" for column in made.columns[:-1]) + r"p{0.3\linewidth}"
    text = DataFrame(rows, columns=heads).style.hide(axis="index").to_latex(
        hrules=True, column_format=form, caption=made.caption.translate(LATEX)
    )  # fmt: skip
    below = [rf"\par\smallskip\raggedright\footnotesize Note: {note.translate(LATEX)}" for note in notes]
    return str(text).replace(r"\end{table}", "\n".join([*below, r"\end{table}"]))


def _emphasized(made: Sheet, escaped: Callable[[str], str], bold: str) -> list[list[str]]:
    columns = [
        [bold.format(escaped(cell)) if row in column.best else escaped(cell) for row, cell in enumerate(column.cells)]
        for column in made.columns
    ]
    return [list(map(escaped, made.heads)), *map(list, zip(*columns, strict=True))]


def csv(frame: DataFrame) -> str:
    """Return a table as CSV, in which no text is a formula to a spreadsheet; numbers stay numbers."""
    safe = {key: [_safe(value) for value in frame[key]] for key in frame.columns}
    return str(type(frame)(safe, dtype=object).to_csv(index=False, lineterminator="\n"))


def _safe(value: Any) -> Any:
    """Return a cell of a CSV: lists and objects as JSON, and a quote before what a spreadsheet would compute."""
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        return value
    quote = "'" if value.startswith(FORMULA) else ""
    return f"{quote}{value}".replace("\r", "\n")  # the csv module does not quote a \r
