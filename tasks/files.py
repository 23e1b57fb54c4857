"""Reading a user's files and the hub: which there are, and one clear line for whatever is wrong with them."""

import gzip
import os
import stat
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from caspr_cli.common.files import disk_error
from caspr_cli.recipe.schema import TaskConf
from caspr_cli.tasks.errors import DataError
from caspr_cli.tasks.names import is_ignored, refuse_unfinished

T = TypeVar("T")
LONGEST_LINE = 1 << 28  # bytes: more is no text, but a file that inflates without end

# ---- one boundary around every reader ------------------------------------------------------------------------------


@contextmanager
def reading(what: str | Callable[[], str], problem: str = "cannot be read") -> Iterator[None]:
    """Around whatever reads a user's data: any error comes out as one line, "``what`` ``problem`` (its reason)".

    ``what`` is the file and perhaps the line, or else the key that names the data; or a function that gives it. Raises
    OSError if the disk is full, or does not answer: the same command goes on when that is over. Raises DataError for
    every other error, which is its cause: in the log it shows a mistake of this program's own.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        name = what if isinstance(what, str) else what()
        if disk := disk_error(error):
            raise OSError(disk.errno, disk.strerror, disk.filename or name) from error
        raise DataError(f"{name} {problem} ({reason(error)})") from error


def reason(error: Exception) -> str:
    """Return an error in a few words on one line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = " ".join(str(error).split())[:300]
    if not words or isinstance(error, (LookupError, TypeError, AttributeError, AssertionError, ArithmeticError)):
        words = f"{type(error).__name__}: {words}".removesuffix(": ")  # they are meant for programmers
    return words


def result(steps: Generator[None, None, T]) -> T:
    """Take all steps of a reader, and return what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast(T, end.value)


@contextmanager
def reaching(what: str, instead: str) -> Iterator[None]:
    """Around every use of the hub, also where rows are streamed from it. Raises DataError if it cannot be reached.

    ``what`` is "the Hugging Face hub", or whose server it is; the second line of the message says what a user can do
    ``instead``. Raises OSError if the disk is full that it is fetched to.
    """
    try:
        yield
    except OSError as error:  # ConnectionError, and every error of huggingface_hub
        if disk_error(error):
            raise
        first = str(error).partition("\n")[0]
        raise DataError(f"{what} cannot be reached ({first})\n{instead}") from error


# ---- which files there are -----------------------------------------------------------------------------------------


def root_of(conf: TaskConf, holds: str) -> Path:
    """Return the directory ``task.root``; ``holds`` says for the message what should be in it."""
    if conf.root is None:
        raise DataError(f"task.root: task.data={conf.data.value} needs the directory of {holds}")
    root = Path(conf.root).expanduser()
    if not root.is_dir():
        raise DataError(f"task.root: no such directory: {conf.root} (it should hold {holds})")
    return root


def data_files(root: Path) -> list[Path]:
    """Return the files that the data at ``root`` consist of, in order of their paths; ``root`` itself if it is a file.

    See :func:`entries_below` for what is passed over, followed and refused.
    """
    if not root.is_dir():
        return [regular(root)]
    return [root / name for name in entries_below(root) if not name.endswith("/")]


def entries_below(root: Path, *, deep: bool = True) -> list[str]:
    """Return the sorted paths of all files and folders below a directory, relative to it; a folder's ends in a slash.

    Links are followed. Hidden files, backups and what systems leave are passed over (:mod:`caspr_cli.tasks.names`).
    Raises DataError if something is no file and no folder, a link leads nowhere or in a circle, a file was not fetched
    to its end, or a folder cannot be listed. ``deep``: it goes into folders.
    """
    found: list[str] = []

    def walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        with reading(str(folder)):
            here = (status := folder.stat()).st_dev, status.st_ino
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        if here in above:
            raise DataError(f"{folder}: is a link to a folder that it lies in")
        for entry in entries:
            if is_ignored(entry.name, folder=True):
                continue
            path = folder / entry.name
            if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and stat.S_ISDIR(mode_of(path))):
                found.append(f"{prefix}{entry.name}/")
                if deep:
                    walk(path, found[-1], above | {here})
            elif not is_ignored(entry.name):
                if not entry.is_file(follow_symlinks=False):
                    regular(path)
                refuse_unfinished(f"{prefix}{entry.name}")
                found.append(f"{prefix}{entry.name}")

    walk(root, "", frozenset())
    return sorted(found)


KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
         stat.S_IFDIR: "a folder"}  # fmt: skip


def mode_of(path: Path) -> int:
    """Return what kind of file this is, behind all links. Raises :class:`DataError` where a link leads nowhere."""
    with reading(str(path)):
        try:
            return path.stat().st_mode
        except (FileNotFoundError, RuntimeError) as error:
            if path.is_symlink():
                raise DataError(f"{path}: is a link to nowhere ({os.readlink(path)})") from error
            raise


def regular(path: Path) -> Path:
    """Return ``path``, if it is a file: whoever opens a pipe may wait for ever. Raises :class:`DataError`."""
    if not stat.S_ISREG(mode := mode_of(path)):
        raise DataError(f"{path}: is {KINDS.get(stat.S_IFMT(mode), 'no file')}, not a file")
    return path


def stamps(paths: Iterable[Path]) -> list[str]:
    """Return path, size and time of change of each file: strings that change when a file may have changed."""
    found = []
    for path in paths:
        with reading(str(path)):
            status = path.stat()
            found.append(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}")
    return found


# ---- text ----------------------------------------------------------------------------------------------------------


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number, from 1, and text of the lines of a file in UTF-8, gzipped where its name ends in ``.gz``.

    A byte order mark at its beginning is left out. Raises DataError, which names file and line, if the file is empty,
    truncated, damaged or no text.
    """
    number = 0
    regular(path)
    with (
        reading(lambda: f"{path.name}:{number + 1}:", "cannot be read from here on"),
        gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file,
    ):
        for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE), b""), start=1):
            if len(line) == LONGEST_LINE:
                raise DataError(f"{path.name}:{number}: a line of more than {LONGEST_LINE >> 20} MB")
            try:
                text = line.rstrip(b"\r\n").decode("utf8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path.name}:{number}: not UTF-8 ({error.reason})") from error
            yield number, text.removeprefix("\ufeff") if number == 1 else text
    if not number:
        raise DataError(f"{path.name}: is empty")
