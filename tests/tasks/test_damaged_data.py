"""Data as people have them: what is used, and what is refused, in one line that names the file. For every reader."""

import errno
import gzip
import json
import os
import re
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
from caspr_cli.tasks import files, own, registry
from caspr_cli.tasks.archives import Zip
from caspr_cli.tasks.base import SPLITS, DataError, Task
from caspr_cli.tasks.names import is_ignored, resembles_split, split_named
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
    write_molecules(root.with_name("pcba"))
    pack_ogb(root)


def pack_ogb(path: Path, change: Callable[[str], str] = str) -> None:
    top = path.with_name("pcba")
    pack(path, {change(f"pcba/{f.relative_to(top).as_posix()}"): f.read_bytes() for f in sorted(top.rglob("*.gz"))})


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
        ("latin1", change("xx_a-ud-dev.conllu", lambda c: c.replace(b"text", b"t\xf6xt", 1)), r"conllu:2: not UTF-8"),
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


@pytest.mark.parametrize(
    ("reader", "damage", "words"),
    [
        pytest.param(reader, damage, words, id=f"{reader}-{name}")
        for reader, cases in DAMAGED.items()
        for name, damage, words in cases
    ],
)
def test_damage_is_one_line_that_names_the_file(tmp_path: Path, reader: str, damage: Damage, words: str) -> None:
    root = written(reader, tmp_path)
    damage(root)
    with pytest.raises(DataError, match=words) as caught:
        read(reader, root)
    assert "\n" not in str(caught.value)


EARLY = ("c4", "ud", "images", "zip", "opened")  # whose samples are read before torch is imported


@pytest.mark.parametrize("reader", EARLY)
def test_damage_is_found_before_a_run_starts(
    tmp_path: Path, reader: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "SECONDS", 600)
    for number, (name, damage, words) in enumerate(DAMAGED[reader]):
        (tmp_path / str(number)).mkdir()
        root = written(reader, tmp_path / str(number))
        own.check(conf_of(reader, root))
        damage(root)
        with pytest.raises(DataError) as caught:
            own.check(conf_of(reader, root))
        assert re.search(words, str(caught.value)), name
    assert not list(cache.glob("*"))


def test_a_look_at_large_data_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = written("ud", tmp_path)
    (root / "xx_a-ud-dev.conllu").write_text("no tabs")  # behind the training split
    with pytest.raises(DataError, match="1 columns, not 10"):
        own.check(conf_of("ud", root))
    monkeypatch.setattr(own, "SECONDS", 0)
    own.check(conf_of("ud", root))


@pytest.mark.parametrize("reader", READERS)
def test_a_root_that_is_none(tmp_path: Path, reader: str) -> None:
    (tmp_path / "empty").mkdir()
    for root, words in ((None, "task.data=files needs the directory of "), ("/nowhere", "no such directory: /nowhere"),
                        (tmp_path / "empty", "no ")):  # fmt: skip
        with pytest.raises(DataError, match=rf"^task\.root: {re.escape(words)}"):
            read(reader, root)


@pytest.mark.parametrize("reader", DAMAGED)
def test_mended_data_are_read(tmp_path: Path, reader: str, cache: Path) -> None:
    """Nothing is left of an attempt that was refused."""
    root = written(reader, tmp_path)
    _, damage, _ = DAMAGED[reader][0]
    damage(root)
    with pytest.raises(DataError):
        read(reader, root)
    for path in tmp_path.iterdir():
        if path != cache:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, found = read(reader, written(reader, tmp_path))
    assert all(found.values())
    assert not list(cache.glob("*/.building-*"))


# ---- what is used --------------------------------------------------------------------------------------------------


def sizes(reader: str, root: Path, **changes: Any) -> dict[str, int]:
    return {split: len(samples) for split, samples in read(reader, root, **changes)[1].items()}


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "Val", "DEV"])
@pytest.mark.parametrize("reader", ["images", "zip"])
def test_a_validation_split_by_any_of_its_names(tmp_path: Path, reader: str, name: str) -> None:
    root = written(reader, tmp_path)
    assert sizes(reader, root) == {"train": 6, "validation": 2, "test": 4}
    if reader == "images":
        copy("test", name)(root)
    else:
        repacked(lambda c: c.update({k.replace("test", name): v for k, v in c.items() if "test" in k}))(root)
    assert sizes(reader, root) == {"train": 8, "validation": 4, "test": 4}


