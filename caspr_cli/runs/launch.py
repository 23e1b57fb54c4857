"""Turn one recipe into one record: a fresh process, or one for each device, from here to its end.

A fresh process group for each run is what makes sweeps over ``trainer.devices`` safe: nothing of an earlier job
(environment, process group, random state) can leak into the next.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from caspr_cli.common import shape
from caspr_cli.common.files import write_whole
from caspr_cli.common.streams import complain
from caspr_cli.recipe import compose
from caspr_cli.recipe.schema import Recipe, Resume
from caspr_cli.runs import fingerprint, provenance
from caspr_cli.runs.nodes import meeting_place
from caspr_cli.runs.processes import LAUNCHER, memory_kills, workers
from caspr_cli.runs.record import (
    CUT_OFF,
    DONE,
    FAILED,
    LOCKS,
    MEMORY,
    PREEMPTED,
    PROVENANCE,
    REFUSED,
    RUNNING,
    SECONDS_TO_WAIT,
    Holder,
    Record,
    RecordBusyError,
    RecordDamagedError,
    now,
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
    told: int | None = None  # the signal by which it was asked to stop


@dataclass(frozen=True)
class Place:
    """What the jobs of a sweep give to a run; one on its own needs nothing."""

    environment: Mapping[str, str | None] = field(default_factory=dict)  # to set, or (None) to leave out
    quiet: bool = False  # others print on this terminal
    asked: Callable[[], list[int]] = list  # signals by which others have asked it to stop


def plan(recipe: Recipe, record: Record) -> str:
    """What running this recipe means now: ``new``, ``continue``, ``skip`` (done) or ``failed`` (not retried)."""
    if recipe.resume == Resume.never:
        return "new"
    state = record.status.get("state")
    if state is None:
        if record.checkpoints.exists() or record.result:
            raise RecordDamagedError(record.path / "status.json")
        return "new"
    if state == DONE and not shape.lost(record.status, record.result):
        return "skip"
    if state == FAILED and recipe.resume != Resume.retry and not record.status.get("user_error"):  # of before: refused
        return "failed"
    if record.last.exists() or record.previous.exists():
        return "continue"
    if state == DONE or record.status.get("step"):  # it has come further than nothing: what is left may be all there is
        raise RecordDamagedError(record.last)
    return "new"


def run(recipe: Recipe, command: list[str], place: Place = Place()) -> Outcome:
    """Run a recipe to its end.

    Raises:
        RecordBusyError: another process runs it.
    """
    record = Record.of(recipe)
    if recipe.trainer.nodes == 1:
        return _lead(recipe, record, command, place)
    meeting_place(recipe.trainer, os.environ)  # refused now rather than after waiting
    while True:  # the launcher that comes first has the run in hand
        if leader := record.leader:
            if outcome := _join(recipe, record, place, leader):
                return outcome
        else:
            with suppress(RecordBusyError):
                return _lead(recipe, record, command, place)
        time.sleep(TICK)


def _lead(recipe: Recipe, record: Record, command: list[str], place: Place) -> Outcome:
    with record.held() as lock:
        todo = plan(recipe, record)
        if todo in ("skip", "failed"):
            if todo == "skip":
                fingerprint.check_done(recipe, record)
            return Outcome(record, OK if todo == "skip" else RUN_FAILED, ran=False)
        anew = recipe.resume == Resume.never
        attempt = 1 + (0 if anew else record.status.get("attempts") or 0)
        before = {} if anew else record.read(PROVENANCE)
        if todo == "new":
            _clear(record, kept=() if anew else (PROVENANCE, fingerprint.FILE))
        write_whole(record.config, compose.save(recipe))
        record.write(PROVENANCE, provenance.begun(before, provenance.collect(command), attempt, now()))
        begun = {"state": RUNNING, "attempts": attempt, "error": None, "step": record.status.get("step")}
        record.write("status.json", begun | asdict(Holder.me()))
        written, kills = _size(record.log), memory_kills()
        returned, caught = _supervise(recipe, record, lock, place)
        exit_code = _settle(record, returned, caught, _why(record.log, written, returned, memory_kills() > kills))
        if exit_code == OK and not recipe.trainer.keep_checkpoints:
            shutil.rmtree(record.checkpoints, ignore_errors=True)
        return Outcome(record, exit_code, ran=True, told=caught)


def _join(recipe: Recipe, record: Record, place: Place, leader: Holder) -> Outcome | None:
    """Lend this machine to a run that a launcher on another one has in hand; None if another one took it over."""
    ended: list[float] = []

    def asked() -> list[int]:  # the run is over, and what is left here does not know it
        if record.leader == leader:
            ended.clear()
            return place.asked()
        ended.append(time.monotonic())
        waited = ended[-1] - ended[0]
        return (
            place.asked() if waited < SECONDS_TO_END else [signal.SIGTERM] * (1 if waited < 2 * SECONDS_TO_END else 3)
        )

    _, caught = _supervise(recipe, record, None, replace(place, asked=asked))
    while record.leader == leader:  # it waits for its own ranks, and says how it ended
        time.sleep(TICK)
    with suppress(RecordBusyError), record.held():
        if record.status.get("state") == RUNNING and Holder.of(record) == leader:  # it has not lived to say it
            record.update_status(state=PREEMPTED, error=f"{leader} is gone, which led the run")
    if Holder.of(record) != leader and not caught:
        return None
    return Outcome(record, _exit_code(record, caught), ran=True, told=caught)


def preflight(recipe: Recipe) -> tuple[int, str]:
    """The exit code, and what the recipe's optimizer will do to each tensor; nothing is written."""
    command = [sys.executable, "-m", "caspr_cli.runs.preflight"]
    done = subprocess.run(command, input=compose.save(recipe), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode < 0:
        return INTERRUPTED if done.returncode == -signal.SIGINT else TERMINATED, done.stdout
    return done.returncode, done.stdout


def _clear(record: Record, kept: Collection[str]) -> None:
    # What says "done" goes first: cut off in the middle, the rest is not taken for a record.
    for path in sorted(record.path.iterdir(), key=lambda path: path.name not in ("status.json", "result.json")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (*LOCKS, *kept):
            path.unlink()


def worker_command(recipe: Recipe, record: Record) -> list[str]:
    """One process, or N under torch's elastic launcher: on a free port of its own, or where the machines meet."""
    worker, trainer = ["-m", "caspr_cli.runs.worker", str(record.path.resolve())], recipe.trainer
    if trainer.devices * trainer.nodes == 1:
        return [sys.executable, *worker]
    elastic = ["-m", "torch.distributed.run", f"--nproc-per-node={trainer.devices}"]
    if trainer.nodes == 1:
        return [sys.executable, *elastic, "--standalone", *worker]
    where = [
        f"--nnodes={trainer.nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meeting_place(trainer, os.environ)}",
        f"--rdzv-id={compose.identity(recipe)}-{recipe.seed}",
        f"--rdzv-conf=join_timeout={math.ceil(trainer.timeout)}",
    ]
    return [sys.executable, *elastic, *where, *worker]


def _supervise(recipe: Recipe, record: Record, lock: int | None, place: Place) -> tuple[int, int | None]:
    """Start the worker and wait. Returns its exit status, and the signal that was passed on to it, if any.

    Args:
        lock: of the record; None where another machine holds it.
    """
    ranks = recipe.trainer.devices * recipe.trainer.nodes
    log_file = record.log if lock is not None else record.log.with_name(f"log.{socket.gethostname()}.txt")
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES and k not in place.environment}
    environment |= {k: v for k, v in place.environment.items() if v is not None} | {LAUNCHER: str(os.getpid())}
    if recipe.trainer.devices > 1:
        # Ranks share the cores; left alone, each would take them all.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // recipe.trainer.devices)))
    if ranks > 1:
        # That ranks have to finish a step and save, once torch's launcher was told to stop; its own 30 may be too few.
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(math.ceil(recipe.trainer.timeout)))
    written = _size(log_file)
    with log_file.open("ab") as log, _listening() as heard:

        def asked() -> list[int]:  # Ctrl-C may come to this process, by way of others, or both
            return max([heard, place.asked()], key=len)

        child = None
        try:
            # A cluster sends SIGUSR2 to every process of a job: it waits until the worker can answer it.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
            try:
                # A session of its own: Ctrl-C in the terminal reaches this process alone, which passes it on once.
                child = subprocess.Popen(
                    worker_command(recipe, record),
                    stdout=subprocess.DEVNULL if place.quiet else None,  # whatever it says is in the log, too
                    stderr=log,
                    env=environment,
                    pass_fds=[] if lock is None else [lock],
                    start_new_session=True,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            returned = _passing_on(child, asked, _overdue(record, min(recipe.trainer.timeout, SECONDS_TO_WAIT)))
        except BaseException:  # of a handler that is not ours: a cluster takes this process back
            if child is not None:
                child.terminate()
                returned = child.wait()
                if lock is not None:
                    _settle(record, returned, signal.SIGTERM, "")
            raise
    if ranks > 1 and returned > 0:
        with log_file.open("rb") as said:
            said.seek(written)
            report = said.read()
        returned = _first_cause(report, returned)
        if b"RendezvousTimeoutError" in report:
            nodes, where = recipe.trainer.nodes, meeting_place(recipe.trainer, os.environ)
            why = f"fewer than {nodes} machines came to {where} within {recipe.trainer.timeout:g} s (trainer.timeout)"
            record.update_status(state=PREEMPTED, error=why)
    return returned, next(iter(asked()), None)


def _first_cause(report: bytes, returned: int) -> int:
    """The exit status that says why several ranks ended. Torch's launcher ends with 1 and reports theirs in the log."""
    ends = [int(end) for end in re.findall(rb"exitcode +: (-?\d+) ", report)]
    if -signal.SIGKILL in ends or -signal.SIGTERM in ends:
        return -signal.SIGKILL  # the others ended as they lost it
    if b"Watchdog caught collective operation timeout" in report:  # how NCCL ends a rank that waits for another
        return CUT_OFF
    return next((end for end in ends if end != CUT_OFF), CUT_OFF if ends else returned)


STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECONDS_TO_EXIT = 5.0  # that a rank has when the run is over and its launcher gone
TICK = 0.2  # seconds between two looks at what was asked
SECONDS_TO_END = 30.0  # that other machines have when a run is over


@contextmanager
def _listening() -> Iterator[list[int]]:
    """Collect the signals of STOP, even where they are blocked. None are in a thread that may not set handlers."""
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    before = {s: signal.signal(s, lambda number, _: heard.append(number)) for s in STOP}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
    try:
        yield heard
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)  # None: not set from Python


