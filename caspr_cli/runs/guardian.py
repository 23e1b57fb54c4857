"""A process that ends the other processes of a sweep if the command line of the sweep is killed.

``python -m caspr_cli.runs.guardian FOLDER``, with standard input from the command line: a byte means that it ended
by itself, the end of the stream alone that it was killed. Jobs that run save first; idle processes of the launcher end
at once, and the sweep's folder is removed.
"""

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

import psutil

from caspr_cli.runs.processes import LAUNCHER, with_variable

SWEEP = "CASPR_SWEEP"  # environment variable of all processes that a launcher starts: the folder
PATIENCE = 60.0  # seconds for jobs to save
TICK = 0.2


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Run the guardian while a launcher has processes on this machine."""
    os.environ[SWEEP] = str(folder)
    module = [sys.executable, "-m", "caspr_cli.runs.guardian", str(folder)]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    # In a session of its own: Ctrl-C in the terminal is not for it.
    guardian = subprocess.Popen(module, stdin=pipe, stdout=null, stderr=null, start_new_session=True)
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
    """End the processes of a sweep, idle ones at once and others after they have saved; remove the folder."""
    with suppress(OSError), (folder / "stop").open("a", encoding="utf8") as file:
        file.write(f"{int(signal.SIGTERM)}\n")  # no other job starts
    deadline = time.monotonic() + patience
    while left := [process for process in with_variable(SWEEP, str(folder)) if process.pid != os.getpid()]:
        late = time.monotonic() >= deadline
        saving = _busy(folder).union(process.pid for process in with_variable(LAUNCHER))
        for process in left:
            with suppress(psutil.Error):
                # Python's tracker of shared memory cleans up, and ends after the last of the others.
                if late or not (process.pid in saving or any("resource_tracker" in w for w in process.cmdline())):
                    process.kill()
        time.sleep(TICK)
    shutil.rmtree(folder, ignore_errors=True)


def _busy(folder: Path) -> set[int]:
    """Return the processes whose job runs."""
    found = set()
    for file in folder.glob("job*.json"):
        with suppress(OSError, ValueError, LookupError, TypeError):
            job = json.loads(file.read_bytes())
            if job["state"] == "started":
                found.add(job["process"])
    return found


def main(folder: str) -> int:
    if not os.read(0, 1):
        end(Path(folder), PATIENCE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
