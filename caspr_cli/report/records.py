"""Records are read, also while runs still write them: what cannot be read is left out, and said."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from caspr_cli.report import packed
from caspr_cli.report.errors import ReportError
from caspr_cli.report.model import DONE, Point, Run

MARKS = ("config.yaml", "status.json")  # either makes a directory a record
SKIPPED = {".sweep", "checkpoints"}
NEEDED = ("task.name", "optim.name", "seed", "task.target.metric")
HOW = "caspr-train makes records, as: caspr-train -m optim=caspr,adamw seed=0,1,2"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where libyaml is


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
    if status.get("state") == DONE and not isinstance(result.get("final"), dict):
        raise UnreadableError(f"{path / 'result.json'}: missing or damaged, though the run is done: left out")
    try:
        provenance = _object(path / "provenance.json")
    except UnreadableError as reason:
        warnings.append(f"{reason}: where the run came from is not known".replace(": left out", ""))
        provenance = {}
    curve = _curve(path / "metrics.jsonl", config["task.target.metric"], warnings)
    return Run(str(path), config, status, result, provenance, curve)


def _config(file: Path) -> dict[str, Any]:
    try:
        plain = yaml.load(file.read_bytes(), Loader=LOADER)
    except FileNotFoundError:
        raise UnreadableError(f"{file}: not there (yet): left out") from None
    except OSError as error:
        raise UnreadableError(f"{file}: cannot be read ({error.strerror}): left out") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}:" if where else ""
        raise UnreadableError(f"{file}:{line} is no YAML: left out") from error
    config = flat(plain) if isinstance(plain, dict) else {}
    if missing := [key for key in NEEDED if config.get(key) is None]:
        raise UnreadableError(f"{file}: has no {missing[0]}: left out")
    if not isinstance(config["seed"], int):
        raise UnreadableError(f"{file}: seed is no integer: left out")
    return config


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
        content = json.loads(file.read_bytes(), parse_constant=lambda _: None)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UnreadableError(f"{file}: cannot be read ({error.strerror}): left out") from error
    except ValueError as error:
        raise UnreadableError(f"{file}: is no JSON: left out") from error
    if not isinstance(content, dict):
        raise UnreadableError(f"{file}: is no JSON object: left out")
    return content


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
            point = Point(int(entry["step"]), number_or_none(entry.get("time/seconds")), number_or_none(entry[metric]))
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # the last one may be half-written
                warnings.append(f"{file}: line {number} cannot be read: left out of the curve")
            continue
        points[point.step] = point
    return tuple(points[step] for step in sorted(points))


def number_or_none(value: Any) -> float | None:
    """Not finite is None, as in records.

    Raises:
        TypeError: it is no number.
    """
    return None if value is None or not math.isfinite(value) else float(value)
