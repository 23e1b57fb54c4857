"""Data as people have them that are used all the same: names, links, ignored files, whoever packed them."""

import gzip
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damaged import HELD_OUT, TRAIN, copy, members, pack, read, rename, repacked, written

from caspr_cli.tasks import files
from caspr_cli.tasks.archives import Zip
from caspr_cli.tasks.names import is_ignored, resembles_split, split_named

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


def test_a_zip_has_a_pickle(tmp_path: Path) -> None:
    import pickle

    root = written("zip", tmp_path)
    archive = Zip(root)
    names = archive.names()
    again = pickle.loads(pickle.dumps(archive))
    assert again.names() == names
    assert again.open(names[-1]).read() == archive.open(names[-1]).read()
    assert again.size(names[-1]) == len(archive.open(names[-1]).read())
