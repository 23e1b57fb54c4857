"""Progress of a run: one live line on a terminal, plain lines in a pipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from caspr_cli.common.format import SECONDS_BETWEEN_LINES, duration
from caspr_cli.common.streams import silence
from caspr_cli.runs.launch import BRIEF

BAR = 16  # characters


def fitting(parts: Sequence[str], width: int) -> str:
    """Return the parts of a live line for which there is room; the time left, which is the last, stays."""
    shown = list(filter(None, parts))
    while len(shown) > 2 and len("  ".join(shown)) >= width:
        del shown[-2]
    return "  ".join(shown)


class _Console(Console):
    """A console whose broken pipe is handled by :func:`_unread`."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@contextmanager
def _unread() -> Iterator[None]:
    """Go on where nothing can be printed any more (``| head``, a full disk): that does not end a run."""
    try:
        yield
    except OSError as error:
        silence(error)


class Progress:
    """The output of rank 0. As a context it shows a live line.

    In one of many jobs, of which each has a line when it ends (``BRIEF`` names it), the live line is all.
    """

    def __init__(self, max_steps: int, unit: str) -> None:
        self.console = _Console(highlight=False, soft_wrap=True)
        self._full = "━" if "utf" in self.console.encoding.lower() else "="
        self._max_steps, self._unit = max_steps, unit
        # Standard error is the log; redirecting it would show each line twice.
        live = Live(console=self.console, auto_refresh=False, transient=True, redirect_stderr=False)
        self._live = live if self.console.is_terminal else None
        self._last_line = 0.0
        self._brief = os.environ.get(BRIEF, "")

    def __enter__(self) -> Progress:
        if self._live:
            with _unread():
                if self._brief:  # its launcher has written what it waits for
                    self.console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
                self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            with _unread():
                self._live.stop()

    def say(self, line: str) -> None:
        """Print a line that stays, on the screen and in the log (this process's standard error)."""
        if not self._brief:
            with _unread():
                self.console.print(line, markup=False)
        print(line, file=sys.stderr, flush=True)

    def train(self, step: int, loss: float, lr: float, seconds_a_step: float, units_a_second: float) -> None:
        """Update the live line; in a pipe, print a line every ten seconds."""
        left = duration(seconds_a_step * (self._max_steps - step))
        parts = [self._step(step), f"loss {loss:.4f}", f"lr {lr:.2e}", f"{seconds_a_step * 1000:.0f} ms"]
        parts += [f"{units_a_second:,.0f} {self._unit}/s", f"{left} left"]
        line = "  ".join(parts)
        if self._live:
            done = BAR * step // self._max_steps
            bar = self._full * done + (">" + " " * (BAR - done - 1) if done < BAR else "")
            line = fitting([self._brief, f"{bar} {parts[0]}", *parts[1:]], self.console.width)
            with _unread():
                self._live.update(Text(line, overflow="crop", no_wrap=True), refresh=True)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(line)

    def validation(self, step: int, scores: dict[str, float], note: str) -> None:
        shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        self._last_line = time.monotonic()
        self.say(f"{self._step(step)}  {shown}{note}")

    def _step(self, step: int) -> str:
        return f"step {step:>{len(str(self._max_steps))}}/{self._max_steps}"
