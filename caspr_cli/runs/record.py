"""The record of a run: one directory, complete and readable without this program.

``config.yaml`` the frozen recipe, ``status.json``, ``provenance.json``, ``metrics.jsonl``, TensorBoard's event files,
``log.txt``, ``checkpoints/``, ``result.json``. Files are replaced whole, never half-written. No torch here.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from caspr_cli.recipe.compose import identity
from caspr_cli.recipe.schema import Recipe

RUNNING, DONE, FAILED, PREEMPTED = "running", "done", "failed", "preempted"
# Environment variable that tells a worker who launched it.
LAUNCHER = "CASPR_LAUNCHER"


class RecordDamagedError(Exception):
    """A file of a record cannot be read."""

    def __init__(self, file: Path) -> None:
        super().__init__(f"{file} is missing or damaged; resume=never starts this run anew")


class RecordBusyError(Exception):
    """Another process writes to this record."""


class Record:
    """Names and files of one record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.log = path / "log.txt"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"

    @classmethod
    def of(cls, recipe: Recipe) -> Record:
        """``<output_dir>/<task>/<optim>/<identity>/seed<k>``: the same recipe has the same record."""
        where = Path(recipe.output_dir) / recipe.task.name / recipe.optim.name / identity(recipe)
        return cls(where / f"seed{recipe.seed}")

    @property
    def status(self) -> dict[str, Any]:
        """The content of ``status.json``; empty for a record that was never started."""
        return self.read("status.json")

    @property
    def result(self) -> dict[str, Any]:
        return self.read("result.json")

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the record; empty if there is none.

        Raises:
            RecordDamagedError: it does not hold an object.
        """
        try:
            content = json.loads((self.path / name).read_text(encoding="utf8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise RecordDamagedError(self.path / name) from error
        if not isinstance(content, dict):
            raise RecordDamagedError(self.path / name)
        return content

    def write(self, name: str, content: dict[str, Any]) -> None:
        write_whole(self.path / name, json.dumps(finite(content), indent=2, allow_nan=False) + "\n")

    def update_status(self, **changes: Any) -> None:
        """Merge ``changes`` into ``status.json``."""
        self.write("status.json", self.status | changes | {"updated": now()})

    @contextmanager
    def held(self) -> Iterator[int]:
        """Hold the record's lock; a child that inherits the descriptor holds it on.

        Raises:
            RecordBusyError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self.status
                who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
                raise RecordBusyError(f"{self.path} is being written by {who}, or by a worker it left") from None
            yield descriptor
        finally:
            os.close(descriptor)


def write_whole(path: Path, content: str) -> None:
    """Write a text file whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def finite(content: Any) -> Any:
    """JSON has no NaN and no infinity: they become null, as deep as they lie."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
