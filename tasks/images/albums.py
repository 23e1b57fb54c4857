"""The images of one split, one at a time: from arrays, from files, or from the members of a zip."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from tasks.base import DataError

Array = np.ndarray[Any, Any]

SMALL = 64  # pixels a side, up to which whole images are not worth keeping, and larger crops neither


class Album(Protocol):
    """Images with their labels."""

    labels: Array  # [N], int64

    def image(self, index: int) -> Image.Image:
        """In RGB. Raises :class:`DataError` where it cannot be read."""


class ArrayAlbum:
    """Images in memory: uint8 ``[N, H, W]`` (grey) or ``[N, H, W, 3]``."""

    def __init__(self, images: Array, labels: Array) -> None:
        self._images = images
        self.labels = np.asarray(labels, np.int64)

    def image(self, index: int) -> Image.Image:
        """See :class:`Album`."""
        return Image.fromarray(self._images[index]).convert("RGB")


class FileAlbum:
    """Image files, opened when they are asked for.

    Args:
        root: a directory, or a zip.
        names: paths below ``root``, or names of members.
    """

    def __init__(self, root: Path, names: list[str], labels: Array) -> None:
        self.names = names
        self.labels = np.asarray(labels, np.int64)
        self._root = root
        self._zips: dict[int, zipfile.ZipFile] = {}

    def image(self, index: int) -> Image.Image:
        """See :class:`Album`."""
        name = self.names[index]
        try:
            content = self._zip().read(name) if self._root.is_file() else (self._root / name).read_bytes()
        # RuntimeError: a member with a password; NotImplementedError: an odd compression
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise DataError(f"{self._root.name}: {name} cannot be read ({error})") from error
        return decode(content, f"{self._root.name}: {name}")

    def size(self, index: int) -> int:
        """Bytes of the file."""
        name = self.names[index]
        return self._zip().getinfo(name).file_size if self._root.is_file() else (self._root / name).stat().st_size

    def _zip(self) -> zipfile.ZipFile:
        # One handle a process: a forked one would move its parent's place in the file.
        pid = os.getpid()
        if pid not in self._zips:
            self._zips = {pid: zipfile.ZipFile(self._root)}
        return self._zips[pid]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_zips": {}}  # an open file has no pickle


def decode(content: bytes, name: str) -> Image.Image:
    """An image file as RGB. Raises :class:`DataError`, which begins with ``name``, where it is none."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would cut the values off at 255
                raise DataError(f"{name}: more than 8 bits a channel (mode {image.mode})")
            return image.convert("RGB")
    # Pillow raises OSError for most, SyntaxError for a broken PNG, ValueError and others from inside its readers.
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"{name} cannot be decoded ({reason})") from error


def centred(image: Image.Image, size: int) -> Image.Image:
    """The square middle of an image, ``size`` pixels a side; of a large one 7/8 (224 of 256, as is usual)."""
    if image.size == (size, size):
        return image
    short = size if size <= SMALL else size * 8 // 7
    scale = short / min(image.size)
    wide, high = (max(short, round(side * scale)) for side in image.size)
    resized = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = (wide - size) // 2, (high - size) // 2
    return resized.crop((left, top, left + size, top + size))
