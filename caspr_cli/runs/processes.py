"""The processes of a run, seen from outside. Without /proc, as on macOS, only their numbers are known."""

from __future__ import annotations

import os
from pathlib import Path

# Environment variable that tells a worker who launched it.
LAUNCHER = "CASPR_LAUNCHER"
PROC = Path("/proc")


def birth(process: int) -> int | None:
    """When a process began, in ticks since this machine did; None where that is not known.

    With it a number that was given out again is not taken for the process that had it before.
    """
    fields = _stat(process)
    return int(fields[19]) if fields else None


def lives(process: int, born: int | None = None) -> bool:
    """Whether a process is there (a dead one that nobody has waited for is not), and is the one that began then."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    fields = _stat(process)
    if not fields:
        return True
    return fields[0] != "Z" and born in (None, int(fields[19]))


def workers(record: Path, launcher: int) -> dict[int, int | None]:
    """The processes that a launcher has at work on a record, each with its rank; torch's own launcher has none."""
    found: dict[int, int | None] = {}
    for directory in PROC.glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes().split(b"\0")
            environment = (directory / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is another user's
            continue
        if os.fsencode(record.resolve()) in command and f"{LAUNCHER}={launcher}".encode() in environment:
            rank = next((word[5:] for word in environment if word.startswith(b"RANK=")), None)
            found[int(directory.name)] = None if rank is None else int(rank)
    return found


def _stat(process: int) -> list[str]:
    """From the state on: the name before it may hold blanks and brackets."""
    try:
        return (PROC / str(process) / "stat").read_text(encoding="utf8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
