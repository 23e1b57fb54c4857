"""Whether a run's data are still those that it began with. No torch.

``provenance.json`` has the hash of their content. A record also keeps the size and the time of change of each of
the user's files: if these are the same, the content is not read again.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from caspr_cli.common import shape
from caspr_cli.recipe import compose
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe, Source
from caspr_cli.runs.record import PROVENANCE, Record

FILE = "data_files.json"
MOST = 20_000  # files; of more, folders alone are looked at
NAMED = 3  # files in a message

Stamps = dict[str, list[int]]  # name of a file or folder below the root: bytes (0 of a folder), nanoseconds


def root_of(recipe: Recipe) -> Path | None:
    """Return where the user's own files are; None if the data come from elsewhere."""
    if recipe.task.data != Source.files or recipe.task.root is None:
        return None
    return Path(recipe.task.root).expanduser()


def stamps(root: Path, names: Iterable[str]) -> Stamps:
    """Return the stamps of those files and folders that exist."""
    found: Stamps = {}
    for name in names:
        try:
            stat = os.stat(root / name)
        except OSError:
            continue
        found[name] = [0 if (root / name).is_dir() else stat.st_size, stat.st_mtime_ns]
    return found


def take(root: Path, files: Iterable[Path]) -> Stamps:
    """Return the stamps of the files of a data set and of their folders, which change when a file comes or goes."""
    names = [os.path.relpath(path, root) for path in files]
    folders = {os.path.dirname(name) or "." for name in names}
    return stamps(root, sorted(folders.union(names if len(names) <= MOST else ())))


def keep(record: Record, taken: Stamps) -> None:
    record.write(FILE, {"files": taken})


def moved(record: Record, root: Path) -> list[str] | None:
    """Return the files and folders that have changed; None if that is not known, or the data are away."""
    try:
        kept = shape.parsed((record.path / FILE).read_bytes())["files"].items()
        before = {str(name): list(stamp) for name, stamp in kept}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    if not root.exists():
        return None
    now = stamps(root, before)
    return [name for name, stamp in before.items() if now.get(name) != stamp]


def refuse_changed(recipe: Recipe, record: Record, data: Mapping[str, Any]) -> None:
    """Raise ConfigError if the data, as the task describes them now, have another hash than when the run began."""
    before = record.read(PROVENANCE).get("data") or {}
    old, new = before.get("hash"), data.get("hash")
    if old is None or old == new:
        return
    root = root_of(recipe)
    files = [name for name in (moved(record, root) if root else None) or () if name != "."]
    shown = ", ".join(files[:NAMED]) + (f" and {len(files) - NAMED} more" if len(files) > NAMED else "")
    both = [key for key in ("name", "tokenizers", "python") if key in before and key in data]
    other = [f"{key} {before[key]}, now {data[key]}" for key in both if before[key] != data[key]]
    why = "; ".join([*([f"changed: {shown}"] if shown else []), *other])
    where = f"task.root={recipe.task.root}: " if root else ""
    raise ConfigError(
        f"{where}the data have changed since this run began: hash {old} then, {new} now{f' ({why})' if why else ''}; "
        "put them back, or add resume=never to run it anew"
    )


def check_done(recipe: Recipe, record: Record) -> None:
    """Raise ConfigError if the data of a done run have changed since; the content is read only if stamps differ."""
    root = root_of(recipe)
    if root is None or not moved(record, root):
        return
    command = [sys.executable, "-m", "caspr_cli.training.describe", "data"]
    done = subprocess.run(command, input=compose.save(recipe), capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ConfigError(f"the data of this run have changed, and cannot be read: {said[-1].removeprefix('error: ')}")
    described = json.loads(done.stdout.splitlines()[-1])
    refuse_changed(recipe, record, described["data"])
    with suppress(OSError):  # a full disk: the content is read again the next time
        keep(record, described["files"])
