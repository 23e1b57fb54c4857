"""How far long work has got."""

from __future__ import annotations

from typing import TextIO


class Progress:
    """One line that is written over, where someone can see it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._shown = stream, stream.isatty()

    def say(self, text: str) -> None:
        if self._shown:
            print(f"\r\x1b[K{text}", end="", file=self._stream, flush=True)

    def clear(self) -> None:
        self.say("")
