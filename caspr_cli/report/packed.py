"""Many records in one file, a gzip of JSON lines: for sharing, and for reports of what has moved elsewhere.

The first line says what the file is. Each other line is a record: its path, config (dotted keys), status, result,
provenance and validations (step, seconds, value). Host, process id, uncommitted diff (its hash stays) and absolute
paths are left out. The same records give the same bytes. What those parts have to look like is said here, for records
in directories too.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import yaml

from caspr_cli.report.errors import ReportError
from caspr_cli.report.files import write_whole
from caspr_cli.report.model import DONE, Point, Run, finite
from caspr_cli.report.rows import SPACE

FORMAT = {"caspr-report": "records", "version": 1}
# An absolute path, where a word begins; not the rest of a URL or of val/loss.
ABSOLUTE = re.compile(r"(?:(?<=[\s=:,;'\"(\[])|^)/(?!/)[^\s,;:'\")\]]+")
GONE = "<path>"

NEEDED = ("task.name", "optim.name", "seed", "task.target.metric")
KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "integer": lambda value: type(value) is int and abs(value) < 2**63,
    "number": lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max,
    "truth value": lambda value: isinstance(value, bool),
    "list": lambda value: isinstance(value, list),
    "mapping": lambda value: isinstance(value, dict),
    "mapping of numbers": lambda value: (
        isinstance(value, dict) and all(each is None or KINDS["number"](each) for each in value.values())
    ),
}
# What is read of a record, an owner before its own; each may be missing or null. What is not named may be anything.
SHAPE: dict[str, dict[str, str]] = {
    "config": {
        "task": "mapping", "task.name": "text", "task.data": "text", "task.target": "mapping",
        "task.target.metric": "text", "task.target.value": "number", "task.target.higher_is_better": "truth value",
        "optim": "mapping", "optim.name": "text", "scale": "text", "seed": "integer",
        "search": "mapping", "search.space": "mapping", "search.trials": "integer",
    },
    "status": {"state": "text", "error": "text", "step": "integer", "updated": "text", "host": "text"},
    "result": {
        "final": "mapping of numbers", "test": "mapping of numbers", "steps": "integer", "seconds": "number",
        "target": "mapping", "target.value": "number", "target.step": "integer", "target.seconds": "number",
    },
    "provenance": {
        "command": "list", "code": "mapping", "data": "mapping", "data.hash": "text",
        "packages": "mapping", "packages.torch": "text",
        "machine": "mapping", "machine.host": "text", "machine.system": "text",
        "device": "mapping", "device.processes": "integer", "device.threads": "integer",
    },
}  # fmt: skip
SEVERAL_LINES = ("error", "diff")  # all other texts are words in tables
DEEPEST = 32  # more levels than any record has, fewer than Python's recursion


class DamagedError(ValueError):
    """A part of a record that cannot be counted; the message says why."""


def part(name: str, content: Any) -> dict[str, Any]:
    """A part of a record, of the shape that its readers need; its texts can be printed.

    Args:
        name: ``config`` (dotted keys), ``status``, ``result`` or ``provenance``.

    Raises:
        DamagedError: it is of another shape.
    """
    if not isinstance(content, dict):
        raise DamagedError(f"{name} is no mapping")
    found: dict[str, Any] = tidy(content, name)
    for key, kind in SHAPE[name].items():
        value = found.get(key) if name == "config" else _inner(found, key)
        if value is not None and not KINDS[kind](value):
            raise DamagedError(f"{key} is no {kind}")
    if name == "config":
        if missing := [key for key in NEEDED if found.get(key) in (None, "")]:
            raise DamagedError(f"has no {missing[0]}")
        groups = {key[: dot.start()] for key in found for dot in re.finditer(r"\.", key)}
        if both := groups.intersection(found):
            raise DamagedError(f"{min(both)} is a value and a group")
    return found


def _inner(node: Any, key: str) -> Any:
    for name in key.split("."):
        node = (node or {}).get(name)
    return node


def tidy(node: Any, key: str = "", depth: int = 0) -> Any:
    """The same, with texts that can be printed and encoded.

    Raises:
        DamagedError: something in it is of no type that records have, or too large.
    """
    if depth > DEEPEST:
        raise DamagedError(f"{key} is nested too deeply")
    if isinstance(node, dict):
        return {printable(str(name)): tidy(value, str(name), depth + 1) for name, value in node.items()}
    if isinstance(node, list):
        return [tidy(value, key, depth + 1) for value in node]
    if isinstance(node, str):
        return "\n".join(map(printable, node.split("\n"))) if key in SEVERAL_LINES else printable(node)
    if node is None or isinstance(node, (bool, float)) or (isinstance(node, int) and abs(node) < sys.float_info.max):
        return node
    raise DamagedError(f"{printable(key)} is neither text, list nor a number in range")


def printable(text: str) -> str:
    """On one line, and without what a terminal, LaTeX or UTF-8 would stumble over."""
    if text.isprintable():
        return text
    return " ".join("".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text).split())


def encodable(path: str) -> str:
    """The same where it is UTF-8, which names of files need not be."""
    return path.encode(errors="replace").decode()


def point(step: Any, seconds: Any, value: Any) -> Point:
    """A validation; what is not finite is None.

    Raises:
        DamagedError: the step is no integer, or another of the three no number.
    """
    if not KINDS["integer"](step) or not all(x is None or type(x) in (int, float) for x in (seconds, value)):
        raise DamagedError("a validation has other values than numbers")
    return Point(step, None if seconds is None or not KINDS["number"](seconds) else float(seconds), finite(value))


def lost(status: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Whether a run is done, and its result is not there."""
    return status.get("state") == DONE and result.get("final") is None