def test_names_of_splits_in_other_readers(tmp_path: Path) -> None:
    for reader in ("ud", "ogb", "c4"):
        (tmp_path / reader).mkdir()
    ud, ogb, c4 = (written(reader, tmp_path / reader) for reader in ("ud", "ogb", "c4"))
    rename("xx_a-ud-dev.conllu", "xx_a-ud-Valid.conllu")(ud)
    rename("xx_a-ud-train.conllu", "xx_a-ud-TRAIN.conllu")(ud)
    assert sizes("ud", ud) == {"train": 40, "validation": 10, "test": 10}
    before = read("ogb", ogb)[0].describe_data()
    rename("split/scaffold/valid.csv.gz", "split/scaffold/validation.csv.gz")(ogb)
    assert read("ogb", ogb)[0].describe_data() == before
    before = read("c4", c4)[0].describe_data()
    rename(HELD_OUT, HELD_OUT.replace("validation", "Val"))(c4)
    assert read("c4", c4)[0].describe_data() == before


def test_links_to_splits_classes_and_files_are_followed(tmp_path: Path) -> None:
    root = written("images", tmp_path)
    expected = read("images", root)[0].describe_data()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("test", "train/cat", "train/dog/0.png"):
        target = elsewhere / name.replace("/", "-")
        (root / name).rename(target)
        (root / name).symlink_to(target)
    assert read("images", root)[0].describe_data() == expected
    (tmp_path / "link").symlink_to(root)
    assert read("images", tmp_path / "link")[0].describe_data() == expected


def test_imagenet_may_be_links(tmp_path: Path) -> None:
    root = written("imagenet", tmp_path)
    (root / "test").rename(tmp_path / "val")
    (root / "Val").symlink_to(tmp_path / "val")
    assert sizes("imagenet", root) == {"train": 6, "validation": 2, "test": 4}


IGNORED = (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints/0.png", "@eaDir/0.png", "0.png~",
             "__MACOSX/0.png", ".git/HEAD", ".nfs0001", "Icon\r", "#0.png#")  # fmt: skip


@pytest.mark.parametrize("reader", ["images", "zip", "opened", "ud", "c4", "ogb", "ogb_zip"])
def test_ignored_files_are_passed_over(tmp_path: Path, reader: str) -> None:
    root = written(reader, tmp_path)
    expected = read(reader, root)[0].describe_data()
    if reader == "zip":
        repacked(lambda c: c.update({f"train/cat/{name}": b"no image" for name in IGNORED}))(root)
    elif reader == "ogb_zip":
        with zipfile.ZipFile(root, "a") as file:
            for folder in ("", "pcba/raw/", "__MACOSX/pcba/raw/"):
                for name in (".DS_Store", "._edge.csv.gz"):
                    file.writestr(folder + name, b"no table")
    else:
        for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
            for name in IGNORED:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(b"no data")
        (root / ".dangling").symlink_to("nowhere")
    assert read(reader, root)[0].describe_data() == expected


def test_folders_beside_the_splits_are_said_to_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = written("images", tmp_path)
    copy("test", "extra")(root)
    (root / "README.md").write_text("about it")
    (root / "logo.png").touch()
    with caplog.at_level("INFO", "caspr"):
        assert sizes("images", root) == {"train": 6, "validation": 2, "test": 4}
    assert "left out: 4 images in the folder extra, which" in caplog.text
    assert "left out: 1 images in data, which" in caplog.text


@pytest.mark.parametrize("packer", ["windows", "dots", "mac", "unflagged", "top-folder"])
def test_names_in_a_zip_whoever_packed_it(tmp_path: Path, packer: str) -> None:
    root = written("zip", tmp_path)
    content = {name.replace("dog", "hündin"): data for name, data in members(root.with_name("folder")).items()}
    pack(root, content)
    expected = read("zip", root)[0].describe_data()
    if packer == "unflagged":  # as macOS and older programs on Linux: UTF-8, and nothing says so
        pack(root, {name.replace("ü", "__"): data for name, data in content.items()})
        root.write_bytes(root.read_bytes().replace(b"h__ndin", "hündin".encode()))
        assert not any(info.flag_bits & 0x800 for info in zipfile.ZipFile(root).infolist())
    else:
        change_name: Callable[[str], str] = {
            "windows": lambda name: name.replace("/", "\\"),
            "dots": lambda name: f"./{name}",
            "mac": str,
            "top-folder": lambda name: f"test_set/{name}",
        }[packer]
        junk = {"mac": {"__MACOSX/._train": b"", "train/.DS_Store": b""}, "top-folder": {"logo.png": b""}}.get(
            packer, {}
        )
        pack(root, {change_name(name): data for name, data in (content | junk).items()})
    assert read("zip", root)[0].describe_data() == expected


def test_an_ogb_zip_with_backslashes(tmp_path: Path) -> None:
    root = written("ogb_zip", tmp_path)
    expected = read("ogb_zip", root)[0].describe_data()
    pack_ogb(root, lambda name: name.replace("/", "\\"))
    assert read("ogb_zip", root)[0].describe_data() == expected


