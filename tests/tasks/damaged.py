"""Small data sets, one for each reader, and damage to them."""

import gzip
import os
import shutil
import socket
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from written import write_fashion, write_image, write_molecules, write_shards, write_treebank

from caspr_cli import tasks
from caspr_cli.recipe.schema import Source, TaskConf
from caspr_cli.tasks import registry
from caspr_cli.tasks.base import SPLITS, Task
from caspr_cli.tasks.registry import Augment, Images

Damage = Callable[[Path], Any]

# ---- small data sets, one for each reader ----------------------------------------------------------------------------


def write_images(root: Path) -> None:
    for split, count in (("train", 4), ("test", 2)):
        for shade, name in enumerate(("cat", "dog")):
            for i in range(count):
                write_image(root / split / name / f"{i}.png", 10 * shade + i)


def members(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.png"))}


def write_zip(root: Path) -> None:
    """Here ``root`` is the zip itself."""
    write_images(root.with_name("folder"))
    pack(root, members(root.with_name("folder")))


def pack(path: Path, content: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)


def write_ogb_zip(root: Path) -> None:
    """Here ``root`` is the zip itself."""
    top = write_molecules(root.with_name("pcba"))
    pack(root, {f"pcba/{f.relative_to(top).as_posix()}": f.read_bytes() for f in sorted(top.rglob("*.gz"))})


READERS: dict[str, tuple[Callable[[Path], Any], str, dict[str, Any]]] = {
    # how it is written, its task, and the keys of a small recipe
    "c4": (write_shards, "c4_lm", {"vocab_size": 300, "sequence": 16, "layers": 1, "width": 16, "heads": 2}),
    "ud": (partial(write_treebank, code="xx_a"), "ud_pos", {"layers": 1, "width": 16, "heads": 2}),
    "images": (write_images, "resnet", {"images": Images.folder, "size": 8}),
    "zip": (write_zip, "resnet", {"images": Images.folder, "size": 8}),
    "opened": (write_images, "resnet", {"images": Images.folder, "size": 72, "augment": Augment.imagenet}),
    "imagenet": (write_images, "vit", {"images": Images.imagenet, "size": 8, "patch": 4, "width": 16, "heads": 2}),
    "fashion": (write_fashion, "resnet", {"images": Images.fashion_mnist, "size": 28}),
    "ogb": (write_molecules, "ogbg_molpcba", {"width": 8, "steps": 1}),
    "ogb_zip": (write_ogb_zip, "ogbg_molpcba", {"width": 8, "steps": 1}),
}


def written(reader: str, tmp_path: Path) -> Path:
    """The data of a reader, whole."""
    root = tmp_path / ("data.zip" if reader.endswith("zip") else "data")
    READERS[reader][0](root)
    return root


def conf_of(reader: str, root: Path | str | None, **changes: Any) -> TaskConf:
    _, name, small = READERS[reader]
    return registry.CONFS[name](
        **{"data": Source.files, "root": root and str(root), "batch_size": 2, **small, **changes}
    )


def read(reader: str, root: Path | str | None, **changes: Any) -> tuple[Task, dict[str, list[Any]]]:
    """All that a run reads, as it reads it."""
    task = tasks.load(conf_of(reader, root, **changes), 0)
    task.prepare()
    found: dict[str, list[Any]] = {}
    for split in SPLITS:
        data: Any = task.dataset(split)
        found[split] = [data[i] for i in range(len(data))]
    return task, found


# ---- what is refused -----------------------------------------------------------------------------------------------

TRAIN, SECOND, HELD_OUT = (f"c4-{name}.json.gz" for name in
                           ("train.00000-of-00002", "train.00001-of-00002", "validation.00000-of-00001"))  # fmt: skip


def put(name: str, content: bytes, *, packed: bool = False) -> Damage:
    return lambda root: (root / name).write_bytes(gzip.compress(content) if packed else content)


def change(name: str, edit: Callable[[bytes], bytes]) -> Damage:
    return lambda root: (root / name).write_bytes(edit((root / name).read_bytes()))


def cut(name: str) -> Damage:
    return change(name, lambda content: content[: len(content) * 2 // 3])


def instead(name: str, make: Callable[[Path], Any]) -> Damage:
    """Put something of another kind where a file or folder is."""

    def damage(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        make(path)

    return damage


def listen(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def rename(name: str, to: str) -> Damage:
    return lambda root: (root / name).rename(root / to)


def remove(*names: str) -> Damage:
    return lambda root: [shutil.rmtree(root / n) if (root / n).is_dir() else (root / n).unlink() for n in names]


def copy(name: str, to: str) -> Damage:
    return lambda root: shutil.copytree(root / name, root / to)


def nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


def repacked(edit: Callable[[dict[str, bytes]], Any]) -> Damage:
    def damage(root: Path) -> None:
        content = members(root.with_name("folder"))
        edit(content)
        pack(root, content)

    return damage


def with_info(**fields: Any) -> Damage:
    """The first member's entry in the zip's list, changed."""

    def damage(root: Path) -> None:
        content = members(root.with_name("folder"))
        with zipfile.ZipFile(root, "w") as file:
            for name, data in content.items():
                file.writestr(name, data)
            for key, value in fields.items():
                setattr(file.infolist()[0], key, value)

    return damage


def spoilt(name: str) -> Damage:
    """Bytes of a member changed, where they lie in the zip."""

    def damage(root: Path) -> None:
        content = (root.with_name("folder") / name).read_bytes()
        root.write_bytes(root.read_bytes().replace(content[60:70], bytes(10)))

    return damage


def twice(root: Path) -> None:
    with zipfile.ZipFile(root, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr(file.namelist()[0], b"no image")


def idx(name: str, at: int, value: int) -> Damage:
    return change(f"FashionMNIST/raw/{name}", lambda c: c[:at] + bytes([value]) + c[at + 1 :])


def encrypted(root: Path) -> None:
    with zipfile.ZipFile(root, "a") as file:
        file.infolist()[0].flag_bits |= 1
        file.writestr("x", b"")  # so that the list is written anew


DAMAGED: dict[str, list[tuple[str, Damage, str]]] = {
    "c4": [
        ("empty", put(SECOND, b""), rf"^{SECOND}: is empty$"),
        ("empty-inside", put(SECOND, b"", packed=True), rf"^{SECOND}: is empty$"),
        ("blank", put(HELD_OUT, b"\n\n", packed=True), rf"^{HELD_OUT}:1: not JSON"),
        ("cut", cut(TRAIN), rf"^{TRAIN}:\d+: cannot be read from here on \(.*end-of-stream"),
        ("no-gzip", put(TRAIN, b"plain"), rf"^{TRAIN}:1: cannot be read from here on \(Not a gzipped file"),
        ("rubbish-behind", change(TRAIN, lambda c: c + b"rubbish"), rf"^{TRAIN}:41: cannot be read from here on \(Not"),
        ("nul", put(TRAIN, b'{"text": "a\0b"}\n', packed=True), rf"^{TRAIN}:1: not JSON"),
        ("utf16", put(TRAIN, '{"text": "a"}'.encode("utf16"), packed=True), rf"^{TRAIN}:1: not UTF-8"),
        ("deep", put(TRAIN, b'{"text": "a", "b": ' + b"[" * 100_000 + b"\n", packed=True),
         rf"^{TRAIN}:1: brackets nested too deeply$"),
        ("number", put(TRAIN, b"9" * 5000 + b"\n", packed=True), rf"^{TRAIN}:1: not JSON"),
        *((f"line-{line}", put(TRAIN, b'{"text": "fine"}\n' * 3 + line.encode(), packed=True),
           rf"^{TRAIN}:4: {words}")
          for line, words in (("{", "not JSON"), ("[1]", "has no text"), ("{}", "has no text"),
                              ('{"text": 3}', "has no text"), ('{"text": "\\ud800"}', "not text"))),
        ("folder", instead(SECOND, Path.mkdir), rf"{SECOND}: is a folder, not a file$"),
        ("pipe", instead(SECOND, os.mkfifo), rf"{SECOND}: is a pipe, not a file$"),
        ("socket", instead(SECOND, listen), rf"{SECOND}: is a socket, not a file$"),
        ("device", instead(SECOND, lambda p: p.symlink_to("/dev/zero")), rf"{SECOND}: is a device, not a file$"),
        ("nowhere", instead(SECOND, nowhere), rf"{SECOND}: is a link to nowhere \(nowhere\)$"),
        ("loop", instead(SECOND, lambda p: p.symlink_to(p.name)), rf"{SECOND} cannot be read \(Too many levels"),
        ("unfinished", rename(SECOND, f"{SECOND}.part"), rf"{SECOND}\.part: is a download that was not finished"),
        ("not-packed", rename(SECOND, SECOND[:-3]), rf"^task\.root: {SECOND[:-3]} in .* is no name of a shard of C4"),
        ("other-split", rename(SECOND, "c4-test.0.json.gz"), r"^task\.root: c4-test\.0\.json\.gz in .* is no name"),
        ("both", put("c4-val.0.json.gz", b""), r"^task\.root: .*: val and validation both name the validation split"),
        ("second-copy", rename(SECOND, f"{SECOND} (1)"), r"^task\.root: .* \(1\) in .* is no name of a shard of C4"),
    ],
    "ud": [
        ("empty", put("xx_a-ud-dev.conllu", b""), r"^xx_a-ud-dev\.conllu: is empty$"),
        ("empty-part", put("xx_a-ud-train-b.conllu", b""), r"^xx_a-ud-train-b\.conllu: is empty$"),
        ("blank", put("xx_a-ud-dev.conllu", b"\r\n\r\n"), r"^xx_a-ud-dev\.conllu: has no sentence$"),
        ("empty-inside", put("xx_a-ud-dev-b.conllu.gz", b"", packed=True), r"^xx_a-ud-dev-b\.conllu\.gz: is empty$"),
        ("latin1", change("xx_a-ud-dev.conllu", lambda c: c.replace(b"x", b"\xf6", 1)), r":2: not UTF-8 \(invalid st"),
        ("utf16", change("xx_a-ud-dev.conllu", lambda c: c.decode().encode("utf16")), r"conllu:1: not UTF-8"),
        ("pipe", instead("xx_a-ud-dev.conllu", os.mkfifo), r"xx_a-ud-dev\.conllu: is a pipe, not a file$"),
        ("nowhere", instead("xx_a-ud-dev.conllu", nowhere), r"xx_a-ud-dev\.conllu: is a link to nowhere"),
        ("other-split", rename("xx_a-ud-dev.conllu", "xx_a-ud-testing.conllu"), r"xx_a-ud-testing\.conllu in .* is no"),
        ("text-at-end", rename("xx_a-ud-dev.conllu", "xx_a-ud-dev.conllu.txt"), r"ud-dev\.conllu\.txt in .* is no"),
        ("both", put("xx_a-ud-valid.conllu", b""), r"^task\.root: .*: dev and valid both name the validation split"),
        ("unfinished", put("a.crdownload", b""), r"^a\.crdownload: is a download"),
    ],
    "images": [
        ("testing", copy("test", "testing"), r"^data: testing is no name of a split \(they are train, val, "),
        ("val2017", copy("test", "val2017"), r"^data: val2017 is no name of a split"),
        ("both", lambda root: [copy("test", n)(root) for n in ("val", "valid")],
         r"^data: val and valid both name the validation split"),
        ("empty", put("train/cat/0.png", b""), r"^data: train/cat/0\.png is empty$"),
        ("text", put("train/cat/0.png", b"no image"), r"^data: train/cat/0\.png is not an image$"),
        ("cut", cut("train/cat/0.png"), r"^data: train/cat/0\.png cannot be decoded \("),
        ("pipe", instead("train/cat/0.png", os.mkfifo), r"/train/cat/0\.png: is a pipe, not a file$"),
        ("folder", instead("train/cat/0.png", lambda p: [p.mkdir(), put("a.txt", b"")(p)]), r"a\.txt is not an im"),
        ("nowhere", instead("train/cat/0.png", nowhere), r"/train/cat/0\.png: is a link to nowhere"),
        ("circle", lambda root: (root / "train" / "cat" / "up").symlink_to(root / "train"),
         r"/train/cat/up: is a link to a folder that it lies in$"),
        ("unfinished", put("train/cat/9.png.crdownload", b""), r"^train/cat/9\.png\.crdownload: is a download"),
        ("strip", lambda root: Image.new("RGB", (5000, 1)).save(root / "train/cat/0.png"), r"5000 x 1 pixels"),
        ("stray", put("train/cat/a.txt", b"a cat"), r"^data: train/cat/a\.txt is not an image \(\.jpg"),
        ("deep", lambda root: Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(root / "test/dog/1.png"),
         r"^data: test/dog/1\.png: more than 8 bits a channel"),
        ("more-classes", copy("test/cat", "test/fox"), r"^data: the test split has the class 'fox', which the tr"),
        ("no-class", remove("test/cat"), r"^data: the test split has no folder of the class 'cat'$"),
        ("empty-class", instead("train/dog", Path.mkdir), r"^data: no images of the class 'dog' in the train split$"),
        ("empty-split", instead("test", Path.mkdir), r"^data: no images in the test split$"),
        ("no-test", remove("test"), r"^task\.root: no folder test \(nor validation\) in data"),
        ("no-train", remove("train"), r"^task\.root: no folder train in data; the layout is "),
        ("training", rename("train", "training"), r"^data: training is no name of a split \(they are train, val, .*\)"),
        ("no-folder", rename("train/cat/0.png", "train/0.png"), r"^data: train/0\.png lies in no folder of a class"),
        ("one-image", remove("train/dog/0.png", "train/dog/1.png", "train/dog/2.png"),
         r"class number 1 has one training image"),
        ("one-class", remove("train/cat", "test/cat"), r"^data: one class alone \(dog\)"),
        ("one-folder", lambda root: [rename("train/cat", "cat")(root), remove("train", "test")(root)],
         r"^data: one class alone \(cat\), there is nothing to tell apart$"),
    ],
    "opened": [
        ("cut", cut("test/cat/0.png"), r"^data: test/cat/0\.png cannot be decoded \("),
        ("empty", put("train/dog/3.png", b""), r"^data: train/dog/3\.png is empty$"),
    ],
    "zip": [
        ("cut", lambda root: root.write_bytes(root.read_bytes()[:-30]), r"^task\.root: data\.zip is neither .*not a"),
        ("empty", lambda root: root.write_bytes(b""), r"^task\.root: data\.zip is neither a directory nor a zip that"),
        ("encrypted", with_info(flag_bits=1), r"^data\.zip: test/cat/0\.png is encrypted"),
        ("method", with_info(compress_type=99), r"^data\.zip: test/cat/0\.png is compressed by method 99"),
        ("version", with_info(extract_version=99, create_version=99), r"^task\.root: data\.zip .*version 9\.9"),
        ("link", with_info(external_attr=0o120777 << 16), r"^data\.zip: test/cat/0\.png is a link"),
        ("twice", twice, r"^data\.zip: test/cat/0\.png is in it twice$"),
        ("outside", repacked(lambda c: c.update({"../train/cat/9.png": b""})), r"^data\.zip: \.\./train/cat/9"),
        ("absolute", repacked(lambda c: c.update({"/train/cat/9.png": b""})), r"a path that leads out of the zip$"),
        ("drive", repacked(lambda c: c.update({"C:\\train\\9.png": b""})), r"a path that leads out of the zip$"),
        ("crc", spoilt("train/dog/2.png"),
         r"^data\.zip: train/dog/2\.png cannot be read \(Bad CRC-32"),
        ("split", repacked(lambda c: c.update({"testing/cat/9.png": b""})), r"^data\.zip: testing is no name"),
    ],
    "fashion": [
        ("label", idx("train-labels-idx1-ubyte", 9, 200), r"^train-images.*, train-labels-idx1-ubyte: label 200, but"),
        ("test-label", idx("t10k-labels-idx1-ubyte", 9, 10), r"t10k-labels-idx1-ubyte: label 10, but fashion_mnist"),
        ("magic", idx("train-images-idx3-ubyte", 2, 99), r"train-images.*: these are not the files of fashion_mnist"),
        ("empty", put("FashionMNIST/raw/t10k-labels-idx1-ubyte", b""), r"t10k-labels.*: these are not the files"),
        ("cut", cut("FashionMNIST/raw/train-images-idx3-ubyte"), r"these are not the files of fashion_mnist \("),
        ("swapped", lambda root: shutil.copy(root / "FashionMNIST/raw/train-labels-idx1-ubyte",
                                             root / "FashionMNIST/raw/t10k-labels-idx1-ubyte"),
         r"^t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte: 10 images and 40 labels$"),
        ("pipe", instead("FashionMNIST/raw/t10k-labels-idx1-ubyte", os.mkfifo), r"^task\.root: no FashionMNIST/raw/t1"),
    ],
    "ogb": [
        ("one-empty-line", put("raw/num-node-list.csv.gz", b"\n", packed=True), r"^num-node-list\.csv\.gz:1: column 1"),
        ("empty-lines", put("split/scaffold/test.csv.gz", b"\n\n", packed=True), r"^test\.csv\.gz:1: column 1 is ''"),
        ("empty", put("raw/edge.csv.gz", b""), r"^edge\.csv\.gz: empty$"),
        ("cut", cut("raw/node-feat.csv.gz"), r"^node-feat\.csv\.gz:\d+: cannot be read from here on"),
        ("nul", put("raw/num-edge-list.csv.gz", b"1\n\0\n", packed=True), r"^num-edge-list\.csv\.gz:\d: "),
        ("mark", put("raw/num-edge-list.csv.gz", b"\xef\xbb\xbf1\n", packed=True), r"^num-edge-list\.csv\.gz.* 1"),
        ("label", put("raw/graph-label.csv.gz", b"0\n2\n", packed=True), r"^graph-label\.csv\.gz:2: column 1 is '2'"),
        ("pipe", instead("raw/edge.csv.gz", os.mkfifo), r"raw/edge\.csv\.gz: is a pipe, not a file$"),
        ("folder", instead("raw/edge.csv.gz", Path.mkdir), r"^task\.root: no raw/edge\.csv\.gz in "),
        ("nowhere", instead("raw/edge.csv.gz", nowhere), r"raw/edge\.csv\.gz: is a link to nowhere"),
        ("both", lambda root: shutil.copy(root / "split/scaffold/valid.csv.gz", root / "split/scaffold/dev.csv.gz"),
         r"^task\.root: .*: split/scaffold/dev\.csv\.gz and split/scaffold/valid\.csv\.gz both name the validation"),
    ],
    "ogb_zip": [
        ("encrypted", encrypted, r"^data\.zip: pcba/.* is encrypted"),
        ("cut", lambda root: root.write_bytes(root.read_bytes()[:-30]), r"^task\.root: data\.zip is neither .*not a "),
    ],
}  # fmt: skip
