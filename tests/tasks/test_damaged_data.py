"""Data as people have them: what is used, and what is refused, in one line that names the file. For every reader."""

import errno
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from damaged import DAMAGED, READERS, Damage, conf_of, read, written

from caspr_cli.tasks import files, own
from caspr_cli.tasks.base import DataError


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
