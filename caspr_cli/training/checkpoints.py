"""Checkpoints on disk: written whole, checked before they are used."""

from __future__ import annotations

import json
import logging
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from caspr_cli.runs.record import Record, RecordDamagedError

log = logging.getLogger("caspr.checkpoints")


@dataclass(frozen=True)
class Start:
    """Where a run goes on: a checkpoint, its step, and the lines of ``metrics.jsonl`` it stands for."""

    checkpoint: Path | None = None
    step: int = 0
    lines: int = 0


def find(record: Record) -> Start:
    """The last checkpoint that is whole and whose curves are there. All ranks come to the same: nobody writes yet.

    Raises:
        RecordDamagedError: there are checkpoints, but none can be used.
    """
    files = [path for path in (record.last, record.previous) if path.exists()]
    whole, damaged = _whole_lines(record.metrics), record.last
    for path in files:
        try:
            step, lines = _read(path)
        except Exception as error:  # whatever zipfile and torch make of a file that is no checkpoint of ours
            log.warning(f"warning  {path} is damaged: {str(error).splitlines()[0] if str(error) else type(error)}")
            continue
        if lines <= whole:
            return Start(path, step, lines)
        damaged = record.metrics
        log.warning(f"warning  {record.metrics} has {whole} whole lines, {path.name} needs {lines}")
    if files:
        raise RecordDamagedError(damaged)
    return Start()


def _read(path: Path) -> tuple[int, int]:
    """Its steps and lines of metrics.

    Raises:
        Exception: it is damaged; every bit that is read later is looked at.
    """
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():  # by the checksum of each member, that torch writes and does not check
            raise ValueError(f"{damaged} does not match its checksum")
        if any(member.external_attr for member in archive.infolist()):
            raise ValueError("a member is marked as a directory")  # one flipped bit, and torch would not read it
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return checkpoint["global_step"], checkpoint["callbacks"]["Curves"]["lines"]


def _whole_lines(metrics: Path) -> int:
    """Before the first that is torn or damaged."""
    try:
        lines = metrics.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    for count, line in enumerate(lines):
        try:
            json.loads(line)
        except ValueError:
            return count
    return len(lines)


class WholeFile(TorchCheckpointIO):
    """Straight to where it belongs and onto the disk; Lightning's own goes through memory and ``/tmp``."""

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
    """A new last checkpoint; the one before it becomes the previous one, unless it is not worth keeping.

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
    """A second name for the same file, put in place at once."""
    temporary = target.with_name(f".{target.name}")
    temporary.unlink(missing_ok=True)
    os.link(source, temporary)
    os.replace(temporary, target)
