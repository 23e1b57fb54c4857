"""Turn one recipe into one record: start a process for each device, wait for them, and write how the run ended.

Each run has a fresh process group, so that a sweep may change ``trainer.devices``: no environment variable, process
group or random state of an earlier job reaches the next one.
"""

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
from caspr_cli.common.exits import BAD_USAGE, INTERRUPTED, OK, RUN_FAILED, TERMINATED
from caspr_cli.common.files import write_whole
from caspr_cli.common.streams import complain, say
from caspr_cli.recipe import compose
from caspr_cli.recipe.schema import Recipe, Resume
from caspr_cli.runs import fingerprint, provenance
from caspr_cli.runs.here import refuse_here
from caspr_cli.runs.nodes import meeting_place
from caspr_cli.runs.processes import DEVICE, LAUNCHER, MEMORY, cores, memory_kills, workers
from caspr_cli.runs.record import (
    CUT_OFF,
    DONE,
    FAILED,
    LOCKS,
    PREEMPTED,
    PROVENANCE,
    REFUSED,
    RUNNING,
    SECONDS_TO_WAIT,
    TRACKERS,
    Holder,
    Record,
    RecordBusyError,
    RecordDamagedError,
    now,
)  # fmt: skip

BRIEF = "CASPR_BRIEF"  # names a job to its worker, which then shows one live line
# A launcher of ours or another's sets these for its children; a new process group must not see them.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A worker that ends by one of these is at fault itself; by another signal, someone ended it.
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
SECONDS_TO_EXIT = 5.0  # that a rank has when the run is over and its launcher gone
SECONDS_TO_END = 30.0  # that other machines have when a run is over
TICK = 0.2  # seconds between two looks at the child and at the requests to stop
TAIL = 1 << 16  # bytes of a log in which a message is looked for


@dataclass(frozen=True)
class Outcome:
    record: Record
    exit_code: int
    ran: bool  # False: it was done before, or had failed and was not to be retried
    signal: int | None = None  # that asked it to stop


@dataclass(frozen=True)
class Allocation:
    """The share of the machine that a sweep gives to one of its runs; a run on its own needs none."""

    environment: Mapping[str, str | None] = field(default_factory=dict)  # variables to set, or (None) to leave out
    quiet: bool = False  # others print on this terminal
    brief: str = ""  # which of many jobs it is: then it has one live line on a terminal, and nothing elsewhere
    stop_requests: Callable[[], list[int]] = list  # the signals by which others have asked it to stop


def plan(recipe: Recipe, record: Record) -> str:
    """Return what running this recipe means now: ``new``, ``continue``, ``skip`` (done) or ``failed`` (not retried)."""
    if recipe.resume == Resume.never:
        return "new"
    status = record.status
    state = status.get("state")
    if state is None:
        if record.checkpoints.exists() or record.result:
            raise RecordDamagedError(record.path / "status.json")
        return "new"
    if state == DONE and not _is_lost(record):
        return "skip"
    if state == FAILED and recipe.resume != Resume.retry and not status.get("user_error"):  # older records: refused
        return "failed"
    if record.last.exists() or record.previous.exists():
        return "continue"
    if state == DONE or status.get("step"):  # it has come further than nothing: what is left may be all there is
        raise RecordDamagedError(record.last)
    return "new"


def _is_lost(record: Record) -> bool:
    """Whether the result of a run that is done is not there, and can be made again from a checkpoint if damaged."""
    try:
        return shape.lost(record.status, record.result)
    except RecordDamagedError:
        if record.last.exists() or record.previous.exists():
            return True
        raise