# ---- the file ----------------------------------------------------------------------------------------------------


def pack(runs: Iterable[Run], roots: Sequence[Path]) -> bytes:
    """The file's content.

    Args:
        roots: the paths that the records were found under; what is kept of a record's path is relative to its own.
    """
    entries = sorted((_entry(run, roots) for run in runs), key=lambda entry: (entry["path"], _line(entry)))
    text = "".join(_line(entry) + "\n" for entry in [FORMAT, *entries])
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
        file.write(text.encode())
    return buffer.getvalue()


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _entry(run: Run, roots: Sequence[Path]) -> dict[str, Any]:
    machine = run.provenance.get("machine") or {}
    host = run.status.get("host") or machine.get("host")
    code = run.provenance.get("code") or {}
    parts = {
        "config": run.config | {"trainer.rendezvous": None},
        "status": {key: value for key, value in run.status.items() if key not in ("host", "pid", "born")},
        "result": run.result,
        "provenance": run.provenance
        | {"machine": {key: value for key, value in machine.items() if key != "host"}}
        | {"code": {key: value for key, value in code.items() if key != "diff"} or None},
    }
    cleaned = {key: _cleaned(value, host) for key, value in parts.items()}
    return {"path": encodable(_kept(run.path, roots)), **cleaned, "curve": [astuple(point) for point in run.curve]}


def _kept(path: str, roots: Sequence[Path]) -> str:
    """Relative to the root that it is under; the name of the root tells several of them apart."""
    for root in (encodable(str(root)) for root in roots):
        if path.startswith(f"{root}:"):  # of a pack
            return path.removeprefix(f"{root}:")
        relative = os.path.relpath(path, root)
        if not relative.startswith(".."):
            name = Path(root).resolve().name
            return name if relative == "." else f"{name}/{relative}" if len(roots) > 1 else relative
    return Path(path).name


def _cleaned(node: Any, host: str | None) -> Any:
    if isinstance(node, dict):
        return {key: _cleaned(value, host) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_cleaned(value, host) for value in node]
    if not isinstance(node, str):
        return node
    text = ABSOLUTE.sub(GONE, node)
    return re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", "<host>", text) if host else text


def unpack(runs: Iterable[Run], folder: Path) -> tuple[int, int]:
    """Write the records of packs as directories again, so that ``caspr-train`` knows what is done.

    What a pack leaves out is not there: training curves, logs, checkpoints. A record that is there already stays.

    Returns:
        How many were written, and how many were there.

    Raises:
        ReportError: nothing can be written there, or a path leads out of it.
    """
    written = there = 0
    for run in runs:
        inner = Path(run.path.rpartition(".jsonl.gz:")[2])
        if inner.is_absolute() or ".." in inner.parts:
            raise ReportError(f"{run.path}: the path of a record should be relative, and below its directory")
        record = folder / inner
        if (record / "status.json").exists():
            there += 1
            continue
        metric = run.metric
        points = [
            json.dumps({"step": point.step, metric: point.value, "time/seconds": point.seconds}) + "\n"
            for point in run.curve
        ]
        write_whole(record / "config.yaml", yaml.safe_dump(_nested(run.config), sort_keys=False))
        write_whole(record / "metrics.jsonl", "".join(points))
        for name in ("provenance", "result", "status"):  # the status last: with it the record is whole
            write_whole(record / f"{name}.json", json.dumps(getattr(run, name), indent=2) + "\n")
        written += 1
    return written, there


def _nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as groups; those of a search space have dots of their own."""
    nested: dict[str, Any] = {}
    for key, value in config.items():
        groups = key.split(".")
        if key.startswith(SPACE):
            name, _, kind = key.removeprefix(SPACE).rpartition(".")
            groups = [*SPACE.rstrip(".").split("."), name, kind]
        node = nested
        for group in groups[:-1]:
            node = node.setdefault(group, {})
        node[groups[-1]] = value
    if nested.get("search"):
        nested["search"].setdefault("space", {})  # an empty group leaves no key
    return nested


def read(file: Path) -> list[Run]:
    """The records of a pack.

    Raises:
        ReportError: it is none, or is damaged.
    """
    try:
        with gzip.open(file, "rt", encoding="utf8") as lines:
            if json.loads(next(lines, "null")) != FORMAT:
                raise ReportError(f"{file}: line 1: is not what caspr-report pack of this version writes")
            return [_run(file, number, line) for number, line in enumerate(lines, 2)]
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "damaged, or not made by it"
        raise ReportError(f"{file}: cannot be read as what caspr-report pack writes ({why})") from error


def _run(file: Path, number: int, line: str) -> Run:
    try:
        entry = json.loads(line)
        config, status, result, provenance = (part(name, entry[name]) for name in SHAPE)
        curve = tuple(point(*values) for values in entry["curve"])
        if lost(status, result):
            raise DamagedError("has no result, though the run is done")
        return Run(f"{file}:{printable(entry['path'])}", config, status, result, provenance, curve)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f": {error}" if isinstance(error, DamagedError) else ""
        raise ReportError(f"{file}: line {number} is no record{why}") from error
