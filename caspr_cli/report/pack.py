"""Packs: many records in one small file, a gzip of JSON lines, to share them or to report what has moved elsewhere.

The first line says what the file is. Each other line is a record: its path, config (dotted keys), status, result,
provenance and validations (step, seconds, value). Host, process id, uncommitted diff (its hash stays) and absolute
paths are left out. The same records give the same bytes.
"""

import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import yaml

from caspr_cli.common import shape
from caspr_cli.common.errors import UserError
from caspr_cli.common.files import write_output
from caspr_cli.common.format import size
from caspr_cli.common.shape import DamagedError
from caspr_cli.report.model import Run, point
from caspr_cli.report.settings import SPACE

FORMAT = {"caspr-report": "records", "version": 1}
# An absolute path, where a word begins; not the rest of a URL or of val/loss.
ABSOLUTE = re.compile(r"(?:(?<=[\s=:,;'\"(\[])|^)/(?!/)[^\s,;:'\")\]]+")
HIDDEN = "<path>"
PLACES = ("task.root", "output_dir")  # which make no row of their own
SUFFIX = ".jsonl.gz"
PARTS = ("config", "status", "result", "provenance")  # of a record, that a pack has
LONGEST_LINE = 16_000_000  # bytes of one record; one with a hundred thousand validations has four
MOST = 200_000_000  # bytes of all, uncompressed; fifty thousand records of usual size


def pack(runs: Iterable[Run], roots: Sequence[Path]) -> bytes:
    """Return the file's content.

    ``roots``: the paths that the records were found under; a record's path becomes relative to its own.
    """
    labels = _labels(roots)
    entries = sorted((_entry(run, labels) for run in runs), key=lambda entry: (entry["path"], _line(entry)))
    text = "".join(_line(entry) + "\n" for entry in [FORMAT, *entries])
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
        file.write(text.encode())
    return buffer.getvalue()


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _entry(run: Run, roots: Mapping[Path, str]) -> dict[str, Any]:
    host = run.status.get("host") or (run.provenance.get("machine") or {}).get("host")
    origin = _origin({"machine": {}, "code": None} | run.provenance)
    if later := run.provenance.get("attempts"):
        origin["attempts"] = [_origin(attempt) for attempt in later]
    config = run.config | {"trainer.rendezvous": None}
    status = {key: value for key, value in run.status.items() if key not in ("host", "pid", "born")}
    return {
        "path": shape.encodable(_kept(run.path, roots)),
        "config": {key: _cleaned(value, None, distinct=key not in PLACES) for key, value in config.items()},
        "status": _cleaned(status, host),
        "result": _cleaned(run.result, host),
        "provenance": _cleaned(origin, host),
        "curve": list(map(astuple, run.curve)),
    }