def _passing_on(child: subprocess.Popen[Any], asked: Callable[[], list[int]], overdue: Callable[[], bool]) -> int:
    """Wait for the child; each time it is asked to stop, tell it: it saves and ends. The third time kills it."""
    told = 0
    while True:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=TICK)
        times = len(asked())
        if times >= 3 or overdue():
            os.killpg(child.pid, signal.SIGKILL)
        elif times > told:
            child.terminate()
        told = times


def _overdue(record: Record, seconds: float) -> Callable[[], bool]:
    """Whether the first rank has said how the run ended so long ago that whoever is still there hangs."""
    said: list[float] = []

    def overdue() -> bool:
        with suppress(OSError, RecordDamagedError):
            if not said and record.status.get("state") != RUNNING:
                said.append(time.monotonic())
        return bool(said) and time.monotonic() - said[0] > seconds

    return overdue


# A worker that ends by one of these is at fault itself; by another signal, someone ended it.
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
TAIL = 1 << 16  # bytes of a log


def _why(log: Path, written: int, returned: int, out_of_memory: bool) -> str:
    """Why a worker ended that could not say it.

    Args:
        written: how long the log was when it started.
        out_of_memory: whether the system has ended some process since, as memory ran out.
    """
    how = signal.Signals(-returned).name if returned < 0 else f"exit status {returned}"
    if returned == -signal.SIGKILL and out_of_memory:
        return f"too little memory: the system ended a worker with {how}; a smaller task.batch_size needs less"
    if returned == -signal.SIGBUS:
        return f"a worker ended with {how}: a full disk, or a file that was cut short while it was read; see {log}"
    if said := MEMORY.search(_tail(log, written)):
        return f"too little memory: {said[0]}; see {log}"
    return f"a worker ended with {how}; see {log}"


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _tail(file: Path, since: int) -> str:
    """What was written to a log since it had this size, its last part."""
    try:
        with file.open("rb") as log:
            log.seek(max(since, _size(file) - TAIL))
            return log.read().decode(errors="replace")
    except OSError:
        return ""


