"""Progress of a run: one live line on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from caspr_cli.common.format import duration
from caspr_cli.common.streams import silence

SECONDS_BETWEEN_LINES = 10
BAR = 16  # characters


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
    """The output of rank 0. As a context it shows a live line."""

    def __init__(self, max_steps: int, unit: str) -> None:
        self.console = _Console(highlight=False, soft_wrap=True)
        self._full = "━" if "utf" in self.console.encoding.lower() else "="
        self._max_steps, self._unit = max_steps, unit
        # Standard error is the log; redirecting it would show each line twice.
        live = Live(console=self.console, auto_refresh=False, transient=True, redirect_stderr=False)
        self._live = live if self.console.is_terminal else None
        self._last_line = 0.0

    def __enter__(self) -> Progress:
        if self._live:
            with _unread():
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
        with _unread():
            self.console.print(line, markup=False)
        print(line, file=sys.stderr, flush=True)

    def train(self, step: int, loss: float, lr: float, seconds_a_step: float, units_a_second: float) -> None:
        """Update the live line; in a pipe, print a line every ten seconds."""
        left = duration(seconds_a_step * (self._max_steps - step))
        line = (
            f"step {step:>{len(str(self._max_steps))}}/{self._max_steps}  loss {loss:.4f}  lr {lr:.2e}  "
            f"{seconds_a_step * 1000:.0f} ms  {units_a_second:,.0f} {self._unit}/s  {left} left"
        )
        if self._live:
            done = BAR * step // self._max_steps
            bar = self._full * done + (">" + " " * (BAR - done - 1) if done < BAR else "")
            with _unread():
                self._live.update(Text(f"{bar} {line}", overflow="crop", no_wrap=True), refresh=True)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(line)

    def validation(self, step: int, scores: dict[str, float], note: str) -> None:
        """Print a line for a validation."""
        shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        self._last_line = time.monotonic()
        self.say(f"step {step:>{len(str(self._max_steps))}}/{self._max_steps}  {shown}{note}")
