"""Where tasks keep what they built of their data: each directory is written aside and renamed when it is whole.

The cache is ``$CASPR_CACHE``, else ``$XDG_CACHE_HOME/caspr``, else ``~/.cache/caspr``, with a folder for each kind of
data. Several processes may build the same directory at once (the first to finish wins). One that is killed leaves a
``.building-*`` directory behind that nobody reads; the next one deletes it. Deleting any of it costs time alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import IO, Any

import numpy as np

from caspr_cli.common.files import disk_error
from tasks.errors import DataError
from tasks.files import reading

ASIDE, LOCK = ".building-", ".lock"
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
        OSError: the disk is full, or does not answer.
    """
    if (built / META).is_file():
        return built
    with building(built.parent) as aside:
        whole = aside / "whole"
        whole.mkdir()
        (whole / META).write_text(json.dumps(build(whole), indent=1), encoding="utf8")
        move_into_place(whole, built)
    return built


@contextmanager
def building(parent: Path) -> Iterator[Path]:
    """An empty directory in the folder ``parent`` of the cache to build something in, and away with it at the end.

    Raises:
        DataError: the cache cannot be written.
        OSError: the disk is full, or does not answer; it names a file or ``parent``.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _claimed(parent) as aside:
            yield aside
    except Exception as error:
        if disk := disk_error(error):
            raise OSError(disk.errno, disk.strerror, disk.filename or str(parent)) from error
        if isinstance(error, OSError):
            raise DataError(f"CASPR_CACHE: cannot build in {parent}: {error}") from error
        raise


@contextmanager
def _claimed(parent: Path) -> Iterator[Path]:
    """A new directory, whose lock this process holds. One whose lock nobody holds was left by the dead, and goes."""
    with (parent / LOCK).open("a") as gate:
        _lock(gate, fcntl.LOCK_EX)  # between making a directory and locking it, nobody looks
        for left in parent.glob(f"{ASIDE}*"):
            with suppress(OSError), (left / LOCK).open("a") as lock:  # or it went away by itself
                if _lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(left, ignore_errors=True)
        aside = Path(mkdtemp(prefix=ASIDE, dir=parent))
        held = (aside / LOCK).open("w")
        _lock(held, fcntl.LOCK_EX)
    with held:
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _lock(file: IO[str], kind: int) -> bool:
    """Whether the lock is had; never on a file system without locks, where nothing is deleted then."""
    try:
        fcntl.flock(file, kind)
    except OSError:
        return False
    return True


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
    with whole(built / META):
        meta: dict[str, Any] = json.loads((built / META).read_text(encoding="utf8"))
        if meta.keys():
            return meta
    raise damaged(built / META)


def write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """A ``.npy`` file, as ``np.save`` writes it, which gives no reason where the disk is full."""
    with array_file(path, array.dtype, array.shape) as file:
        file.write(np.ascontiguousarray(array).data)


def array_file(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> IO[bytes]:
    """A ``.npy`` file to write the numbers into, in C order. (In a mapped file a full disk would kill the process.)"""
    file = path.open("wb")
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file


def read_array(path: Path) -> np.ndarray[Any, Any]:
    """A ``.npy`` file of the cache, memory-mapped. Raises :class:`DataError` where it is damaged."""
    with whole(path):
        array: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Around what reads a file of the cache: whatever goes wrong, :class:`DataError` says that it is damaged."""
    try:
        with reading(str(path)):
            yield
    except DataError as error:
        raise damaged(path) from error


def damaged(path: Path) -> DataError:
    """What to say of a file of the cache that is not as it was written."""
    return DataError(f"{path}: damaged; delete {path.parent} and start again")