def run(recipe: Recipe, command: list[str], allocation: Allocation = Allocation()) -> Outcome:
    """Run a recipe to its end. Raises RecordBusyError if another process runs it."""
    record = Record.of(recipe)
    if recipe.trainer.nodes == 1:
        return _lead(recipe, record, command, allocation)
    meeting_place(recipe.trainer, os.environ)  # refused now rather than after waiting
    while True:  # the launcher that comes first leads the run
        if leader := record.leader:
            if outcome := _join(recipe, record, allocation, leader):
                return outcome
        else:
            with suppress(RecordBusyError):
                return _lead(recipe, record, command, allocation)
        time.sleep(TICK)


def _lead(recipe: Recipe, record: Record, command: list[str], allocation: Allocation) -> Outcome:
    """Run a recipe whose record this process holds."""
    with record.held() as lock:
        todo = plan(recipe, record)
        if todo in ("skip", "failed"):
            if todo == "skip":
                fingerprint.check_done(recipe, record)
                if record.config_is_lost:  # without it reports leave the record out
                    write_whole(record.config, compose.save(recipe))
            return Outcome(record, OK if todo == "skip" else RUN_FAILED, ran=False)
        refuse_here(recipe)
        anew = recipe.resume == Resume.never
        attempt = 1 + (0 if anew else record.status.get("attempts") or 0)
        before = {} if anew else record.read(PROVENANCE)
        if todo == "new":
            _clear(record, kept=() if anew else (PROVENANCE, TRACKERS, fingerprint.FILE))
        write_whole(record.config, compose.save(recipe))
        record.write(PROVENANCE, provenance.begun(before, provenance.collect(command, recipe), attempt, now()))
        begun = {"state": RUNNING, "attempts": attempt, "error": None, "step": record.status.get("step")}
        record.write("status.json", begun | asdict(Holder.me()))
        written, kills = _size(record.log), memory_kills()
        returned, stopped_by = _supervise(recipe, record, lock, allocation)
        why = _why(record.log, written, returned, memory_kills() > kills)
        exit_code = _settle(record, returned, stopped_by, why)
        if exit_code == OK and not recipe.trainer.keep_checkpoints:
            shutil.rmtree(record.checkpoints, ignore_errors=True)
        return Outcome(record, exit_code, ran=True, signal=stopped_by)


def _join(recipe: Recipe, record: Record, allocation: Allocation, leader: Holder) -> Outcome | None:
    """Lend this machine to a run that a launcher on another machine leads; None if another launcher took it over."""
    over: list[float] = []

    def stop_requests() -> list[int]:  # where the run is over, and the ranks of this machine do not know it
        if record.leader == leader:
            over.clear()
            return allocation.stop_requests()
        over.append(time.monotonic())
        waited = over[-1] - over[0]
        if waited < SECONDS_TO_END:
            return allocation.stop_requests()
        return [signal.SIGTERM] * (1 if waited < 2 * SECONDS_TO_END else 3)

    _, stopped_by = _supervise(recipe, record, None, replace(allocation, stop_requests=stop_requests))
    while record.leader == leader:  # it waits for its own ranks, and says how the run ended
        time.sleep(TICK)
    with suppress(RecordBusyError), record.held():
        # The leader died before it could write how the run ended.
        if record.status.get("state") == RUNNING and Holder.of(record) == leader:
            record.update_status(state=PREEMPTED, error=f"{leader} is gone, which led the run")
    if Holder.of(record) != leader and not stopped_by:
        return None
    return Outcome(record, _exit_code(record, stopped_by), ran=True, signal=stopped_by)


