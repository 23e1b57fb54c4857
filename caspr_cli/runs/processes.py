"""The processes of a run, seen from outside. Without /proc, as on macOS, only their numbers are known."""

from __future__ import annotations

import os
from contextlib import suppress
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
    except OverflowError:  # no number that a process has
        return False
    fields = _stat(process)
    if not fields:
        return True
    return fields[0] != "Z" and born in (None, int(fields[19]))


def workers(record: Path, launcher: int) -> dict[int, int | None]:
    """The processes that a launcher has at work on a record, each with its rank; torch's own launcher has none."""
    found: dict[int, int | None] = {}
    for process, environment in with_variable(LAUNCHER, str(launcher)).items():
        if os.fsencode(record.resolve()) in command_of(process):
            rank = next((word[5:] for word in environment if word.startswith(b"RANK=")), None)
            found[process] = None if rank is None else int(rank)
    return found


def with_variable(name: str, value: str | None = None) -> dict[int, list[bytes]]:
    """The living processes of this user that were started with an environment variable, and their environments.

    Args:
        value: of the variable; None for any.
    """
    found = {}
    for directory in PROC.glob("[0-9]*"):
        try:
            environment = (directory / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is another user's
            continue
        if value is None:
            there = any(word.startswith(f"{name}=".encode()) for word in environment)
        else:
            there = os.fsencode(f"{name}={value}") in environment
        if there:
            found[int(directory.name)] = environment
    return found


def command_of(process: int) -> list[bytes]:
    """The words that started a process; empty where it has ended."""
    try:
        return (PROC / str(process) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def memory_kills() -> int:
    """How many processes the system has ended so far because memory ran out; 0 where it does not count them."""
    files = [PROC / "vmstat", Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control")]
    with suppress(OSError, ValueError):  # of this process's own group
        group = (PROC / "self" / "cgroup").read_text(encoding="utf8").splitlines()[-1].rpartition(":")[2]
        files.append(Path(f"/sys/fs/cgroup{group}/memory.events"))
    count = 0
    for file in files:
        with suppress(OSError, ValueError):
            words = [line.split() for line in file.read_text(encoding="utf8").splitlines()]
            count += sum(int(line[1]) for line in words if line[:1] == ["oom_kill"])
    return count


def _stat(process: int) -> list[str]:
    """From the state on: the name before it may hold blanks and brackets."""
    try:
        return (PROC / str(process) / "stat").read_text(encoding="utf8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
