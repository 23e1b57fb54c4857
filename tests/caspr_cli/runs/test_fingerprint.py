import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import AdamWConf, Recipe, Source
from caspr_cli.runs import fingerprint
from caspr_cli.runs.record import Record
from caspr_cli.tasks.registry import C4LMConf


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("train/a.txt", "train/b.txt", "test/c.txt", "d.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(name)
    return tmp_path / "data"


@pytest.fixture
def record(tmp_path: Path, data: Path) -> Record:
    """The record of a run that is done."""
    made = Record(tmp_path / "record")
    made.path.mkdir()
    made.write("provenance.json", {"data": {"name": "words", "hash": "f00d"}})
    fingerprint.keep(made, fingerprint.take(data, files(data)))
    return made


def files(data: Path) -> list[Path]:
    return sorted(path for path in data.rglob("*") if path.is_file())


def recipe(data: Path) -> Recipe:
    return Recipe(task=C4LMConf(data=Source.files, root=str(data)), optim=AdamWConf())


def test_what_has_moved_is_seen_without_reading_it(record: Record, data: Path) -> None:
    assert fingerprint.moved(record, data) == []
    os.utime(data / "train" / "b.txt", (1, 1))  # a time alone counts
    assert fingerprint.moved(record, data) == ["train/b.txt"]
    (data / "test" / "new.txt").write_text("")
    assert fingerprint.moved(record, data) == ["test", "train/b.txt"]
    (data / "d.txt").unlink()
    assert fingerprint.moved(record, data) == [".", "d.txt", "test", "train/b.txt"]
    (data / "test" / "c.txt").write_text("of another size")
    assert fingerprint.moved(record, data) == [".", "d.txt", "test", "test/c.txt", "train/b.txt"]


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    file, made = tmp_path / "data.zip", Record(tmp_path)
    file.write_bytes(b"one")
    fingerprint.keep(made, fingerprint.take(file, [file]))
    assert fingerprint.moved(made, file) == []
    file.write_bytes(b"three")
    assert fingerprint.moved(made, file) == ["."]


def test_of_many_files_the_folders_are_looked_at(record: Record, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "MOST", 3)
    assert list(fingerprint.take(data, files(data))) == [".", "test", "train"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"files": 1}', b'{"files": {"a": 1}}', b"[" * 200_000, None])
def test_a_record_without_stamps_knows_of_nothing(record: Record, data: Path, content: bytes | None) -> None:
    """One of before, or a damaged file: no run is refused for it."""
    file = record.path / fingerprint.FILE
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert not fingerprint.moved(record, data)
    fingerprint.check_done(recipe(data), record)


def test_data_that_are_away_are_no_other_data(record: Record, data: Path) -> None:
    data.rename(data.with_name("away"))
    fingerprint.check_done(recipe(data), record)


def test_the_content_counts(record: Record, data: Path) -> None:
    made = recipe(data)
    for path in files(data):
        os.utime(path, (1, 1))
    fingerprint.refuse_changed(made, record, {"name": "moved", "hash": "f00d"})
    with pytest.raises(ConfigError) as refused:
        fingerprint.refuse_changed(made, record, {"name": "moved", "hash": "beef"})
    assert str(refused.value) == (
        f"task.root={data}: the data have changed since this run began: hash f00d then, beef now "
        "(changed: d.txt, test/c.txt, train/a.txt and 1 more; name words, now moved); "
        "put them back, or add resume=never to run it anew"
    )
    with pytest.raises(
        ConfigError, match=r"^the data have changed since this run began: hash f00d then, beef now; put"
    ):
        fingerprint.refuse_changed(Recipe(task=C4LMConf(), optim=AdamWConf()), record, {"hash": "beef"})
    record.write("provenance.json", {"command": []})  # of before, or of an attempt that did not get so far
    fingerprint.refuse_changed(made, record, {"hash": "beef"})


@pytest.mark.parametrize("hashed", ["f00d", "beef"])
def test_content_is_read_only_where_files_have_moved(
    record: Record, data: Path, hashed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def describe(command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        said = json.dumps({"data": {"hash": hashed}, "files": fingerprint.take(data, files(data))})
        return subprocess.CompletedProcess(command, 0, f"a line\n{said}\n", "")

    monkeypatch.setattr(subprocess, "run", describe)
    fingerprint.check_done(recipe(data), record)
    assert asked == []
    os.utime(data / "d.txt", (1, 1))
    if hashed == "beef":
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"hash f00d then, beef now \(changed: d\.txt\)"):
                fingerprint.check_done(recipe(data), record)
        assert len(asked) == 2
    else:
        for _ in range(2):
            fingerprint.check_done(recipe(data), record)
        assert len(asked) == 1  # the new times are kept