@pytest.mark.parametrize("reader", ["images", "opened"])
def test_names_that_are_not_utf8(tmp_path: Path, reader: str) -> None:
    root = written(reader, tmp_path)
    folder = os.fsencode(root / "train" / "cat")
    os.rename(folder + b"/0.png", folder + b"/b\xe4r.png")
    for split in ("train", "test"):
        (root / split / "dog").rename(os.fsdecode(os.fsencode(root / split) + b"/h\xfcndin"))
    task, found = read(reader, root)
    assert len(found["train"]) == 6
    assert json.dumps(task.describe_data()).encode()


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
def test_byte_order_mark_and_line_ends(tmp_path: Path, end: bytes) -> None:
    root = written("c4", tmp_path)
    expected = read("c4", root)[0].describe_data()
    content = gzip.decompress((root / TRAIN).read_bytes())
    (root / TRAIN).write_bytes(gzip.compress(b"\xef\xbb\xbf" + content.replace(b"\n", end)))
    assert read("c4", root)[0].describe_data() == expected


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, as root may read everything."""
    root = written("ud", tmp_path)
    opened = Path.open

    def refuse(self: Path, *args: Any, **how: Any) -> Any:
        if self.name == "xx_a-ud-dev.conllu":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *args, **how)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"^xx_a-ud-dev\.conllu:1: cannot be read from here on \(Permission denied\)$"):
        read("ud", root)


# ---- the boundary --------------------------------------------------------------------------------------------------


class PanicError(Exception):
    """An error of some library."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UnicodeEncodeError("utf8", "x", 0, 1, "surrogates not allowed"), ".*surrogates not allowed"),
        (RecursionError("maximum"), r"nested too deeply"),
        (MemoryError(), "out of memory"),
        (IndexError("list index out of range"), "IndexError: list index out of range"),
        (KeyError("text"), "KeyError: 'text'"),
        (EOFError(), "EOFError"),
        (zipfile.BadZipFile("bad"), "bad"),
        (PanicError("two\nlines"), "two lines"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "Permission denied"),
    ],
)
def test_every_error_of_a_reader_is_one_line_and_keeps_its_cause(error: Exception, words: str) -> None:
    with pytest.raises(DataError, match=rf"^a\.gz:3: cannot be read \({words}") as caught, files.reading("a.gz:3:"):
        raise error
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EIO, "Input/output error"),
        Exception("No space left on device (os error 28)"),  # of `tokenizers`
        OSError("Not enough disk space. Needed: 3 GB"),  # of `datasets`
    ],
)
def test_a_full_disk_is_no_fault_of_the_data(error: Exception) -> None:
    with pytest.raises(OSError, match="a\\.gz") as caught, files.reading("a.gz"):
        raise error
    assert caught.value.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    assert caught.value.filename == "a.gz"


# ---- names ---------------------------------------------------------------------------------------------------------


def test_what_is_ignored() -> None:
    assert all(is_ignored(name.partition("/")[0]) for name in IGNORED)
    assert not any(map(is_ignored, ("cat", "0.png", "a#b", "Icon", "MACOSX", "git", "thumbs")))
    assert not is_ignored("cat~", folder=True)


def test_what_names_a_split() -> None:
    assert [split_named(n) for n in ("Train", "VAL", "valid", "Validation", "dev", "test", "testing", "cat")] == [
        "train", "validation", "validation", "validation", "validation", "test", None, None,
    ]  # fmt: skip
    for name in ("training", "testing", "tests", "val2017", "train_set", "Test-A", "evaluation", "holdout", "trian"):
        assert resembles_split(name), name
    for name in ("cat", "extra", "valley", "devkit", "rest", "traits", "images", "train", "dev"):
        assert not resembles_split(name), name


def test_data_files_are_those_of_a_reader(tmp_path: Path) -> None:
    root = written("images", tmp_path)
    (root / "train" / ".DS_Store").touch()
    (root / "more").symlink_to(root / "test")
    names = [path.relative_to(root).as_posix() for path in files.data_files(root)]
    assert len(names) == 16
    assert names == sorted(names)
    assert files.data_files(root / names[0]) == [root / names[0]]
    (tmp_path / "link").symlink_to(root)
    assert len(files.data_files(tmp_path / "link")) == 16


def test_a_zip_is_opened_once_and_has_a_pickle(tmp_path: Path) -> None:
    import pickle

    root = written("zip", tmp_path)
    archive = Zip(root)
    names = archive.names()
    again = pickle.loads(pickle.dumps(archive))
    assert again.names() == names
    assert again.open(names[-1]).read() == archive.open(names[-1]).read()
    assert again.size(names[-1]) == len(archive.open(names[-1]).read())
