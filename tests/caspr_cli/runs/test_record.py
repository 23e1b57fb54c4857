from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from caspr_cli.recipe.schema import AdamWConf, C4LMConf, Recipe, Resume
from caspr_cli.runs import launch
from caspr_cli.runs.record import Record, RecordBusyError, RecordDamagedError, write_whole


def recipe(resume: Resume = Resume.auto) -> Recipe:
    return Recipe(task=C4LMConf(), optim=AdamWConf(), resume=resume)


def test_a_file_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "status.json"
    write_whole(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.write("result.json", {"final": {"val/loss": 0.5, "val/map": math.nan}, "list": [math.inf, 1]})
    assert "NaN" not in (tmp_path / "result.json").read_text()
    assert record.result == {"final": {"val/loss": 0.5, "val/map": None}, "list": [None, 1]}


def test_the_path_says_what_it_is(tmp_path: Path) -> None:
    made = recipe()
    made.output_dir = str(tmp_path)
    made.seed = 4
    path = Record.of(made).path
    assert path.parts[-4:-2] == ("c4_lm", "adamw")
    assert path.name == "seed4"
    assert len(path.parent.name) == 8


def test_one_writer(tmp_path: Path) -> None:
    record = Record(tmp_path / "r")
    with record.held():
        record.write("status.json", {"pid": 123, "host": "here"})
        with pytest.raises(RecordBusyError, match="is being written by process 123 on here"), record.held():
            pass
    with record.held():
        pass


@pytest.mark.parametrize(
    ("status", "resume", "checkpoint", "expected"),
    [
        ({}, Resume.auto, False, "new"),
        ({"state": "done"}, Resume.auto, True, "skip"),
        ({"state": "done"}, Resume.retry, True, "skip"),
        ({"state": "done"}, Resume.never, True, "new"),
        ({"state": "running"}, Resume.auto, True, "continue"),
        ({"state": "running"}, Resume.auto, False, "new"),
        ({"state": "preempted"}, Resume.auto, True, "continue"),
        ({"state": "failed"}, Resume.auto, True, "failed"),
        ({"state": "failed"}, Resume.retry, True, "continue"),
        ({"state": "failed"}, Resume.retry, False, "new"),
        ({"state": "failed", "user_error": True}, Resume.auto, False, "new"),
    ],
)
def test_what_the_same_command_does(
    tmp_path: Path, status: dict[str, object], resume: Resume, checkpoint: bool, expected: str
) -> None:
    record = Record(tmp_path)
    if status:
        (tmp_path / "status.json").write_text(json.dumps(status))
    if status.get("state") == "done":
        (tmp_path / "result.json").write_text('{"target": {}}')
    if checkpoint:
        record.checkpoints.mkdir()
        record.last.touch()
    assert launch.plan(recipe(resume), record) == expected


def test_done_without_its_result_is_evaluated_again(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.write("status.json", {"state": "done"})
    record.checkpoints.mkdir()
    record.last.touch()
    assert launch.plan(recipe(), record) == "continue"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["status.json", "result.json"])
def test_a_damaged_file_is_named_and_nothing_is_deleted(tmp_path: Path, name: str, content: bytes) -> None:
    record = Record(tmp_path)
    record.write("status.json", {"state": "done"})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordDamagedError, match=f"{name} is missing or damaged; resume=never starts this run anew"):
        launch.plan(recipe(), record)
    assert launch.plan(recipe(Resume.never), record) == "new"


def test_a_record_without_a_status_is_not_taken_for_an_empty_directory(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.checkpoints.mkdir()
    with pytest.raises(RecordDamagedError, match=r"status\.json"):
        launch.plan(recipe(), record)


def test_ranks_are_started_by_torch_on_a_port_of_their_own(tmp_path: Path) -> None:
    made = recipe()
    assert launch.worker_command(made, Record(tmp_path))[1:3] == ["-m", "caspr_cli.runs.worker"]
    made.trainer.devices = 3
    command = launch.worker_command(made, Record(tmp_path))
    assert command[2:5] == ["torch.distributed.run", "--standalone", "--nproc-per-node=3"]
