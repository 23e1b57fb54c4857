"""Where tasks keep what they built of their data: each directory is written aside and renamed when it is whole.

The cache is ``$CASPR_CACHE``, else ``$XDG_CACHE_HOME/caspr``, else ``~/.cache/caspr``, with a folder for each kind of
data. Several processes may build the same directory at once (the first to finish wins), and one that is killed leaves a
``.building-*`` directory behind that nobody reads. Deleting any of it costs time alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tasks.base import DataError

META = "meta.json"  # in every directory of the cache: what it holds, with its content's ``hash``


def cache_root(kind: str) -> Path:
    """Where this kind of data ("c4_lm", "images", ...) is kept."""
    home = os.environ.get("CASPR_CACHE")
    if home:
        return Path(home).expanduser() / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "caspr" / kind


def digest(parts: Iterable[str]) -> str:
    """Sixteen hex digits that stand for these strings."""
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:16]


def build_once(built: Path, build: Callable[[Path], dict[str, Any]]) -> Path:
    """The directory ``built``, made now if it is not there.

    Args:
        build: fills the empty directory that it is given, and returns what goes into ``meta.json``.

    Raises:
        DataError: the cache cannot be written.
    """
    if (built / META).is_file():
        return built
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".building-", dir=built.parent) as name:
            whole = Path(name) / "whole"
            whole.mkdir()
            (whole / META).write_text(json.dumps(build(whole), indent=1), encoding="utf8")
            move_into_place(whole, built)
    except OSError as error:
        raise DataError(f"CASPR_CACHE: cannot build {built}: {error}") from error
    return built


def move_into_place(whole: Path, built: Path) -> None:
    """Give a finished directory its name, unless another process was first with the same content."""
    if not (built / META).is_file():
        shutil.rmtree(built, ignore_errors=True)  # damaged from outside: a directory comes here whole
    try:
        whole.rename(built)
    except OSError:
        if not (built / META).is_file():
            raise


def read_meta(built: Path) -> dict[str, Any]:
    """What ``meta.json`` says. Raises :class:`DataError` where it is damaged."""
    try:
        meta: dict[str, Any] = json.loads((built / META).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise damaged(built / META) from error
    return meta


def read_array(path: Path) -> np.ndarray[Any, Any]:
    """A ``.npy`` file of the cache, memory-mapped. Raises :class:`DataError` where it is damaged."""
    try:
        array: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path) from error
    return array


def damaged(path: Path) -> DataError:
    """What to say of a file of the cache that is not as it was written."""
    return DataError(f"{path}: damaged; delete {path.parent} and start again")
