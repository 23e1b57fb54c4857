"""CIFAR-10, CIFAR-100 and Fashion-MNIST, as torchvision has them on disk or fetches them."""

import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from caspr_cli.recipe.schema import Source
from caspr_cli.tasks.errors import DataError
from caspr_cli.tasks.files import reaching, reading, root_of, stamps
from caspr_cli.tasks.images.albums import Array, ArrayAlbum
from caspr_cli.tasks.images.sources import Found, hold_out
from caspr_cli.tasks.registry import Images, ImagesConf

log = logging.getLogger("caspr")

PUBLISHED: dict[Images, Callable[..., Any]] = {
    Images.cifar10: datasets.CIFAR10,
    Images.cifar100: datasets.CIFAR100,
    Images.fashion_mnist: datasets.FashionMNIST,
}


class Published:
    """CIFAR-10, CIFAR-100 or Fashion-MNIST: files as torchvision leaves them, or fetched by it."""

    def __init__(self, conf: ImagesConf) -> None:
        self.name = conf.images.value
        self._class: Any = PUBLISHED[conf.images]
        self._root: Path | None = None
        if conf.data is Source.files:
            self._root = root_of(conf, f"the files of torchvision.datasets.{self._class.__name__}")

    def identity(self) -> list[str]:
        if self._root is None:
            return [self.name]  # what was fetched once serves without a network
        return [self.name, *stamps(path for path, _ in self._files(self._root))]

    def load(self, aside: Path) -> Found:
        if self._root is not None:
            return self._read(self._root)
        with TemporaryDirectory(dir=aside) as fetched:
            self._fetch(fetched)
            return self._read(Path(fetched))

    def _fetch(self, root: str) -> None:
        log.info("fetching %s", self.name)
        instead = "take task.data=sample, or task.data=files task.root=DIR with the files of torchvision in DIR"
        with reaching(f"the server of {self.name}", instead):
            try:
                self._class(root, download=True)
            except RuntimeError as error:  # a wrong md5, or, of Fashion-MNIST, every mirror failed
                reason = " ".join(str(error).split())
                if "corrupted" in reason:
                    raise DataError(f"{self.name}: what came from its server has another md5 than it should") from error
                raise ConnectionError(reason) from error

    def _files(self, root: Path) -> list[tuple[Path, str | None]]:
        """Return the files that torchvision reads, with their md5 where it knows one; raises where one is missing."""
        name = self._class.__name__
        found: list[tuple[Path, str | None]]
        if self._class is datasets.FashionMNIST:  # torchvision knows the md5 of the packed files alone
            found = [(root / name / "raw" / packed.removesuffix(".gz"), None) for packed, _ in self._class.resources]
        else:
            meta = [self._class.meta["filename"], self._class.meta["md5"]]
            members = [*self._class.train_list, *self._class.test_list, meta]
            found = [(root / self._class.base_folder / file, md5) for file, md5 in members]
        for path, _ in found:
            if not path.is_file():
                where = f"{root} (unpacked, as torchvision's {name} leaves it)"
                raise DataError(f"task.root: no {path.relative_to(root)} in {where}")
        return found

    def _read(self, root: Path) -> Found:
        for path, md5 in self._files(root):
            if md5 and not check_integrity(path, md5):
                raise DataError(f"{path.name}: has another md5 than it should; fetch {self.name} again")
        images, labels, classes = self._part(root, train=True)
        test_images, test_labels, _ = self._part(root, train=False)
        train, validation = hold_out(labels)
        kept, held = (ArrayAlbum(images[chosen], labels[chosen]) for chosen in (train, validation))
        return Found(classes, {"train": kept, "validation": held, "test": ArrayAlbum(test_images, test_labels)})

    def _part(self, root: Path, *, train: bool) -> tuple[Array, Array, list[str]]:
        """Return images, labels ``[N]`` and the names of the classes of a split."""
        of_it = ("train", "data_batch") if train else ("t10k", "test")
        where = ", ".join(path.name for path, _ in self._files(root) if path.name.startswith(of_it))
        with reading(f"{where}:", f"these are not the files of {self.name}"):  # whatever their reader makes of others
            part = self._class(str(root), train=train, download=False)
            images, labels, classes = np.asarray(part.data), np.asarray(part.targets, np.int64), list(part.classes)
        if len(images) != len(labels) or not images.size:
            raise DataError(f"{where}: {len(images)} images and {len(labels)} labels")
        if labels.max() >= len(classes):
            raise DataError(f"{where}: label {labels.max()}, but {self.name} has {len(classes)} classes, from 0 on")
        return images, labels, classes
