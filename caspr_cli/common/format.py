"""Counts, lists, durations, sizes and tables as text."""

import io
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TextIO

SECONDS_BETWEEN_LINES = 10  # of progress, where no terminal shows it


def count(number: int, noun: str, ending: str = "s") -> str:
    """Return ``1 run`` or ``2,000 runs``."""
    return f"{number:,} {noun}{ending * (number != 1)}"


def listed(values: Iterable[object], most: int = 8) -> str:
    """Return ``a, b and c``; the end of a list longer than ``most`` as a number."""
    words = list(map(str, values))
    if len(words) > most:
        return f"{', '.join(words[: most - 1])} and {len(words) - most + 1} more"
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else "none"


def duration(seconds: float | None) -> str:
    """Return ``9.5 s``, ``2 min 05 s`` or ``3 h 20 min``; a dash if the time is not known."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def milliseconds(value: float | None) -> str:
    """Return about three digits without a unit: ``0.012``, ``1.23``, ``12.3``, ``12,346``; a dash if not known."""
    if value is None:
        return "-"
    if value >= 10:
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def size(number: float, unit: str = "B") -> str:
    """Return a size with three digits and a decimal prefix, as ``12.3 MB``."""
    value, prefixes = float(f"{number:.3g}"), ["", "k", "M", "G", "T", "P"]
    while value >= 1000 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:g} {prefixes[0]}{unit}"


def finite(value: Any, *, infinities: bool = True) -> Any:
    """Return the value as JSON can hold it: each NaN as None, each infinity as text, or as None without ``infinities``.

    A record has no infinities, as whatever reads it expects numbers.
    """
    if isinstance(value, dict):
        return {str(key): finite(inner, infinities=infinities) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner, infinities=infinities) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value) if infinities and not math.isnan(value) else None
    return value


def terminal_width(elsewhere: int = sys.maxsize) -> int:
    """Return the columns of the terminal, or ``elsewhere`` in a pipe: by default so many that nothing is left out."""
    return shutil.get_terminal_size((elsewhere, 24)).columns


def wrapped(text: str, width: int) -> list[str]:
    """Return the lines of a text whose first word stands in a column of its own, nine characters wide."""
    return textwrap.wrap(text, width, subsequent_indent=" " * 9, break_on_hyphens=False, break_long_words=False)


def table(
    rows: Sequence[Sequence[str]], right: Sequence[bool] | None = None, bold: Collection[tuple[int, int]] = ()
) -> list[str]:
    """Return the lines of a table with aligned columns, two spaces apart.

    Args:
        rows: cells, the heads first.
        right: which columns are aligned to the right; by default all but the first.
        bold: cells, as line and column, that have the codes of a terminal for it.
    """
    from rich.console import Console  # slow to import
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    for k in range(len(rows[0])):
        made.add_column(justify="right" if (right[k] if right else k > 0) else "left", no_wrap=True)
    for line, row in enumerate(rows):
        made.add_row(*(Text(text, style="bold" if (line, k) in bold else "") for k, text in enumerate(row)))
    width = sum(max(len(row[k]) for row in rows) + 2 for k in range(len(rows[0])))
    console = Console(file=io.StringIO(), width=2 * width, color_system="standard" if bold else None,
                      force_terminal=bool(bold), legacy_windows=False)  # fmt: skip
    with console.capture() as captured:
        console.print(made)
    return [line.rstrip() for line in captured.get().splitlines()]


class Progress:
    """One line that is overwritten while long work goes on.

    Where the stream is no terminal, it is a plain line, and the next one after so many ``seconds``; None: none.
    """

    def __init__(self, stream: TextIO, seconds: float | None = None) -> None:
        self._stream, self._shown = stream, stream.isatty()
        self._seconds, self._last_line = seconds, -math.inf

    def say(self, text: str) -> None:
        if self._shown:
            print(f"\r\x1b[K{text}", end="", file=self._stream, flush=True)
        elif self._seconds is not None and time.monotonic() - self._last_line >= self._seconds:
            self._last_line = time.monotonic()
            print(text, file=self._stream, flush=True)

    def clear(self) -> None:
        if self._shown:
            self.say("")
