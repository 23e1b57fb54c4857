"""Tables of text, the heads first, as lines of a terminal, Markdown and LaTeX; data frames as CSV."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from caspr_cli.common.format import table

if TYPE_CHECKING:
    from pandas import DataFrame

Cells = Sequence[Sequence[str]]
Place = tuple[int, int]  # of a cell: line, with the heads as the first, and column
# Characters that mean something to LaTeX or Markdown; to Markdown an underscore within a word does not.
LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"$<$", ">": r"$>$", "|": r"\textbar{}",
})  # fmt: skip
MARKDOWN = re.compile(r"[\\`*|\[]|<(?=[A-Za-z/!?])|(?<!\w)_|_(?!\w)")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet computes what begins with one of these


def terminal(
    cells: Cells,
    width: int,
    *,
    right: Sequence[bool] | None = None,
    spare: Sequence[int] | None = None,
    strong: Collection[Place] = (),
) -> tuple[list[str], list[str]]:
    """Return the lines of the columns for which there is room, and the heads of the other columns.

    Args:
        right: which columns are aligned to the right; by default all but the first.
        spare: by column; the highest is left out first, and one with 0 never. By default the last of more than two.
        strong: which cells are bold, by the codes of a terminal.
    """
    columns = range(len(cells[0]))
    right, spare = right or [k > 0 for k in columns], spare or [max(k - 1, 0) for k in columns]
    widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
    shown = list(columns)
    while sum(widths[k] for k in shown) - 2 > width and any(spare[k] for k in shown):
        shown.remove(max(shown, key=spare.__getitem__))
    bold = {(line, shown.index(k)) for line, k in strong if k in shown}
    lines = table([[row[k] for k in shown] for row in cells], [right[k] for k in shown], bold)
    return lines, [cells[0][k] for k in columns if k not in shown]


def markdown(cells: Cells, right: Sequence[bool] = (), strong: Collection[Place] = ()) -> str:
    """Return a table of Markdown.

    Args:
        right: which columns are aligned to the right; by default none.
        strong: which cells are bold.
    """
    heads, *rows = _emphasized(cells, markdown_text, "**{}**", strong)
    rule = ["---:" if k < len(right) and right[k] else "---" for k in range(len(heads))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, rule, *rows])


def markdown_text(text: str) -> str:
    """Return a text that Markdown shows as it is."""
    return MARKDOWN.sub(r"\\\g<0>", text)


def latex(cells: Cells, caption: str, notes: Iterable[str], strong: Collection[Place] = ()) -> str:
    """Return a table for the package booktabs, whose last column has sentences, with notes below."""
    from pandas import DataFrame  # slow to import

    heads, *rows = _emphasized(cells, lambda text: text.translate(LATEX), r"\textbf{{{}}}", strong)
    made = DataFrame(rows, columns=heads).style.hide(axis="index").to_latex(
        hrules=True, column_format="l" + "r" * (len(heads) - 3) + r"lp{0.3\linewidth}", caption=caption.translate(LATEX)
    )  # fmt: skip
    below = [rf"\par\smallskip\raggedright\footnotesize Note: {note.translate(LATEX)}" for note in notes]
    return str(made).replace(r"\end{table}", "\n".join([*below, r"\end{table}"]))


def _emphasized(cells: Cells, escaped: Callable[[str], str], bold: str, strong: Collection[Place]) -> list[list[str]]:
    return [
        [bold.format(escaped(text)) if (line, k) in strong else escaped(text) for k, text in enumerate(row)]
        for line, row in enumerate(cells)
    ]


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
