"""Reads records, also while runs still write them. What cannot be read is left out, with a warning."""

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caspr_cli.common import shape
from caspr_cli.common.alive import lives
from caspr_cli.common.errors import UserError
from caspr_cli.common.format import size
from caspr_cli.common.shape import DamagedError
from caspr_cli.report import pack
from caspr_cli.report.model import Point, Run, point

MARKS = ("config.yaml", "status.json")  # either makes a directory a record
SKIPPED = {".sweep", "checkpoints"}
HOW = "caspr-train makes records, as: caspr-train -m optim=caspr,adamw seed=0,1,2"
LONGEST = {"config.yaml": 1_000_000}  # bytes; a recipe has a thousand
LONGEST_JSON = 64_000_000  # bytes; with an uncommitted diff a provenance may have some


@dataclass
class Records:
    """The records that were found; ``warnings`` has a line for each file that could not be read."""

    runs: list[Run] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find(paths: Sequence[Path]) -> Records:
    """Return all records below these directories, and in packs; each once, sorted by path.

    Those of a pack may be named as messages name them: ``x.jsonl.gz:adamw/1044dee0/seed0``. Raises UserError if a path
    is not there, or a file is no pack.
    """
    found, seen = Records(), set()
    for path in paths:
        if path.is_file():
            if (real := os.path.realpath(path)) not in seen:
                found.runs += pack.read(path)
            seen.add(real)
            continue
        if packed := _packed(path):
            known = {run.path for run in found.runs}
            found.runs += [run for run in packed if run.path not in known]
            continue
        if not path.is_dir():
            raise UserError(f"{path}: no such file or directory; {HOW}")
        for directory in _directories(path, found.warnings):
            if (real := os.path.realpath(directory)) in seen:
                continue
            seen.add(real)
            try:
                found.runs.append(read(Path(directory), found.warnings))
            except DamagedError as reason:
                found.warnings.append(f"{reason}: left out")
    found.runs.sort(key=lambda run: run.path)
    return found


def _packed(path: Path) -> list[Run]:
    """Return the records of a pack at a path in it, or below; none if the path is not one in a pack."""
    file = Path(str(path).rpartition(":")[0])
    if path.exists() or not file.is_file():
        return []
    return [run for run in pack.read(file) if f"{run.path}/".startswith(f"{path}/")]


def _directories(root: Path, warnings: list[str]) -> Iterator[str]:
    def failed(error: OSError) -> None:
        warnings.append(f"{error.filename}: cannot be read ({error.strerror})")

    for directory, inner, files in os.walk(root, onerror=failed):
        if any(mark in files for mark in MARKS):
            if "status.json" in files:  # a config.yaml alone may be anybody's, with records below
                inner.clear()
            yield directory
        inner[:] = sorted(name for name in inner if name not in SKIPPED)


def how(paths: Sequence[Path]) -> str:
    """Return what to do where directories have no records."""
    for path in paths:
        if found := next(path.rglob("*.jsonl.gz"), None):
            return f"it has packs: name them, as {found}"
        if next(path.rglob("*tfevents*"), None):
            return "it has logs of TensorBoard: add --from tensorboard --metric NAME"
    return HOW


def read(path: Path, warnings: list[str]) -> Run:
    """Return one record. Raises DamagedError, which begins with the file, if it has to be left out."""
    config = _part(path / "config.yaml")
    status = _status(path)  # before the result, which is written first
    result = _part(path / "result.json")
    if shape.lost(status, result):
        raise DamagedError(f"{path / 'result.json'}: missing or damaged, though the run is done")
    try:
        provenance = _part(path / "provenance.json")
    except DamagedError as reason:
        warnings.append(f"{reason}: where the run came from is not known")
        provenance = {}
    curve = tuple(_curve(path / "metrics.jsonl", config["task.target.metric"], warnings))
    return Run(shape.encodable(str(path)), config, status, result, provenance, curve)


def _status(path: Path) -> dict[str, Any]:
    """Return the status of a record; of a run whose process has gone from this machine the state is ``cut off``."""
    status = _part(path / "status.json")
    if status.get("state") != "running" or status.get("host") != socket.gethostname() or "pid" not in status:
        return status
    if not lives(status["pid"], status.get("born")):
        status = _part(path / "status.json")  # it may just have ended
        status["state"] = "cut off" if status.get("state") == "running" else status.get("state")
    return status


def _part(file: Path) -> dict[str, Any]:
    """Return the content of a file of a record, checked; empty where a JSON file is not there yet."""
    most = LONGEST.get(file.name, LONGEST_JSON)
    try:
        with file.open("rb") as stream:
            content = stream.read(most + 1)
        if len(content) > most:
            raise DamagedError(f"has more than {size(most)}")
        return shape.config(content) if file.suffix == ".yaml" else shape.part(file.stem, shape.parsed(content))
    except FileNotFoundError:
        if file.suffix == ".json":
            return {}
        raise DamagedError(f"{file}: missing") from None
    except OSError as error:
        raise DamagedError(f"{file}: cannot be read ({error.strerror})") from error
    except DamagedError as error:
        raise DamagedError(f"{file}: {error}") from error


def _curve(file: Path, metric: str, warnings: list[str]) -> list[Point]:
    """Return the validations; of two at one step, which a run that was continued may have, the later counts."""
    needle, points = f'"{metric}"'.encode(), {}
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if needle not in line:  # most lines are about training, and long
                    continue
                try:
                    entry = shape.parsed(line)
                    found = point(entry["step"], entry.get("time/seconds"), entry[metric])
                    points[found.step] = found
                except (ValueError, KeyError, TypeError, AttributeError):
                    if line.endswith(b"\n"):  # the last line may be half-written
                        warnings.append(f"{file}: line {number} cannot be read: left out of the curve")
    except FileNotFoundError:
        pass
    except OSError as error:
        warnings.append(f"{file}: cannot be read ({error.strerror}): the run has no curve")
        return []
    return [points[step] for step in sorted(points)]
