"""Reading a user's files: one clear line, with file and line, for whatever is wrong with them."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from caspr_cli.recipe.schema import TaskConf
from tasks.base import DataError


def root_of(conf: TaskConf, holds: str) -> Path:
    """The directory ``task.root``.

    Args:
        holds: what should be in it, for the message: "the *.conllu files of a treebank".
    """
    if conf.root is None:
        raise DataError(f"task.root: task.data={conf.data.value} needs the directory of {holds}")
    root = Path(conf.root).expanduser()
    if not root.is_dir():
        raise DataError(f"task.root: no such directory: {conf.root} (it should hold {holds})")
    return root


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file in UTF-8, gzipped where its name ends in ``.gz``, without their ends, from number 1.

    Raises:
        DataError: the file is truncated, damaged or no text; the message names the file and the line.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.rstrip(b"\r\n").decode("utf8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}:{number}: not UTF-8 ({error.reason})") from error
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path.name}:{number + 1}: cannot be read from here on ({error})") from error


def stamps(paths: Iterable[Path]) -> list[str]:
    """Path, size and time of change of each file: strings that change when a file may have changed."""
    return [f"{path.resolve()} {(stat := path.stat()).st_size} {stat.st_mtime_ns}" for path in paths]