def preflight(recipe: Recipe) -> tuple[int, str]:
    """Return the exit code and the table of ``debug=plan``; nothing is written."""
    command = [sys.executable, "-m", "caspr_cli.training.describe", "plan"]
    done = subprocess.run(command, input=compose.save(recipe), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode < 0:
        return INTERRUPTED if done.returncode == -signal.SIGINT else TERMINATED, done.stdout
    return done.returncode, done.stdout


def _clear(record: Record, kept: Collection[str]) -> None:
    # The files that say "done" go first: if this is cut off in the middle, the rest is not taken for a record.
    for path in sorted(record.path.iterdir(), key=lambda path: path.name not in ("status.json", "result.json")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (*LOCKS, *kept):
            path.unlink()


def worker_command(recipe: Recipe, record: Record) -> list[str]:
    """Return the command of one process, or of torch's launcher for several: on a free port, or where machines meet."""
    worker, trainer = ["-m", "caspr_cli.training.worker", str(record.path.resolve())], recipe.trainer
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


def worker_environment(recipe: Recipe, allocation: Allocation) -> dict[str, str]:
    """Return the environment variables of the process that :func:`worker_command` starts."""
    trainer, given = recipe.trainer, {BRIEF: allocation.brief or None, **allocation.environment}
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES and k not in given}
    environment |= {k: v for k, v in given.items() if v is not None} | {LAUNCHER: str(os.getpid())}
    if trainer.devices > 1:  # ranks share the cores; by default each would take all
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // trainer.devices)))
    if trainer.devices * trainer.nodes > 1:
        # After a signal torch's launcher gives its ranks this time to finish a step and save; 30 s may be too few.
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(math.ceil(trainer.timeout)))
    return environment


def _supervise(recipe: Recipe, record: Record, lock: int | None, allocation: Allocation) -> tuple[int, int | None]:
    """Start the worker and wait; return its exit status, and the signal that was passed on to it, if any.

    ``lock``: the record's; None where another machine holds it.
    """
    trainer = recipe.trainer
    silent = allocation.quiet or (allocation.brief and not sys.stdout.isatty())
    log_file = record.log if lock is not None else record.log.with_name(f"log.{socket.gethostname()}.txt")
    written = _size(log_file)
    with log_file.open("ab") as log, _signals() as received:

        def stop_requests() -> list[int]:  # Ctrl-C may come to this process, by way of others, or both
            return max([received, allocation.stop_requests()], key=len)

        child = None
        try:
            # A cluster sends SIGUSR2 to every process of a job: it stays blocked until the worker can answer it.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
            try:
                # In its own session: Ctrl-C in the terminal reaches this process alone, which passes it on once.
                child = subprocess.Popen(
                    worker_command(recipe, record),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL if silent else None,  # the log has all of it, too
                    stderr=log,
                    env=worker_environment(recipe, allocation),
                    pass_fds=[] if lock is None else [lock],
                    start_new_session=True,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            overdue = _overdue(record, min(trainer.timeout, SECONDS_TO_WAIT))
            returned = _wait(child, stop_requests, overdue, quiet=allocation.quiet)
        except BaseException:  # raised in a signal handler of a launcher: a cluster takes this process back
            if child is not None:
                child.terminate()
                returned = child.wait()
                if lock is not None:
                    _settle(record, returned, signal.SIGTERM, "")
            raise
    if trainer.devices * trainer.nodes > 1 and returned > 0:
        with log_file.open("rb") as log_read:
            log_read.seek(written)
            report = log_read.read()
        returned = _first_cause(report, returned)
        if b"RendezvousTimeoutError" in report:
            where = meeting_place(trainer, os.environ)
            why = f"fewer than {trainer.nodes} machines came to {where} within {trainer.timeout:g} s (trainer.timeout)"
            record.update_status(state=PREEMPTED, error=why)
    return returned, next(iter(stop_requests()), None)


def _first_cause(report: bytes, returned: int) -> int:
    """Return the exit status that says why several ranks ended: torch's launcher returns 1, and logs those of all."""
    ends = [int(end) for end in re.findall(rb"exitcode +: (-?\d+) ", report)]
    if -signal.SIGKILL in ends or -signal.SIGTERM in ends:
        return -signal.SIGKILL  # the others ended as they lost it
    # NCCL ends a rank that waits for another, or whose GPU is broken.
    if b"Watchdog caught collective operation timeout" in report or DEVICE.search(report.decode(errors="replace")):
        return CUT_OFF
    return next((end for end in ends if end != CUT_OFF), CUT_OFF if ends else returned)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals of ``STOP``, even where they are blocked; none in a thread that may not set handlers."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {s: signal.signal(s, lambda number, _: received.append(number)) for s in STOP}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
    try:
        yield received
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)  # None: not set from Python