def _settle(record: Record, returned: int, caught: int | None, why: str) -> int:
    """The exit code; ``status.json`` gets an end where the worker could not write one itself: ``why`` it ended."""
    _wait_for_ranks(record, patience=0 if caught and returned == -signal.SIGKILL else SECONDS_TO_WAIT)
    status = record.status  # after them: they may have written it
    state = status.get("state")
    killed = returned < 0 and -returned not in CRASHES
    # It was killed, or told to stop before its first step; or it failed as another rank was killed.
    if state == RUNNING or (state == FAILED and killed):
        state = PREEMPTED if killed or caught or returned == CUT_OFF else FAILED
        try:
            record.update_status(state=state, error=None if caught else why)
        except OSError as full:  # a disk without room for a line: the state on it stays "running", which is continued
            complain(f"{record.path}: {full}; the same command continues")
            return TERMINATED
    return _exit_code(record, caught)


def _exit_code(record: Record, caught: int | None) -> int:
    status = record.status
    if status.get("state") == DONE:
        return OK
    if status.get("state") == REFUSED:
        return BAD_USAGE
    if status.get("state") == FAILED:
        return RUN_FAILED
    return INTERRUPTED if caught == signal.SIGINT else TERMINATED


def _wait_for_ranks(record: Record, patience: float) -> None:
    """Nothing is left of a run. Ranks whose launcher (torch's) is gone see it after their step, save and end."""
    deadline, overdue = time.monotonic() + patience, _overdue(record, SECONDS_TO_EXIT)
    while left := workers(record.path, os.getpid()):
        if time.monotonic() > deadline or overdue():
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
