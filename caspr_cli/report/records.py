"""Records are read, also while runs still write them: what cannot be read is left out, and said."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from caspr_cli.report import packed
from caspr_cli.report.errors import ReportError
from caspr_cli.report.model import Point, Run
from caspr_cli.runs import shape

MARKS = ("config.yaml", "status.json")  # either makes a directory a record
SKIPPED = {".sweep", "checkpoints"}
HOW = "caspr-train makes records, as: caspr-train -m optim=caspr,adamw seed=0,1,2"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where libyaml is
FAST = 16_000  # bytes; libyaml's recursion, with a level a byte at most, ends the process in longer ones
NO_YAML = (
    yaml.YAMLError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)  # PyYAML's own, too
LONGEST = 1_000_000  # bytes; a recipe has a thousand


@dataclass
class Records:
    """What was found: ``warnings`` has a line for each file that could not be read."""

    runs: list[Run] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class UnreadableError(Exception):
    """The record is left out; the message is a warning, and empty where there is nothing to warn of."""


def find(paths: Sequence[Path]) -> Records:
    """All records below these directories, and in packed files; each once, sorted by path.

    Raises:
        ReportError: a path is not there, or a file is no pack of records.
    """
    found, seen = Records(), set()
    for path in paths:
        if path.is_file():
            found.runs += packed.read(path)
            continue
        if not path.is_dir():
            raise ReportError(f"{path}: no such file or directory; {HOW}")
        for directory in _directories(path, found.warnings):
            if (real := os.path.realpath(directory)) in seen:
                continue
            seen.add(real)
            try:
                found.runs.append(read(Path(directory), found.warnings))
            except UnreadableError as reason:
                found.warnings += [str(reason)] if str(reason) else []
    found.runs.sort(key=lambda run: run.path)
    return found


def _directories(root: Path, warnings: list[str]) -> Iterator[str]:
    """Those of records."""

    def failed(error: OSError) -> None:
        warnings.append(f"{error.filename}: cannot be read ({error.strerror})")

    for directory, inner, files in os.walk(root, onerror=failed):
        if any(mark in files for mark in MARKS):
            inner.clear()
            yield directory
        inner[:] = sorted(name for name in inner if name not in SKIPPED)


def read(path: Path, warnings: list[str]) -> Run:
    """One record.

    Raises:
        UnreadableError: it cannot be counted.
    """
    config = _config(path / "config.yaml")
    status = _object(path / "status.json")  # before the result, which is written first
    result = _object(path / "result.json")
    if shape.lost(status, result):
        raise UnreadableError(f"{path / 'result.json'}: missing or damaged, though the run is done: left out")
    try:
        provenance = _object(path / "provenance.json")
    except UnreadableError as reason:
        warnings.append(f"{reason}: where the run came from is not known".replace(": left out", ""))
        provenance = {}
    curve = _curve(path / "metrics.jsonl", config["task.target.metric"], warnings)
    return Run(packed.encodable(str(path)), config, status, result, provenance, curve)


def _config(file: Path) -> dict[str, Any]:
    try:
        content = file.read_bytes()
        if len(content) > LONGEST:
            raise UnreadableError(f"{file}: is too long for a recipe: left out")
        plain = yaml.load(content, Loader=LOADER if len(content) <= FAST else yaml.SafeLoader)
        config = flat(plain) if isinstance(plain, dict) else {}
    except FileNotFoundError:
        raise UnreadableError(f"{file}: not there (yet): left out") from None
    except OSError as error:
        raise UnreadableError(f"{file}: cannot be read ({error.strerror}): left out") from error
    except NO_YAML as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}:" if where else ""
        raise UnreadableError(f"{file}:{line} is no YAML: left out") from error
    return _part(file, config)


def _part(file: Path, content: Any) -> dict[str, Any]:
    """Of a record, with the shape that it should have."""
    try:
        return shape.part(file.stem, content)
    except shape.DamagedError as reason:
        raise UnreadableError(f"{file}: {reason}: left out") from reason


def flat(node: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones; a list is one value, an empty group none."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _object(file: Path) -> dict[str, Any]:
    """A JSON file; empty if there is none."""
    try:
        content = shape.parsed(file.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UnreadableError(f"{file}: cannot be read ({error.strerror}): left out") from error
    except shape.DamagedError as reason:
        raise UnreadableError(f"{file}: {reason}: left out") from reason
    return _part(file, content)


def _curve(file: Path, metric: str, warnings: list[str]) -> tuple[Point, ...]:
    """The validations; a run that was cut off and continued may have written one twice: the later counts."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return ()
    except OSError as error:
        warnings.append(f"{file}: cannot be read ({error.strerror}): the run has no curve")
        return ()
    needle, points, lines = f'"{metric}"'.encode(), {}, content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if needle not in line:  # most lines are of training, and long
            continue
        try:
            entry = json.loads(line)
            point = packed.point(entry["step"], entry.get("time/seconds"), entry[metric])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if number < len(lines):  # the last one may be half-written
                warnings.append(f"{file}: line {number} cannot be read: left out of the curve")
            continue
        points[point.step] = point
    return tuple(points[step] for step in sorted(points))
