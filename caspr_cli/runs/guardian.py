"""Outlives the command line of a sweep whose jobs run beside it: ends what is left when that is killed.

``python -m caspr_cli.runs.guardian FOLDER``, with standard input from the command line: a byte says that it has ended
by itself, the end of the stream alone that it was killed. Jobs that run save first; idle processes of the launcher end
at once, and the sweep's folder is removed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from caspr_cli.runs.processes import LAUNCHER, command_of, with_variable

SWEEP = "CASPR_SWEEP"  # environment variable of all processes that a launcher starts: the folder
PATIENCE = 60.0  # seconds for jobs to save
TICK = 0.2


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """While a launcher starts processes on this machine."""
    os.environ[SWEEP] = str(folder)
    module = [sys.executable, "-m", "caspr_cli.runs.guardian", str(folder)]
    guardian = subprocess.Popen(
        module,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in the terminal is not for it
    )
    assert guardian.stdin is not None
    try:
        yield
    finally:
        del os.environ[SWEEP]
        with suppress(OSError):
            guardian.stdin.write(b"\n")
            guardian.stdin.close()
        guardian.wait()


def end(folder: Path, patience: float) -> None:
    """End the processes of a sweep: idle ones at once, others after they have saved. Removes the folder."""
    with suppress(OSError), (folder / "stop").open("a", encoding="utf8") as file:
        file.write(f"{int(signal.SIGTERM)}\n")  # no other job starts
    deadline = time.monotonic() + patience
    while left := [pid for pid in with_variable(SWEEP, str(folder)) if pid != os.getpid()]:
        saving = set(with_variable(LAUNCHER)) | _busy(folder) if time.monotonic() < deadline else set()
        for pid in left:
            # What keeps track of Python's shared memory cleans that up, and ends with the last of the others.
            if pid not in saving and (time.monotonic() >= deadline or b"resource_tracker" not in command_of(pid)):
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(TICK)
    shutil.rmtree(folder, ignore_errors=True)


def _busy(folder: Path) -> set[int]:
    """The processes with a job that runs."""
    found = set()
    for file in folder.glob("job*.json"):
        with suppress(OSError, ValueError, LookupError, TypeError):
            job = json.loads(file.read_bytes())
            if job["state"] == "started":
                found.add(job["process"])
    return found


def main(folder: str) -> int:
    """Exit code 0."""
    if not os.read(0, 1):
        end(Path(folder), PATIENCE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