def _wait(
    child: subprocess.Popen[Any], stop_requests: Callable[[], list[int]], overdue: Callable[[], bool], *, quiet: bool
) -> int:
    """Wait for the child, and pass each request to stop on: it saves and ends. The third request kills it."""
    passed_on = 0
    while True:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=TICK)
        requests = len(stop_requests())
        if requests >= 3 or overdue():
            os.killpg(child.pid, signal.SIGKILL)
        elif requests > passed_on:
            if not (passed_on or quiet):
                say("stop     saves and ends; Ctrl-C twice more ends it at once")
            child.terminate()
        passed_on = requests


def _overdue(record: Record, seconds: float) -> Callable[[], bool]:
    """Return a check for processes that hang: whether the run's end has stood in the record for so many seconds."""
    ended: list[float] = []

    def overdue() -> bool:
        with suppress(OSError, RecordDamagedError):
            if not ended and record.status.get("state") != RUNNING:
                ended.append(time.monotonic())
        return bool(ended) and time.monotonic() - ended[0] > seconds

    return overdue


def _why(log: Path, written: int, returned: int, out_of_memory: bool) -> str:
    """Return why a worker ended that died before it could report an error; its log begins after ``written`` bytes.

    ``out_of_memory``: the system has ended some process since it started because memory ran out.
    """
    how = signal.Signals(-returned).name if returned < 0 else f"exit status {returned}"
    if returned == -signal.SIGKILL and out_of_memory:
        return f"too little memory: the system ended a worker with {how}; a smaller task.batch_size needs less"
    if returned == -signal.SIGBUS:
        return f"a worker ended with {how}: a full disk, or a file that was cut short while it was read; see {log}"
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(written, _size(log) - TAIL))
        said = file.read().decode(errors="replace")
        for what, words in (("too little memory", MEMORY), ("a GPU is broken or gone", DEVICE)):
            if found := words.search(said):
                return f"{what}: {found[0]}; see {log}"
    return f"a worker ended with {how}; see {log}"


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _settle(record: Record, returned: int, stopped_by: int | None, why: str) -> int:
    """Return the exit code; write the end into ``status.json`` if the worker could not, with ``why`` it ended."""
    _wait_for_ranks(record, patience=0 if stopped_by and returned == -signal.SIGKILL else SECONDS_TO_WAIT)
    state = record.status.get("state")  # after they have ended: they may have written it
    killed = returned < 0 and -returned not in CRASHES
    # It was killed, or stopped before its first step; or it failed because another rank was killed.
    if state == RUNNING or (state == FAILED and killed):
        state = PREEMPTED if killed or stopped_by or returned == CUT_OFF else FAILED
        try:
            record.update_status(state=state, error=None if stopped_by else why)
        except OSError as full:  # no room for a line: the state on the disk stays "running", which is continued
            complain(f"{record.path}: {full}; the same command continues")
            return TERMINATED
    return _exit_code(record, stopped_by)


def _exit_code(record: Record, stopped_by: int | None) -> int:
    codes: dict[Any, int] = {DONE: OK, REFUSED: BAD_USAGE, FAILED: RUN_FAILED}
    return codes.get(record.status.get("state"), INTERRUPTED if stopped_by == signal.SIGINT else TERMINATED)


def _wait_for_ranks(record: Record, patience: float) -> None:
    """Wait until no rank is left. Ranks whose launcher (torch's) is gone notice it after a step, save and end."""
    deadline, overdue = time.monotonic() + patience, _overdue(record, SECONDS_TO_EXIT)
    while left := workers(record.path, os.getpid()):
        if time.monotonic() > deadline or overdue():
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
