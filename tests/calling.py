"""A command in this process: its exit code, and what it wrote."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Call:
    """Called with words, it returns the command's exit code; what this call wrote is in ``out`` and ``err``."""

    name: str
    main: Callable[[], int]
    patch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    out: str = ""
    err: str = ""

    def __call__(self, *argv: str | Path) -> int:
        self.patch.setattr(sys, "argv", [self.name, *map(str, argv)])
        code = self.main()
        self.out, self.err = self.capsys.readouterr()
        return code

    def refused(self, *argv: str) -> str:
        """Call it with a mistake: exit code 2, and the one line that is returned."""
        assert self(*argv) == 2
        (line,) = self.err.removeprefix("importing torch\n").splitlines()  # before what only torch knows is refused
        assert line.startswith("error: ")
        return line
