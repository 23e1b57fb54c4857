"""Where the images come from: drawn shapes, folders or a zip of files, torchvision's data sets on disk or fetched.

A source gives the images of each split as an :class:`~caspr_cli.tasks.images.albums.Album`, and an *identity*: cheap
strings that change when the images may have changed. Where there is no validation split, a tenth of each class of the
training split becomes one; where there is no test split (ImageNet publishes no labels of it), the validation split
serves as test.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from caspr_cli.recipe.schema import Source
from caspr_cli.tasks.archives import files_of
from caspr_cli.tasks.errors import DataError
from caspr_cli.tasks.files import data_files, entries_below, root_of, stamps
from caspr_cli.tasks.images.albums import Album, Array, ArrayAlbum, FileAlbum
from caspr_cli.tasks.images.shapes import SHAPES, draw
from caspr_cli.tasks.names import SPLIT_NAMES, SPLITS, Split, call_split, resembles_split, split_named
from caspr_cli.tasks.registry import Images, ImagesConf

log = logging.getLogger("caspr")

SAMPLE: dict[Split, int] = {"train": 24_000, "validation": 2_000, "test": 2_000}  # images
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision has them
HELD_OUT = 0.1  # of each class, for validation where a data set has none
LAYOUT = "train/<class>/<image>, test/<class>/<image> and perhaps validation/<class>/<image>; or <class>/<image> alone"
EXTRACT = (
    "unpack its tars, as torchvision.datasets.ImageNet(DIR, 'train') and (DIR, 'val') do, "
    "into DIR/train/<wnid>/*.JPEG and DIR/val/<wnid>/*.JPEG"
)


@dataclass(frozen=True)
class Found:
    """The classes of a source in the order of their labels, and an album for each split."""

    classes: list[str]
    albums: dict[Split, Album]


class Pictures(Protocol):
    name: str

    def identity(self) -> list[str]:
        """Return strings that change whenever the images may have changed. Opens no image."""

    def load(self, aside: Path) -> Found:
        """Return the images. ``aside`` is a directory for what they need on disk while they are read."""


def pictures(conf: ImagesConf) -> Pictures:
    """Return the source that ``conf.data`` and ``conf.images`` name. Raises :class:`DataError` if there is none."""
    if conf.data is Source.sample:
        return Shapes()
    if conf.images is Images.folder:
        if conf.data is Source.hub:
            raise DataError("task.images=folder: is on no hub; take task.data=files task.root=DIR")
        return Folder(conf)
    if conf.images is Images.imagenet:
        if conf.data is Source.hub:
            raise DataError(
                "task.images=imagenet: has to be fetched by hand (image-net.org, after registration)\n"
                f"then {EXTRACT}, and take task.data=files task.root=DIR"
            )
        return ImageNet(conf)
    from caspr_cli.tasks.images.published import Published  # imports torch

    return Published(conf)


def hold_out(labels: Array) -> tuple[Array, Array]:
    """Return indices to train on and indices to validate on, a tenth of each class (at least one), in order.

    The choice depends on the labels alone. Raises :class:`DataError` where a class has a single image.
    """
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        if len(of_class) < 2:
            raise DataError(f"task.root: class number {label} has one training image, none to hold out for validation")
        count = max(1, round(HELD_OUT * len(of_class)))
        chosen[np.random.default_rng(int(label)).permutation(of_class)[:count]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def samples(conf: ImagesConf) -> Iterator[None]:
    """Read the user's own folders, an image at each step. Raises :class:`DataError` as the sources."""
    if conf.images is Images.folder:
        for album in pictures(conf).load(Path()).albums.values():
            for index in range(len(album.labels)):
                album.image(index)
                yield


# ---- sample: shapes ----------------------------------------------------------------------------------------------


class Shapes:
    """Ten drawn shapes, see :mod:`caspr_cli.tasks.images.shapes`."""

    name = "shapes"

    def identity(self) -> list[str]:
        return [self.name, str(SAMPLE)]  # what changes the drawing raises FORMAT in caspr_cli.tasks.images.data

    def load(self, aside: Path) -> Found:
        albums = {split: ArrayAlbum(*draw(count, seed)) for seed, (split, count) in enumerate(SAMPLE.items())}
        return Found(list(SHAPES), dict(albums))  # after some six seconds


# ---- files: folders and zips -------------------------------------------------------------------------------------


class Folder:
    """Image files in folders by split and class, in a directory or a zip (there also below a single top folder)."""

    name = "folder"
    holds = LAYOUT

    def __init__(self, conf: ImagesConf) -> None:
        given = None if conf.root is None else Path(conf.root).expanduser()
        self._root = given if given and given.is_file() else root_of(conf, self.holds)

    def identity(self) -> list[str]:
        return [self.name, *stamps(data_files(self._root))]

    def load(self, aside: Path) -> Found:
        log.info("listing the images in %s", self._root)
        files = files_of(self._root)
        found = sort_out(files.names(), self._root.name)
        labels = {name: label for label, name in enumerate(sorted(found["train"]))}
        albums: dict[Split, FileAlbum] = {}
        for split, groups in found.items():
            named = [(name, labels[group]) for group in sorted(groups) for name in groups[group]]
            albums[split] = FileAlbum(files, [name for name, _ in named], np.array([label for _, label in named]))
        if "validation" not in albums:
            train = albums["train"]
            albums["train"], albums["validation"] = (
                FileAlbum(files, [train.names[i] for i in chosen], train.labels[chosen])
                for chosen in hold_out(train.labels)
            )
        return Found(list(labels), dict(albums))


Groups = dict[str, list[str]]  # the names of the images of each class


