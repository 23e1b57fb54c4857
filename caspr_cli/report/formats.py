"""Tables as JSON, CSV, Markdown and LaTeX."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from caspr_cli.report import words
from caspr_cli.report.model import Row, Table
from caspr_cli.report.rows import setting

if TYPE_CHECKING:
    from pandas import DataFrame

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"$<$", ">": r"$>$", "|": r"\textbar{}",
}  # fmt: skip
# What Markdown would take for more than text; an underscore within a word is none of it.
MARKDOWN = re.compile(r"[\\`*|\[]|<(?=[A-Za-z/!?])|(?<!\w)_|_(?!\w)")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what begins with one, a spreadsheet computes
TABLE_KEYS = ("task", "scale", "data", "data_hash", "metric", "higher_is_better", "target", "baseline")
ROW_KEYS = (
    "n", "mean", "sd", "ci_low", "ci_high", "test_mean", "test_sd", "test_n", "steps_to_target", "seconds_to_target",
    "reached",
)  # fmt: skip
LEGEND = (
    "n: seeds; mean ± sd and its 95 % interval (Student's t) of validation at the end, over seeds that did not choose "
    "the trial where there are two; test: of the same runs; to target: median over seeds, in brackets how many reached "
    "it. Verdicts: paired t-test where all seeds of a row or of the baseline are common, else Welch's, at 5 % after "
    f"Holm's correction for the rows of a table; {words.DIFFERENCES}; {words.POWERED}. "
    f"{words.sentence(words.ABOUT_SETTINGS)}; {words.NOT_CORRECTED}; "
    f"{words.BOUNDED}. Rows with failed seeds stand behind the others."
)


@dataclass(frozen=True)
class Column:
    """One column for people; those with the highest ``spare`` go first where there is no room."""

    head: str
    cell: Callable[[Row], str]
    spare: int = 0


def columns(table: Table) -> list[Column]:
    """Those that this table needs."""
    found = [
        Column("optimizer", lambda row: row.label),
        Column("n", words.seeds),
        Column("mean ± sd", lambda row: words.spread(row.mean, row.sd)),
        Column("95 % interval", lambda row: words.between(row.ci_low, row.ci_high, row.sd), 2),
        Column("test", words.test, 3),
    ]
    if table.target is not None:
        found += [
            Column(f"steps to {table.target:g}", words.steps_to_target, 1),
            Column("time to it", lambda row: words.duration(row.seconds_to_target), 4),
        ]
    return [*found, Column("trials", words.budget, 5)]


def title(table: Table) -> str:
    way = "higher" if table.higher_is_better else "lower"
    target = "" if table.target is None else f"; target {table.target:g}"
    data = f"{table.data} data{f' {table.data_hash[:8]}' if table.data_hash else ''}"
    return f"{table.task}, {table.scale} scale, {data}: {table.metric} at the end, {way} is better{target}"


def baseline(table: Table) -> str:
    """What rows are compared with, in words."""
    own = sum(row.is_baseline for row in table.rows) > 1
    return f"each optimizer's own row with {table.baseline}" if own else str(table.baseline)


def verdict(row: Row) -> str:
    """Against the baseline, in words; empty where there is nothing to say."""
    return words.against(row.difference) if row.difference else "baseline" if row.is_baseline else ""


def selected(row: Row) -> str:
    """The values of the tuned keys, as ``lr=0.006``."""
    return " ".join(setting(key, value) for key, value in row.selected.values.items()) if row.selected else ""


def entries(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """One flat object for each row of each table, in the units of the metric, steps and seconds; None: not known."""
    return [_entry(table, row) for table in tables for row in table.rows]


def _entry(table: Table, row: Row) -> dict[str, Any]:
    difference = asdict(row.difference) if row.difference else {}
    return {
        **{name: getattr(table, name) for name in TABLE_KEYS},
        "optim": row.optim,
        "label": row.label,
        **{name: getattr(row, name) for name in ROW_KEYS},
        "seeds": [run.seed for run in row.runs],
        "failed": len(row.runs) - row.n,
        "fresh": row.fresh,
        "trials": len(row.trials),
        "budget": row.budget,
        "best_of": list(row.best_of),
        "selected": {k: _json(v) for k, v in row.selected.values.items()} if row.selected else None,
        "difference": difference.get("value"),
        "difference_low": difference.get("low"),
        "difference_high": difference.get("high"),
        "test_difference": difference.get("test"),
        "test_difference_low": difference.get("test_low"),
        "test_difference_high": difference.get("test_high"),
        "pairs_or_seeds": difference.get("n"),
        **{name: difference.get(name) for name in ("verdict", "p_value", "p_holm", "paired", "against", "tests")},
        "values": {str(run.seed): run.final for run in row.runs},
        "warnings": list(table.warnings),
    }


def _json(value: Any) -> Any:
    """JSON has no infinity, which optim.order may be."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def as_json(tables: Sequence[Table]) -> str:
    return json.dumps(entries(tables), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def as_csv(tables: Sequence[Table]) -> str:
    """The same, lists and objects as JSON."""
    from pandas import DataFrame  # slow to import

    return to_csv(DataFrame(entries(tables), dtype=object))


def to_csv(frame: DataFrame) -> str:
    """Return a table as CSV, in which no text is a formula to a spreadsheet; numbers stay numbers."""
    from pandas import DataFrame

    cells = {key: [_harmless(value) for value in frame[key]] for key in frame.columns}
    return str(DataFrame(cells, dtype=object).to_csv(index=False, lineterminator="\n"))


def _harmless(value: Any) -> Any:
    """Return a cell of a CSV: lists and objects as JSON, and a quote before what a spreadsheet would compute."""
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Heads and rows, with what was selected and the verdict."""
    shown = columns(table)
    heads = [column.head for column in shown] + ["selected", "verdict"]
    return heads, [
        [*(column.cell(row) for column in shown), selected(row) or "-", verdict(row) or "-"] for row in table.rows
    ]


def as_markdown(tables: Sequence[Table], command: str) -> str:
    parts = []
    for table in tables:
        heads, rows = _cells(table)
        lines = [heads, ["---"] * len(heads), *(map(_plain, row) for row in rows)]
        parts.append(f"## {_plain(title(table))}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
        if table.warnings:
            parts.append("\n".join(f"- {_plain(warning)}" for warning in table.warnings))
    return "\n\n".join([*parts, f"{LEGEND}\n\n    {command}\n"])


def _plain(text: str) -> str:
    """As Markdown that is shown as this text, also in a table."""
    return MARKDOWN.sub(r"\\\g<0>", text)


def as_latex(tables: Sequence[Table], command: str) -> str:
    """Tables for the package booktabs."""
    parts = [f"% {command}\n% \\usepackage{{booktabs}}"]
    for table in tables:
        heads, rows = _cells(table)
        body = [" & ".join(map(_escaped, line)) + r" \\" for line in [heads, *rows]]
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    rf"  \caption{{{_escaped(title(table))}. {_escaped(LEGEND)}}}",
                    r"  \begin{tabular}{l" + "r" * (len(heads) - 3) + r"lp{0.3\linewidth}}",  # verdicts are sentences
                    r"    \toprule",
                    f"    {body[0]}",
                    r"    \midrule",
                    *(f"    {line}" for line in body[1:]),
                    r"    \bottomrule",
                    r"  \end{tabular}",
                    *(rf"  \par\smallskip\raggedright\footnotesize Note: {_escaped(text)}" for text in table.warnings),
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    return re.sub("|".join(map(re.escape, LATEX)), lambda match: LATEX[match[0]], text)
