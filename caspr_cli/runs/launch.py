"""Turn one recipe into one record: a fresh process, or one for each device, from here to its end.

A fresh process group for each run is what makes sweeps over ``trainer.devices`` safe: nothing of an earlier job
(environment, process group, random state) can leak into the next.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from caspr_cli.recipe import compose
from caspr_cli.recipe.schema import Recipe, Resume
from caspr_cli.runs import provenance
from caspr_cli.runs.record import (
    DONE,
    FAILED,
    LAUNCHER,
    PREEMPTED,
    RUNNING,
    Record,
    RecordDamagedError,
    now,
    write_whole,
)

# Exit codes, as documented in the README.
OK, RUN_FAILED, BAD_USAGE, SOME_FAILED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143

# What a launcher of ours or another's sets for its children; a fresh group must not see it.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    record: Record
    exit_code: int
    ran: bool  # False: it was done already, or had failed and was not to be retried


def plan(recipe: Recipe, record: Record) -> str:
    """What running this recipe means now: ``new``, ``continue``, ``skip`` (done) or ``failed`` (not retried)."""
    if recipe.resume == Resume.never:
        return "new"
    state = record.status.get("state")
    if state is None:
        if record.checkpoints.exists() or record.result:
            raise RecordDamagedError(record.path / "status.json")
        return "new"
    if state == DONE and "target" in record.result:
        return "skip"
    if state == FAILED and record.status.get("user_error"):
        return "new"  # nothing was trained, and what was wrong may have been mended outside
    if state == FAILED and recipe.resume != Resume.retry:
        return "failed"
    return "continue" if record.last.exists() else "new"


def run(recipe: Recipe, command: list[str]) -> Outcome:
    """Run a recipe to its end.

    Raises:
        RecordBusyError: another process runs it.
    """
    record = Record.of(recipe)
    with record.held() as lock:
        todo = plan(recipe, record)
        if todo in ("skip", "failed"):
            return Outcome(record, OK if todo == "skip" else RUN_FAILED, ran=False)
        attempts = 0 if recipe.resume == Resume.never else record.status.get("attempts", 0)
        if todo == "new":
            _clear(record)
        write_whole(record.config, compose.save(recipe))
        record.write("provenance.json", provenance.collect(command))
        started = {"pid": os.getpid(), "host": socket.gethostname(), "started": now()}
        record.write("status.json", {"state": RUNNING, "attempts": attempts + 1, "error": None} | started)
        returned, caught = _supervise(recipe, record, lock)
        return Outcome(record, _settle(record, returned, caught), ran=True)


def preflight(recipe: Recipe) -> int:
    """Print what the recipe's optimizer will do to each tensor. Returns the exit code; nothing is written."""
    command = [sys.executable, "-m", "caspr_cli.runs.preflight"]
    done = subprocess.run(command, input=compose.save(recipe), text=True, check=False)
    if done.returncode < 0:
        return INTERRUPTED if done.returncode == -signal.SIGINT else TERMINATED
    return done.returncode


def _clear(record: Record) -> None:
    # What says "done" goes first: cut off in the middle, the rest is not taken for a record.
    for path in sorted(record.path.iterdir(), key=lambda path: path.name not in ("status.json", "result.json")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def worker_command(recipe: Recipe, record: Record) -> list[str]:
    """One process, or N under torch's elastic launcher on a free port of its own."""
    worker = ["-m", "caspr_cli.runs.worker", str(record.path.resolve())]
    if recipe.trainer.devices == 1:
        return [sys.executable, *worker]
    elastic = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={recipe.trainer.devices}"]
    return [sys.executable, *elastic, *worker]


def _supervise(recipe: Recipe, record: Record, lock: int) -> tuple[int, int | None]:
    """Start the worker and wait. Returns its exit status, and the signal that was passed on to it, if any."""
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES} | {LAUNCHER: str(os.getpid())}
    if recipe.trainer.devices > 1:
        # Ranks share the cores; left alone, each would take them all.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // recipe.trainer.devices)))
    written = record.log.stat().st_size if record.log.exists() else 0
    with record.log.open("ab") as log:
        # A session of its own: Ctrl-C in the terminal reaches this process alone, which passes it on once.
        child = subprocess.Popen(
            worker_command(recipe, record),
            stderr=log,
            env=environment,
            pass_fds=[lock],
            start_new_session=True,
        )
        with _passing_on(child) as caught:
            returned = child.wait()
    if recipe.trainer.devices > 1 and returned > 0 and _rank_was_killed(record, written):
        returned = -signal.SIGKILL
    return returned, caught.get("signal")


def _rank_was_killed(record: Record, start: int) -> bool:
    """Whether torch's launcher reports a rank that someone ended: the others then fail on their lost connection."""
    with record.log.open("rb") as log:
        log.seek(start)
        return re.search(rb"Signal \d+ \((SIGKILL|SIGTERM)\) received by PID", log.read()) is not None


@contextmanager
def _passing_on(child: subprocess.Popen[Any]) -> Iterator[dict[str, int]]:
    """Pass SIGINT, SIGTERM and SIGHUP to the child, which saves and ends; a third one kills it."""
    caught: dict[str, int] = {}

    def handler(number: int, frame: FrameType | None) -> None:
        caught.setdefault("signal", number)
        caught["times"] = caught.get("times", 0) + 1
        if child.poll() is not None:
            return
        if caught["times"] < 3:
            child.send_signal(signal.SIGTERM)
        else:
            os.killpg(child.pid, signal.SIGKILL)

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield caught
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


# A worker that ends by one of these is at fault itself; by another signal, someone ended it.
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


def _settle(record: Record, returned: int, caught: int | None) -> int:
    """The exit code; ``status.json`` gets an end where the worker could not write one itself."""
    state = record.status.get("state")
    killed = returned < 0 and -returned not in CRASHES
    if state == RUNNING or (state == FAILED and killed):  # it was killed, or told to stop before its first step
        how = signal.Signals(-returned).name if returned < 0 else f"exit status {returned}"
        state = PREEMPTED if killed or caught else FAILED
        error = None if caught else f"a worker ended with {how}; see {record.log}"
        try:
            record.update_status(state=state, error=error)
        except OSError as full:  # a disk without room for a line: the state on it stays "running", which is continued
            print(f"error: {record.path}: {full}", file=sys.stderr)
            return RUN_FAILED
    if state == DONE:
        return OK
    if state == PREEMPTED:
        return INTERRUPTED if caught == signal.SIGINT else TERMINATED
    return BAD_USAGE if record.status.get("user_error") else RUN_FAILED


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
