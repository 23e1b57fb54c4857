"""The record of a run: one directory, complete and readable without this program.

``config.yaml`` the frozen recipe, ``status.json``, ``provenance.json``, ``metrics.jsonl``, TensorBoard's event files,
``log.txt``, ``checkpoints/``, ``result.json``; where the data are the user's own files, also ``data_files.json``. Files
are replaced whole, never half-written. No torch here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from caspr_cli.common import shape, streams
from caspr_cli.common.alive import birth, lives
from caspr_cli.common.files import DISK, write_whole
from caspr_cli.common.format import finite
from caspr_cli.recipe.compose import identity, readable
from caspr_cli.recipe.schema import Recipe

RUNNING, DONE, FAILED, PREEMPTED = "running", shape.DONE, shape.FAILED, "preempted"
REFUSED = "refused"  # because of its configuration or data, which the user may mend: it is tried again
PROVENANCE = "provenance.json"
TRACKERS = "trackers.json"  # the ids of this run at Weights & Biases and MLflow: a resume goes on with it there
# The first is held by the launcher, the second by each rank: torch's launcher does not pass the first on to ranks.
LOCKS = (".lock", ".ranks.lock")
# Temporary files that a kill can leave.
TEMPORARY = (".*.json.????????", ".*.jsonl.????????", ".*.yaml.????????", "checkpoints/.*.ckpt", ".waited.*")
CUT_OFF = 75  # exit status of a worker that can go on where it stopped
SECONDS_TO_WAIT = 60  # for the worker of a launcher that was killed: it saves after its step
# Errors of the directory that a run is written to, not of the run: it continues when they are gone.
PLACE = DISK | {errno.EROFS, errno.EACCES, errno.EPERM}
FULL = {errno.ENOSPC, errno.EDQUOT}


class RecordDamagedError(Exception):
    """A file of a record cannot be read."""

    def __init__(self, file: Path, why: str = "") -> None:
        self.file = file
        reason = f" ({why})" if why else ""
        super().__init__(f"{file} is missing or damaged; resume=never starts this run anew{reason}")


class RecordBusyError(Exception):
    """Another process writes to this record."""


class Record:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.log = path / "log.txt"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.previous = self.checkpoints / "previous.ckpt"  # if the last one is damaged
        self.best = self.checkpoints / "best.ckpt"

    @classmethod
    def of(cls, recipe: Recipe) -> Record:
        """Return a recipe's record, ``<output_dir>/<task>/<optim>/<name>/seed<k>``: equal recipes share it.

        The folder has a readable name, which ends with the identity. One with another beginning is the same: an older
        version, with other defaults, made it.
        """
        where = Path(recipe.output_dir) / recipe.task.name / recipe.optim.name
        name = where / readable(recipe)
        older = [] if os.path.exists(name) else sorted(where.glob(f"*{identity(recipe)}"))
        return cls((older[0] if older else name) / f"seed{recipe.seed}")

    @property
    def config_is_lost(self) -> bool:
        """Whether ``config.yaml`` is missing or damaged, so that a report leaves the record out."""
        try:
            shape.config(self.config.read_bytes())
        except (OSError, shape.DamagedError):
            return True
        return False

    @property
    def status(self) -> dict[str, Any]:
        """The content of ``status.json``; empty for a record that was never started."""
        return self.read("status.json")

    @property
    def result(self) -> dict[str, Any]:
        return self.read("result.json")

    def read(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the record; empty if there is none. Raises RecordDamagedError if it cannot be used."""
        file = self.path / name
        try:
            content: dict[str, Any] = shape.parsed(file.read_bytes())
            found = shape.part(file.stem, content)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except shape.DamagedError as reason:
            raise RecordDamagedError(file, str(reason)) from reason
        return content if name == PROVENANCE else found  # the text of a diff stays as it is

    def write(self, name: str, content: dict[str, Any]) -> None:
        write_whole(self.path / name, json.dumps(finite(content, infinities=False), indent=2, allow_nan=False) + "\n")

    def update_status(self, **changes: Any) -> None:
        self.write("status.json", self.status | changes | {"updated": now()})

    @contextmanager
    def held(self, say: Callable[[str], None] = streams.say) -> Iterator[int]:
        """Hold the record's lock; a child that inherits the descriptor goes on holding it.

        ``say`` gets a line if the process that held it is dead, and its workers are waited for. Raises RecordBusyError
        if another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor, ranks = (os.open(self.path / name, os.O_RDWR | os.O_CREAT, 0o644) for name in LOCKS)
        try:
            deadline = 0.0
            while not ((claimed := _claimed(descriptor)) and _locked(ranks)):
                # A worker that has the ranks' lock alone was left by the process that status.json names.
                holder = Holder.of(self) if claimed else Holder.of_lock(descriptor, self)
                if holder.lives:
                    raise RecordBusyError(f"{self.path} is being written by {holder}")
                if not deadline:
                    deadline = time.monotonic() + SECONDS_TO_WAIT
                    say(f"wait     {holder} has ended; waiting for its worker to save")
                if time.monotonic() > deadline:
                    raise RecordBusyError(f"{self.path} is being written by a worker that {holder} left")
                time.sleep(0.1)
            fcntl.flock(ranks, fcntl.LOCK_UN)  # for the ranks to come: the other one keeps everybody else out
            for pattern in TEMPORARY:
                for path in self.path.glob(pattern):
                    path.unlink(missing_ok=True)
            yield descriptor
        finally:
            os.close(descriptor)
            os.close(ranks)

    @property
    def leader(self) -> Holder | None:
        """The process that runs the record, on any machine: it holds the lock and ``status.json`` names it."""
        try:
            descriptor = os.open(self.path / LOCKS[0], os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            if _locked(descriptor, fcntl.LOCK_SH):
                return None
            mark = os.pread(descriptor, 4096, 0)
        finally:
            os.close(descriptor)
        holder = Holder.of(self)
        return holder if self.status.get("state") == RUNNING and mark == holder.mark else None

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Hold the record as one of its ranks, beside the others, for as long as this process writes to it."""
        descriptor = os.open(self.path / LOCKS[1], os.O_RDONLY | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Holder:
    """The process that runs a record; a field is None if ``status.json`` does not have it."""

    host: str | None
    pid: int | None
    born: int | None  # see alive.birth()
    started: str | None

    @classmethod
    def me(cls) -> Holder:
        return cls(socket.gethostname(), os.getpid(), birth(os.getpid()), now())

    @classmethod
    def of(cls, record: Record) -> Holder:
        try:
            status = record.status
        except RecordDamagedError:
            status = {}
        return cls(*(status.get(f.name) for f in fields(cls)))

    @classmethod
    def of_lock(cls, lock: int, record: Record) -> Holder:
        """Return who holds the lock: as ``status.json`` says, or as the lock says if that is not written yet."""
        holder = cls.of(record)
        for _ in range(20):  # who gets the lock writes into it at once
            if holder.pid is not None and holder.lives:
                break
            if named := cls.of_mark(os.pread(lock, 4096, 0)):
                return named
            time.sleep(0.05)
        return holder

    @classmethod
    def of_mark(cls, mark: bytes) -> Holder | None:
        """Return the process that wrote a mark; None if it is damaged or empty."""
        with suppress(ValueError, TypeError):
            host, pid, born = json.loads(mark)
            return cls(host, int(pid), born, None)
        return None

    @property
    def mark(self) -> bytes:
        """The bytes that it writes into the lock."""
        return json.dumps([self.host, self.pid, self.born]).encode()

    @property
    def lives(self) -> bool:
        """Whether the process runs; True if that cannot be known: on another host, or without a number."""
        return self.host != socket.gethostname() or self.pid is None or lives(self.pid, self.born)

    def __str__(self) -> str:
        since = f" (since {self.started})" if self.started else ""
        return f"process {self.pid or '?'} on {self.host or '?'}{since}"


def _claimed(descriptor: int) -> bool:
    """Return whether this process has got the lock; if so, write its name into it."""
    if not _locked(descriptor):
        return False
    with suppress(OSError):  # a full disk: then nobody joins
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, Holder.me().mark, 0)
    return True


def _locked(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


OWNER = ".owner"  # in a folder that is removed at the end of a command: the process that made it


def own(folder: Path) -> None:
    """Mark a folder as made by this process."""
    (folder / OWNER).write_bytes(Holder.me().mark)


def clear_left(above: Path, pattern: str) -> None:
    """Remove the folders that a killed process left."""
    for file in above.glob(f"{pattern}/{OWNER}"):
        with suppress(OSError):
            if (owner := Holder.of_mark(file.read_bytes())) and not owner.lives:
                shutil.rmtree(file.parent)


def now() -> str:
    """Return the time in UTC, ISO 8601 to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
