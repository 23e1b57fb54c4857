"""Where tasks keep what they built of their data: each directory is written aside and renamed when it is whole.

The cache is ``$CASPR_CACHE``, else ``$XDG_CACHE_HOME/caspr``, else ``~/.cache/caspr``, with a folder for each kind of
data. Several processes may build the same directory at once (the first to finish wins). One that is killed leaves a
``.building-*`` directory behind that nobody reads; the next one deletes it. Deleting any of it costs time alone.
"""

import fcntl
import hashlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import IO, Any, TypeVar

import numpy as np
from torch.utils.data import Dataset

from caspr_cli.common.files import disk_error
from caspr_cli.tasks.errors import DataError
from caspr_cli.tasks.files import reading

T = TypeVar("T")
ASIDE, LOCK = ".building-", ".lock"
META = "meta.json"  # in every directory of the cache: what it holds, with its content's ``hash``


def cache_root(kind: str) -> Path:
    """Return where this kind of data ("c4_lm", "images", ...) is kept."""
    home = os.environ.get("CASPR_CACHE")
    if home:
        return Path(home).expanduser() / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "caspr" / kind


def digest(parts: Iterable[str]) -> str:
    """Return sixteen hex digits that stand for these strings."""
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:16]


def build_once(built: Path, build: Callable[[Path], dict[str, Any]]) -> Path:
    """Return the directory ``built``, made now if it is not there. Raises as :func:`building`.

    ``build`` fills the empty directory that it is given, and returns what goes into ``meta.json``.
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
    """Give an empty directory in the folder ``parent`` of the cache to build something in, and delete it at the end.

    Raises DataError if the cache cannot be written, and OSError if the disk is full, or does not answer; it names a
    file or ``parent``.
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
    """Give a new directory, whose lock this process holds; delete those whose lock no process holds any more."""
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
    """Return whether the lock is held; never on a file system without locks, where nothing is deleted then."""
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


class Built(ABC):
    """The data of one recipe as files in a directory of the cache. Nothing is built before it is asked for."""

    @abstractmethod
    def build(self) -> Path:
        """Return the directory, built now if it is not there."""

    @cached_property
    def directory(self) -> Path:
        return self.build()

    @cached_property
    def meta(self) -> dict[str, Any]:
        return read_meta(self.directory)

    def array(self, name: str, shape: Iterable[int] | None = None) -> np.ndarray[Any, Any]:
        """Return the array of a ``.npy`` file. Raises :class:`DataError` where it is damaged, or of another shape."""
        path = self.directory / f"{name}.npy"
        array = read_array(path)
        with whole(path):
            if shape is not None and array.shape != tuple(shape):
                raise damaged(path)
        return array


class MappedData(Dataset[T]):
    """A data set over memory-mapped files. It is pickled as its arguments: a pickled map would be a full copy."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments


def read_meta(built: Path) -> dict[str, Any]:
    """Return what ``meta.json`` says. Raises :class:`DataError` where it is damaged."""
    with whole(built / META):
        meta: dict[str, Any] = json.loads((built / META).read_text(encoding="utf8"))
        if meta.keys():
            return meta
    raise damaged(built / META)


def write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write a ``.npy`` file as ``np.save`` does, which gives no reason where the disk is full."""
    with array_file(path, array.dtype, array.shape) as file:
        file.write(np.ascontiguousarray(array).data)


def array_file(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> IO[bytes]:
    """Open a ``.npy`` file to write the numbers into, in C order (a full disk kills a process that writes a map)."""
    file = path.open("wb")
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file


def read_array(path: Path) -> np.ndarray[Any, Any]:
    """Return a ``.npy`` file of the cache, memory-mapped. Raises :class:`DataError` where it is damaged."""
    with whole(path):
        array: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Around what reads a file of the cache: for any error, :class:`DataError` says that the file is damaged."""
    try:
        with reading(str(path)):
            yield
    except DataError as error:
        raise damaged(path) from error


def damaged(path: Path) -> DataError:
    """Return the error of a file of the cache that is not as it was written."""
    return DataError(f"{path}: damaged; delete {path.parent} and start again")
