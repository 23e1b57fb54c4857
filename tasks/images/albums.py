"""The images of one split, one at a time: from arrays, or from files."""

import io
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from caspr_cli.tasks.archives import Files
from caspr_cli.tasks.errors import DataError
from caspr_cli.tasks.files import reading

Array = np.ndarray[Any, Any]

LONGEST = 1000  # times an image may be as long as it is wide: a strip of a million pixels would fill the memory
SMALL = 64  # pixels a side, up to which whole images are not worth keeping, and larger crops neither


class ArrayAlbum:
    """Images in memory: uint8 ``[N, H, W]`` (grey) or ``[N, H, W, 3]``."""

    def __init__(self, images: Array, labels: Array) -> None:
        self._images = images
        self.labels = np.asarray(labels, np.int64)

    def image(self, index: int) -> Image.Image:
        """Return an image in RGB."""
        return Image.fromarray(self._images[index]).convert("RGB")


class FileAlbum:
    """Image files, opened when they are asked for: those of ``files`` that have the names ``names``."""

    def __init__(self, files: Files, names: list[str], labels: Array) -> None:
        self.names = names
        self.labels = np.asarray(labels, np.int64)
        self.files = files

    def image(self, index: int) -> Image.Image:
        """Return an image in RGB. Raises :class:`DataError` where it cannot be read."""
        name = self.names[index]
        where = f"{self.files.root.name}: {name}"
        with reading(where), self.files.open(name) as file:
            content = file.read()
        return decode(content, where)

    def size(self, index: int) -> int:
        """Return the number of bytes of the file."""
        return self.files.size(self.names[index])


Album = ArrayAlbum | FileAlbum


def decode(content: bytes, name: str) -> Image.Image:
    """Return an image file as RGB. Raises :class:`DataError`, which begins with ``name``, if it is no image."""
    # Pillow raises OSError for most, SyntaxError for a broken PNG, ValueError and others from inside its readers.
    with reading(name, "cannot be decoded"):
        try:
            image = Image.open(io.BytesIO(content))
        except UnidentifiedImageError as error:
            raise DataError(f"{name} {'is not an image' if content else 'is empty'}") from error
        with image:
            if image.mode.startswith(("I", "F")):  # Pillow would cut the values off at 255
                raise DataError(f"{name}: more than 8 bits a channel (mode {image.mode})")
            if max(image.size) > LONGEST * min(image.size):
                size = f"{image.width} x {image.height} pixels"
                raise DataError(f"{name}: {size}, a side more than {LONGEST} of the other")
            return image.convert("RGB")


def centred(image: Image.Image, size: int) -> Image.Image:
    """Return the square middle of an image, ``size`` pixels a side; of a large one 7/8 (224 of 256, as is usual)."""
    if image.size == (size, size):
        return image
    short = size if size <= SMALL else size * 8 // 7
    scale = short / min(image.size)
    wide, high = (max(short, round(side * scale)) for side in image.size)
    resized = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = (wide - size) // 2, (high - size) // 2
    return resized.crop((left, top, left + size, top + size))