def _origin(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the provenance without the machine's name and the text of uncommitted changes."""
    found = dict(provenance)
    for owner, left_out in (("machine", "host"), ("code", "diff")):
        if isinstance(inner := found.get(owner), dict):
            found[owner] = {key: value for key, value in inner.items() if key != left_out}
    return found


def _kept(path: str, roots: Mapping[Path, str]) -> str:
    """Return a path relative to the root that it is under, with the root's own name before it if there are several."""
    own = {shape.encodable(str(root)): name for root, name in roots.items()}
    for root, name in own.items():
        if path.startswith(f"{root}:"):  # of a pack
            inner = path.removeprefix(f"{root}:")
            return f"{name}/{inner}" if len(roots) > 1 else inner
    for root, name in own.items():
        relative = os.path.relpath(path, root)
        if not relative.startswith(".."):
            return name if relative == "." else f"{name}/{relative}" if len(roots) > 1 else relative
    return Path(path).name


def _labels(roots: Sequence[Path]) -> dict[Path, str]:
    """Return a name for each root: that of a pack has no ``.jsonl.gz``, unless a directory beside it is called so."""
    names = endings(roots)
    bare = {root: name.removesuffix(SUFFIX) for root, name in names.items()}
    return bare if len(set(bare.values())) == len(set(names.values())) else names


def endings(roots: Sequence[Path]) -> dict[Path, str]:
    """Return for each path its end, as short as distinguishes all of them."""
    parts = {root: root.resolve().parts for root in roots}
    longest = max(map(len, parts.values()), default=1)
    for count in range(1, longest + 1):
        names = {root: "/".join(one[-count:]) for root, one in parts.items()}
        if len(set(names.values())) == len(set(parts.values())):
            break
    return names


def _cleaned(node: Any, host: str | None, *, distinct: bool = False) -> Any:
    """Return the same without absolute paths and the name of the host.

    Args:
        distinct: different paths stay different, as ``<path 1f3a9c20>``: settings that differ make different rows.
    """
    if isinstance(node, dict):
        return {key: _cleaned(value, host, distinct=distinct) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_cleaned(value, host, distinct=distinct) for value in node]
    if not isinstance(node, str):
        return node
    text = ABSOLUTE.sub(_hash_of if distinct else HIDDEN, node)
    return re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", "<host>", text) if host else text


def _hash_of(path: re.Match[str]) -> str:
    return f"{HIDDEN[:-1]} {hashlib.sha256(path[0].encode()).hexdigest()[:8]}>"


def unpack(runs: Iterable[Run], folder: Path, packs: Sequence[Path] = ()) -> tuple[int, int]:
    """Write the records of packs as directories again, so that ``caspr-train`` knows what is done.

    Training curves, logs and checkpoints are not in a pack. A record that is there already stays. Return how many were
    written, and how many were there. ``packs``: the files, which may be called otherwise than ``.jsonl.gz``.

    Raises UserError if nothing can be written there, a path leads out of it, or different records have the same one.
    """
    found: dict[Path, Run] = {}
    for run in runs:
        inner = Path(_inner(run.path, packs))
        if inner.is_absolute() or ".." in inner.parts:
            raise UserError(f"{run.path}: the path of a record should be relative, and below its directory")
        other = found.setdefault(inner, run)
        if replace(other, path=run.path) != run:
            same = f"a different record has the same path ({other.path})"
            raise UserError(f"{run.path}: {same}: unpack each into a directory of its own")
    written = there = 0
    for inner, run in found.items():
        record = folder / inner
        if (record / "status.json").exists():
            there += 1
            continue
        points = [{"step": point.step, run.metric: point.value, "time/seconds": point.seconds} for point in run.curve]
        write_output(record / "config.yaml", yaml.safe_dump(_nested(run.config), sort_keys=False))
        write_output(record / "metrics.jsonl", "".join(json.dumps(point) + "\n" for point in points))
        for name in ("provenance", "result", "status"):  # the status last: it says that the others are there
            write_output(record / f"{name}.json", json.dumps(getattr(run, name), indent=2) + "\n")
        written += 1
    return written, there


def _inner(path: str, packs: Sequence[Path]) -> str:
    """Return the path that a record has in its pack."""
    own = next((f"{pack}:" for pack in packs if path.startswith(f"{pack}:")), "")
    return path.removeprefix(own) if own else path.rpartition(f"{SUFFIX}:")[2]


def _nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys as groups; those of a search space have dots of their own."""
    nested: dict[str, Any] = {}
    for key, value in config.items():
        *groups, last = key.split(".")
        if key.startswith(SPACE):
            name, _, last = key.removeprefix(SPACE).rpartition(".")
            groups = [*SPACE.rstrip(".").split("."), name]
        node = nested
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    if nested.get("search"):
        nested["search"].setdefault("space", {})  # an empty group leaves no key
    return nested


def read(file: Path) -> list[Run]:
    """Return the records of a pack. Raises UserError if the file is no pack, is damaged, or is larger than any pack."""
    try:
        with gzip.open(file, "rb") as stream:
            lines = enumerate(_lines(file, stream), 1)
            if shape.parsed(next(lines, (1, b"null"))[1]) != FORMAT:
                raise UserError(f"{file}: line 1: is not what caspr-report pack of this version writes")
            return [_run(file, number, line) for number, line in lines]
    except (OSError, EOFError, zlib.error, DamagedError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "damaged, or not made by it"
        raise UserError(f"{file}: cannot be read as what caspr-report pack writes ({why})") from error


def _lines(file: Path, stream: gzip.GzipFile) -> Iterator[bytes]:
    """Yield the lines of a pack, and stop where a few bytes of it become more than a machine can hold."""
    total = 0
    while line := stream.readline(LONGEST_LINE + 1):
        total += len(line)
        if len(line) > LONGEST_LINE or total > MOST:
            what = f"a line of more than {size(LONGEST_LINE)}" if total <= MOST else f"more than {size(MOST)}"
            raise UserError(f"{file}: refused: it has {what} when it is uncompressed")
        yield line


def _run(file: Path, number: int, line: bytes) -> Run:
    try:
        entry = shape.parsed(line, finite=False)
        config, status, result, provenance = (shape.part(name, entry[name]) for name in PARTS)
        curve = tuple(point(*values) for values in entry["curve"])
        if shape.lost(status, result):
            raise DamagedError("has no result, though the run is done")
        return Run(f"{file}:{shape.printable(entry['path'])}", config, status, result, provenance, curve)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f": {error}" if isinstance(error, DamagedError) else ""
        raise UserError(f"{file}: line {number} is not a record{why}") from error
