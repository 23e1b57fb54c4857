"""The files of a data set, whether they lie in a directory or in a zip, by one kind of name: ``train/cat/1.png``."""

import os
import re
import stat
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from caspr_cli.tasks.errors import DataError
from caspr_cli.tasks.files import entries_below, reading, regular
from caspr_cli.tasks.names import is_ignored, refuse_unfinished

ENCRYPTED, IN_UTF8 = 0x1, 0x800  # flags of a member
# What Python unpacks; zstandard since 3.14.
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA,
           getattr(zipfile, "ZIP_ZSTANDARD", zipfile.ZIP_STORED)}  # fmt: skip


class Folder:
    """The files of a directory, by their names relative to it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """Return the names of all files and folders, see :func:`caspr_cli.tasks.files.entries_below`."""
        return entries_below(self.root)

    def open(self, name: str) -> IO[bytes]:
        """Open a file to read it. Errors are those of the library; use :func:`caspr_cli.tasks.files.reading`."""
        return regular(self.root / name).open("rb")

    def size(self, name: str) -> int:
        return (self.root / name).stat().st_size


class Zip:
    """The files of a zip, with the methods of :class:`Folder`. Each process opens it once, on first use."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # One handle a process: a forked one would move its parent's place in the file.
        self._opened: dict[int, tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]] = {}

    def names(self) -> list[str]:
        with reading(f"task.root: {self.root.name}", "is neither a directory nor a zip that can be read"):
            return sorted(self._open()[1])

    def open(self, name: str) -> IO[bytes]:
        file, members = self._open()
        return file.open(members[name])

    def size(self, name: str) -> int:
        return self._open()[1][name].file_size

    def _open(self) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
        pid = os.getpid()
        if pid not in self._opened:
            file = zipfile.ZipFile(regular(self.root))
            self._opened = {pid: (file, _members(file, self.root.name))}
        return self._opened[pid]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}  # an open file has no pickle


Files = Folder | Zip


def files_of(root: Path) -> Files:
    """Return the files of a directory or a zip. Raises :class:`DataError` where it is neither."""
    return Folder(root) if root.is_dir() else Zip(root)


def _members(file: zipfile.ZipFile, where: str) -> dict[str, zipfile.ZipInfo]:
    """Return the members by their names. Raises :class:`DataError` for one that cannot be unpacked, or is no file."""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in file.infolist():
        name = member_name(info)
        parts = [part for part in name.split("/") if part not in ("", ".")]
        folder = name.endswith("/")
        if name.startswith("/") or re.match("[A-Za-z]:", name) or ".." in parts:
            raise DataError(f"{where}: {name} is a path that leads out of the zip")
        if not parts or any(is_ignored(part, folder=folder or i < len(parts) - 1) for i, part in enumerate(parts)):
            continue
        path = "/".join(parts)
        if folder:
            found.setdefault(f"{path}/", info)
            continue
        refuse_unfinished(f"{where}: {path}")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(f"{where}: {path} is a link; pack the file that it leads to")
        if info.flag_bits & ENCRYPTED:
            raise DataError(f"{where}: {path} is encrypted; unpack it with its password, and pack it without")
        if info.compress_type not in METHODS:
            raise DataError(f"{where}: {path} is compressed by method {info.compress_type}; pack it by deflate")
        if path in found:
            raise DataError(f"{where}: {path} is in it twice")
        found[path] = info
    return found


def member_name(info: zipfile.ZipInfo) -> str:
    """Return the name of a member with slashes, whoever packed it; a folder's ends in one.

    Names are in UTF-8 where a flag says so. Without the flag they should be in code page 437, but macOS and older
    programs on Linux write UTF-8 then, too: what is valid UTF-8 is taken for it. Some programs on Windows write
    backslashes between folders.
    """
    name = info.filename
    if not info.flag_bits & IN_UTF8:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf8")
    return name if "/" in name else name.replace("\\", "/")
