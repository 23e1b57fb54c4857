"""Many records in one file, a gzip of JSON lines: for sharing, and for reports of what has moved elsewhere.

The first line says what the file is. Each other line is a record: its path, config (dotted keys), status, result,
provenance and validations (step, seconds, value). Host, process id, uncommitted diff (its hash stays) and absolute
paths are left out. The same records give the same bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import yaml

from caspr_cli.report.errors import ReportError
from caspr_cli.report.files import write_whole
from caspr_cli.report.model import Point, Run, finite
from caspr_cli.report.rows import SPACE
from caspr_cli.runs.shape import KINDS, SHAPE, DamagedError, lost, part, printable

FORMAT = {"caspr-report": "records", "version": 1}
# An absolute path, where a word begins; not the rest of a URL or of val/loss.
ABSOLUTE = re.compile(r"(?:(?<=[\s=:,;'\"(\[])|^)/(?!/)[^\s,;:'\")\]]+")
GONE = "<path>"


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
    origin = _origin({"machine": {}, "code": None} | run.provenance)
    if later := run.provenance.get("attempts"):
        origin["attempts"] = [_origin(attempt) for attempt in later]
    parts = {
        "config": run.config | {"trainer.rendezvous": None},
        "status": {key: value for key, value in run.status.items() if key not in ("host", "pid", "born")},
        "result": run.result,
        "provenance": origin,
    }
    cleaned = {key: _cleaned(value, host) for key, value in parts.items()}
    return {"path": encodable(_kept(run.path, roots)), **cleaned, "curve": [astuple(point) for point in run.curve]}


def _origin(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Without the machine's name and the text of uncommitted changes."""
    found = dict(provenance)
    for owner, left_out in (("machine", "host"), ("code", "diff")):
        if isinstance(inner := found.get(owner), dict):
            found[owner] = {key: value for key, value in inner.items() if key != left_out}
    return found


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