def sort_out(entries: list[str], where: str) -> dict[Split, Groups]:
    """Return the image files of each split and class, where "validation" may be missing.

    The paths ``entries``, of which those of folders end in a slash, lie in ``where``. Raises DataError, which names the
    file or folder, if they have no such layout.
    """
    paths = [entry.split("/") for entry in entries]
    tops = {parts[0] for parts in paths if len(parts) > 1}
    depth = 1 if len(tops) == 1 and not any(map(split_named, tops)) else 0  # the folder that was zipped
    splits, others = _in_splits(paths, depth, where)
    for top, count in others.items():
        if count and resembles_split(top.rpartition("/")[2]):
            known = ", ".join(SPLIT_NAMES)
            raise DataError(f"{where}: {top} is no name of a split (they are {known}); rename or remove it")
        if count and splits:
            log.info("left out: %d images in %s, which is no split", count, f"the folder {top}" if top else where)
    if not splits:
        splits = _divided([parts for parts in paths if len(parts) == depth + 2], depth, where)
    if not splits and any(len(parts) == 2 and parts[1].lower().endswith(EXTENSIONS) for parts in paths):
        raise DataError(f"{where}: one class alone ({next(iter(tops))}), there is nothing to tell apart")
    if "train" not in splits:
        raise DataError(f"task.root: no folder train in {where}; the layout is {LAYOUT}")
    if "test" not in splits:
        if "validation" not in splits:
            raise DataError(f"task.root: no folder test (nor validation) in {where}; the layout is {LAYOUT}")
        splits["test"] = splits.pop("validation")
    for split, groups in splits.items():
        _check_classes(split, groups, set(splits["train"]), where)
    return {split: splits[split] for split in SPLITS if split in splits}


def _in_splits(paths: list[list[str]], depth: int, where: str) -> tuple[dict[Split, Groups], Counter[str]]:
    """Return the images of each split that has a folder, and how many images lie in each other folder, or in none."""
    folders: dict[Split, str] = {}  # of each split
    splits: dict[Split, Groups] = {}
    others: Counter[str] = Counter()
    for parts in paths:
        inner = parts[depth:]
        name = "/".join(parts)
        is_image = name.lower().endswith(EXTENSIONS)
        split = split_named(inner[0]) if len(inner) > 1 else None
        if not split:  # or a README beside the splits
            others["/".join(parts[: depth + 1]) if len(inner) > 1 else ""] += is_image
            continue
        top, group, *rest = inner
        call_split(folders, split, top, where)
        groups = splits.setdefault(split, {})
        if not rest and group:
            raise DataError(f"{where}: {name} lies in no folder of a class; the layout is {LAYOUT}")
        files = groups.setdefault(group, []) if group else []
        if rest and rest[-1]:
            if not is_image:
                raise DataError(f"{where}: {name} is not an image ({', '.join(EXTENSIONS)})")
            files.append(name)
    return splits, others


def _divided(paths: list[list[str]], depth: int, where: str) -> dict[Split, Groups]:
    """Return the images of folders of classes in splits: a tenth of each class is for validation, a tenth for test.

    Which images these are depends on the hashes of their names alone.
    """
    groups: Groups = {}
    for parts in paths:
        if parts[-1].lower().endswith(EXTENSIONS):
            groups.setdefault(parts[depth], []).append("/".join(parts))
    splits: dict[Split, Groups] = {}
    for group, files in sorted(groups.items()):
        if len(files) < 3:
            raise DataError(f"{where}: the class {group!r} has fewer than 3 images, one for each split")
        order = sorted(files, key=lambda name: hashlib.sha256(name.rpartition("/")[2].encode()).digest())
        held = max(1, round(HELD_OUT * len(files)))
        for split, chosen in zip(SPLITS, (order[2 * held :], order[:held], order[held : 2 * held]), strict=True):
            splits.setdefault(split, {})[group] = sorted(chosen)
    return splits


def _check_classes(split: str, groups: Groups, classes: set[str], where: str) -> None:
    if not any(groups.values()):
        raise DataError(f"{where}: no images in the {split} split")
    for group, files in groups.items():
        if group not in classes:
            raise DataError(f"{where}: the {split} split has the class {group!r}, which the training split has not")
        if not files:
            raise DataError(f"{where}: no images of the class {group!r} in the {split} split")
    for missing in sorted(classes - set(groups)):
        raise DataError(f"{where}: the {split} split has no folder of the class {missing!r}")
    if len(classes) < 2:
        raise DataError(f"{where}: one class alone ({', '.join(classes)}), there is nothing to tell apart")


class ImageNet(Folder):
    """ImageNet 2012 as ``torchvision.datasets.ImageNet`` unpacks it: folders by WordNet number, labels in their order.

    torchvision itself is not asked: it would unpack 150 GB into the user's directory, in every process at once.
    """

    name = "imagenet"
    holds = "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG"

    def __init__(self, conf: ImagesConf) -> None:
        self._root = root_of(conf, self.holds)
        entries = entries_below(self._root, deep=False)
        named = {split_named(entry[:-1]): entry for entry in entries if entry.endswith("/")}
        for split, name in (("train", "train"), ("validation", "val")):
            if split not in named:
                raise DataError(f"task.root: no folder {name} in {conf.root}\n{EXTRACT}")
        self._folders = [self._root / named["train"], self._root / named["validation"]]

    def identity(self) -> list[str]:
        # of folders alone: there are a thousand of them, and a million files
        classes = [folder / name for folder in self._folders for name in entries_below(folder, deep=False)]
        return [self.name, *stamps(classes)]
