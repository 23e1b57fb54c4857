"""A command in this process: its exit code, and what it wrote."""

import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

WITHOUT = """\
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
REPORT = "from caspr_cli.commands.report import main\nsys.exit(main())"


def without(names: Iterable[str], code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run code in another process where some modules cannot be found, as if they were not installed."""
    command = [sys.executable, "-c", WITHOUT.format(names=set(names)) + code, *argv]
    return subprocess.run(command, check=False, capture_output=True, text=True)


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
