"""Checkpoints on disk: written whole, checked before they are used."""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from caspr_cli.common import shape
from caspr_cli.common.files import disk_error
from caspr_cli.recipe.compose import identity
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs.record import PLACE, Record, RecordDamagedError

log = logging.getLogger("caspr.checkpoints")


OWNER = "caspr"  # in a checkpoint: whose it is
NUMBER = (int, float)
# What the curves read of a checkpoint.
CURVES: dict[str, tuple[type, ...]] = {
    "seconds": NUMBER, "losses": (torch.Tensor,), "units": (int,), "mark": (tuple, list), "best": (dict,),
    "target": (dict,), "final": (dict,), "phases": (dict,), "state_bytes": (int,), "lines": (int,),
}  # fmt: skip


@dataclass(frozen=True)
class Owner:
    """The run that a checkpoint belongs to."""

    recipe: str  # its identity, as in the path of the record
    seed: int
    data: str | None  # hash of the content of its data; None in a checkpoint that does not say

    @classmethod
    def of(cls, recipe: Recipe, data: Mapping[str, Any]) -> Owner:
        return cls(identity(recipe), recipe.seed, data.get("hash"))

    def __str__(self) -> str:
        return f"recipe {self.recipe} seed {self.seed} on data {self.data or 'unknown'}"


class AnotherRunError(ConfigError):
    """A checkpoint of another run lies in this record."""


@dataclass(frozen=True)
class Start:
    """Where a run continues: a checkpoint, its step, and the number of lines of ``metrics.jsonl`` before it."""

    checkpoint: Path | None = None
    step: int = 0
    lines: int = 0


def find(record: Record, owner: Owner, steps: int) -> Start:
    """Return the last checkpoint that is whole and whose curves are there; the same on all ranks, as none writes yet.

    Raises RecordDamagedError if there are checkpoints, but none can be used, and AnotherRunError if one is of another
    run, not ``owner``. (One that was written before checkpoints said so is taken.) The whole run has so many ``steps``.
    """
    files = [path for path in (record.last, record.previous) if path.exists()]
    whole, damaged = _whole_lines(record.metrics), record.last
    for path in files:
        try:
            step, lines = _read(path, owner, steps)
        except AnotherRunError:
            raise
        except shape.DamagedError as reason:
            log.warning(f"warning  {path} is damaged: {reason}")
            continue
        if lines <= whole:
            return Start(path, step, lines)
        damaged = record.metrics
        log.warning(f"warning  {record.metrics} has {whole} whole lines, {path.name} needs {lines}")
    if files:
        raise RecordDamagedError(damaged)
    return Start()


def _read(path: Path, owner: Owner, steps: int) -> tuple[int, int]:
    """Return the steps of a checkpoint and its lines of metrics.

    Raises DamagedError if it is damaged (every bit that is read later is checked), and AnotherRunError if it is of
    another run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # by the checksum of each member, that torch writes and does not check
                raise shape.DamagedError(f"{damaged} does not match its checksum")
            if any(member.external_attr for member in archive.infolist()):
                raise shape.DamagedError("a member is marked as a directory")  # one bit, and torch would not read it
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except shape.DamagedError:
        raise
    except Exception as error:  # whatever zipfile and torch make of a file that is no checkpoint of ours
        if disk := disk_error(error, PLACE):
            raise disk from error
        raise shape.DamagedError("it is cut off, or no checkpoint") from error
    return _checked(path, checkpoint, owner, steps)


def _checked(path: Path, checkpoint: Any, owner: Owner, steps: int) -> tuple[int, int]:
    """Return the steps and lines of a loaded checkpoint, after a check of all that will be read of it."""
    said = shape.inner(checkpoint, OWNER)
    if said is not None:
        other = Owner(*(shape.inner(checkpoint, OWNER, key) for key in ("recipe", "seed", "data")))
        if other != owner:
            raise AnotherRunError(f"{path} is of another run ({other}; this one is {owner}): take it away")
    step = shape.inner(checkpoint, "global_step")
    if type(step) is not int or not 1 <= step <= steps:
        raise shape.DamagedError(f"global_step is {_short(step)}, and should be a whole number from 1 to {steps}")
    progress = ("loops", "fit_loop", "epoch_loop.automatic_optimization.optim_progress")
    counted = shape.inner(checkpoint, *progress, "optimizer", "step", "total", "completed")
    for name, other_step in ((OWNER, shape.inner(checkpoint, OWNER, "step")), ("loops", counted)):
        if other_step != step and not (other_step is None and name == OWNER):
            raise shape.DamagedError(f"{name} counts {_short(other_step)} steps, and global_step is {step}")
    for name, kinds in CURVES.items():
        if type(value := shape.inner(checkpoint, "callbacks", "Curves", name)) not in kinds:
            raise shape.DamagedError(f"callbacks.Curves.{name} is {_short(value)}, of another type than it should be")
    for name, kind in (("state_dict", dict), ("optimizer_states", list), ("lr_schedulers", list)):
        if not isinstance(value := shape.inner(checkpoint, name), kind):
            raise shape.DamagedError(f"{name} is {_short(value)}, of another type than it should be")
    lines: int = checkpoint["callbacks"]["Curves"]["lines"]
    if lines < 0:
        raise shape.DamagedError(f"callbacks.Curves.lines is {lines}")
    return step, lines


def _short(value: Any) -> str:
    text = "missing" if value is None else " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:40]}..."


def _whole_lines(metrics: Path) -> int:
    """Return the number of lines before the first that is torn or damaged."""
    try:
        lines = metrics.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    for count, line in enumerate(lines):
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return count
    return len(lines)


class WholeFile(TorchCheckpointIO):
    """Writes checkpoints directly to the disk; Lightning's own goes through memory and ``/tmp``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            with open(path, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except OSError:  # a full disk needs the room that half a checkpoint takes
            Path(path).unlink(missing_ok=True)
            raise


def put_in_place(written: Path, record: Record, *, best: bool, keep: bool) -> None:
    """Make a written file the last checkpoint, and the one before it (with ``keep``) the previous one.

    At every moment there is a whole one under one of the names.
    """
    if best:
        link(written, record.best)
    if keep and record.last.exists():
        link(record.last, record.previous)
    os.replace(written, record.last)
    directory = os.open(record.checkpoints, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def link(source: Path, target: Path) -> None:
    """Give a file a second name, atomically."""
    temporary = target.with_name(f".{target.name}")
    temporary.unlink(missing_ok=True)
    os.link(source, temporary)
    os.replace(temporary, target)
