"""The images of a recipe as data sets: decoded once into arrays where they fit, else read file by file.

The cache (see :mod:`caspr_cli.tasks.cache`) has a directory for each source, size, and choice between whole images
and squares:

    images/<hash>/  meta.json, and of each split  <split>_labels.npy  with either
                    <split>.npy                     pixels, uint8 [N, size, size, 3], memory-mapped
                    <split>.json                    names of the files
"""

import hashlib
import json
import logging
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from caspr_cli.recipe.schema import Source
from caspr_cli.tasks import cache
from caspr_cli.tasks.archives import files_of
from caspr_cli.tasks.base import SPLITS, Split
from caspr_cli.tasks.files import reading
from caspr_cli.tasks.images.albums import SMALL, Album, Array, ArrayAlbum, FileAlbum, centred
from caspr_cli.tasks.images.augment import image_augmentation
from caspr_cli.tasks.images.sources import Found, pictures
from caspr_cli.tasks.registry import Augment, Images, ImagesConf

log = logging.getLogger("caspr")

FORMAT = 2  # of the files, and of the drawn shapes; raised when they change
LARGEST_BYTES = 4_000_000_000  # of pixels that are decoded ahead
CLASSES = {Images.cifar10: 10, Images.cifar100: 100, Images.fashion_mnist: 10, Images.imagenet: 1000}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's

Sample = tuple[Tensor, int]


class Decoded(cache.MappedData[Sample]):
    """Images that were decoded ahead: uint8 tensors ``[size, size, 3]``, each with its label."""

    def __init__(self, pixels: Path, labels: Path) -> None:
        super().__init__(pixels, labels)
        self._pixels, self._labels = cache.read_array(pixels), cache.read_array(labels)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Sample:
        return torch.from_numpy(self._pixels[index].copy()), int(self._labels[index])


class Opened(Dataset[Sample]):
    """Images of an album, opened when they are read, and made square by ``change``: as :class:`Decoded`."""

    def __init__(self, album: Album, change: Callable[[Image.Image], Image.Image]) -> None:
        self._album, self._change = album, change
        self.reading_costs = isinstance(album, FileAlbum)  # a file is decoded for each sample

    def __len__(self) -> int:
        return len(self._album.labels)

    def __getitem__(self, index: int) -> Sample:
        image = self._change(self._album.image(index))
        return torch.from_numpy(np.array(image)), int(self._album.labels[index])


class Gallery(cache.Built):
    def __init__(self, conf: ImagesConf) -> None:
        self._conf = conf
        # A random crop of an image wants all of it, unless the whole is hardly larger.
        self._whole = conf.augment in (Augment.imagenet, Augment.rand_augment) and conf.size > SMALL

    @reading("task.data: the images")
    def build(self) -> Path:
        source = pictures(self._conf)
        settings = [f"format {FORMAT}", f"size {self._conf.size}", f"whole {self._whole}"]
        built = cache.cache_root("images") / cache.digest([*source.identity(), *settings])
        return cache.build_once(built, lambda aside: {"data": source.name} | self._write(source.load(aside), aside))

    @property
    def classes(self) -> int:
        """The number of classes. Where the data set fixes it, no file is read for it."""
        known = None if self._conf.data is Source.sample else CLASSES.get(self._conf.images)
        return known or len(self.meta["classes"])

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the training split, float ``[3]``, where white is 1."""
        return torch.tensor(self.meta["mean"]), torch.tensor(self.meta["std"])

    def _write(self, found: Found, aside: Path) -> dict[str, Any]:
        counts = {split: len(found.albums[split].labels) for split in SPLITS}
        content = hashlib.sha256(json.dumps(found.classes).encode())
        for split in SPLITS:
            labels = found.albums[split].labels
            cache.write_array(aside / f"{split}_labels.npy", labels)
            content.update(labels.astype("<i8").tobytes())
        sizes = {split: {"images": count} for split, count in counts.items()}
        meta: dict[str, Any] = {"classes": found.classes, "splits": sizes}
        size = self._conf.size
        in_memory = all(isinstance(album, ArrayAlbum) for album in found.albums.values())
        fits = size <= SMALL or 3 * size**2 * sum(counts.values()) <= LARGEST_BYTES
        if in_memory or (fits and not self._whole):
            log.info("decoding %d images", sum(counts.values()))
            for split in SPLITS:
                pixels = _decode(found.albums[split], size, aside / f"{split}.npy")
                content.update(pixels.data)
                if split == "train":
                    meta["mean"], meta["std"] = _moments(pixels)
        else:
            meta["mean"], meta["std"] = IMAGENET_MEAN, IMAGENET_STD
            for split in SPLITS:
                album = found.albums[split]
                assert isinstance(album, FileAlbum)
                (aside / f"{split}.json").write_text(json.dumps(album.names), encoding="utf8")
                listed = "\n".join(f"{name} {album.size(i)}" for i, name in enumerate(album.names))
                content.update(listed.encode("utf8", "surrogateescape"))  # names are bytes, in whatever encoding
        return meta | {"hash": content.hexdigest()[:16]}

    def check(self) -> None:
        """Raise :class:`DataError` unless all files are there, with the sizes they were written with."""
        with cache.whole(self.directory / cache.META):
            counts = {split: self.meta["splits"][split]["images"] for split in SPLITS}
        for split, count in counts.items():
            self.array(f"{split}_labels", (count,))
            if not self._names(split).is_file():
                self.array(split, (count, self._conf.size, self._conf.size, 3))

    def _names(self, split: Split) -> Path:
        return self.directory / f"{split}.json"

    def dataset(self, split: Split) -> Dataset[Sample]:
        """Return the data set of a split; raises as :meth:`check`."""
        self.check()
        change = image_augmentation(self._conf.augment, self._conf.size) if split == "train" else None
        labels = self.array(f"{split}_labels")
        if not self._names(split).is_file():
            if change is None:
                return Decoded(self.directory / f"{split}.npy", self.directory / f"{split}_labels.npy")
            return Opened(ArrayAlbum(self.array(split), labels), change)
        with cache.whole(self._names(split)):
            names = json.loads(self._names(split).read_text(encoding="utf8"))
            if len(names) != len(labels):
                raise cache.damaged(self._names(split))
        album = FileAlbum(files_of(Path(str(self._conf.root)).expanduser()), names, labels)
        return Opened(album, change or partial(centred, size=self._conf.size))

    def describe(self) -> dict[str, Any]:
        """Return also the number of classes."""
        found = {"name": self.meta["data"], "source": self._conf.data.value, "hash": self.meta["hash"]}
        return found | {"classes": self.classes, "splits": self.meta["splits"]}


def _decode(album: Album, size: int, path: Path) -> Array:
    """Write all images of an album as one array ``[N, size, size, 3]``, and return it, memory-mapped."""
    with cache.array_file(path, np.dtype(np.uint8), (len(album.labels), size, size, 3)) as file:
        for i in range(len(album.labels)):
            file.write(np.asarray(centred(album.image(i), size)).tobytes())
    return cache.read_array(path)


def _moments(pixels: Array) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel over ``[N, H, W, 3]``, where white is 1."""
    counts = np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)])  # [3, 256]
    share = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = share @ values
    # an image without any contrast is divided by one step of 8 bits
    std = np.sqrt(np.maximum(share @ values**2 - mean**2, 1 / 255**2))
    return mean.tolist(), std.tolist()
