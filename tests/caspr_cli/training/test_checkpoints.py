import json
import logging
import os
import random
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from caspr_cli.runs.record import Record, RecordDamagedError
from caspr_cli.training import checkpoints
from caspr_cli.training.checkpoints import OWNER, AnotherRunError, Owner, Start, WholeFile, find, put_in_place

STEPS = 20
ME = Owner("0123abcd", 4, "f00d")


def checkpoint(step: int, lines: int, owner: Owner | None = ME) -> dict[str, Any]:
    """With what is read here, and tensors enough to flip bits in."""
    model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(6)])
    curves = {"seconds": 1.5, "losses": torch.zeros(2), "units": 3, "mark": (8, 1.0), "best": {}, "target": {}}
    curves |= {"final": {}, "phases": {}, "state_bytes": 12, "lines": lines}
    counted = {"optimizer": {"step": {"total": {"completed": step}}}}
    state = {
        "global_step": step,
        "callbacks": {"Curves": curves},
        "state_dict": model.state_dict(),
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "lr_schedulers": [{}],
        "loops": {"fit_loop": {"epoch_loop.automatic_optimization.optim_progress": counted}},
    }
    if owner is not None:
        state[OWNER] = asdict(owner) | {"step": step}
    return state | {"numbers": [0.5, None, True, "text"]}


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """With two checkpoints, of step 8 after 9 lines and of step 16 after 18."""
    made = Record(tmp_path)
    made.checkpoints.mkdir()
    for step, lines in ((8, 9), (16, 18)):
        WholeFile().save_checkpoint(checkpoint(step, lines), made.checkpoints / ".writing.ckpt")
        put_in_place(made.checkpoints / ".writing.ckpt", made, best=step == 8, keep=True)
    made.metrics.write_text("".join(json.dumps({"step": n}) + "\n" for n in range(1, 21)))
    return made


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def test_the_last_one_is_used_and_the_one_before_is_kept(record: Record) -> None:
    assert find(record, ME, STEPS) == Start(record.last, 16, 18)
    assert torch.load(record.previous, weights_only=True)["global_step"] == 8
    assert record.best.samefile(record.previous)
    assert sorted(p.name for p in record.checkpoints.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]


def test_without_any_a_run_begins(tmp_path: Path) -> None:
    assert find(Record(tmp_path), ME, STEPS) == Start(None, 0, 0)


def test_no_flipped_bit_reaches_the_training(tmp_path: Path) -> None:
    """Some go unnoticed: in padding, in dates, in what is stored twice. What is loaded then is what was saved."""
    file, flipped = tmp_path / "whole.ckpt", tmp_path / "flipped.ckpt"
    WholeFile().save_checkpoint(checkpoint(16, 18), file)
    content, whole = file.read_bytes(), torch.load(file, weights_only=True)
    with zipfile.ZipFile(file) as archive:
        directory, entries = archive.start_dir, len(archive.infolist())
    # Attributes of members in the zip's directory, where one bit says that a member is a directory and has no content.
    heads = [at for at in range(directory, len(content)) if content[at : at + 4] == b"PK\1\2"]
    assert len(heads) == entries
    draw, found, unnoticed = random.Random(0), 0, 0
    bits = [8 * at + 8 * 38 + bit for at in heads for bit in range(8)]
    bits += [draw.randrange(8 * len(content)) for _ in range(1500)]
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        flipped.write_bytes(damaged)
        try:
            assert checkpoints._read(flipped, ME, STEPS) == (16, 18)
        except Exception:
            found += 1
            continue
        unnoticed += 1
        assert same(torch.load(flipped, weights_only=True), whole), bit
    assert found > unnoticed > 0


def test_a_cut_file_is_found_wherever_it_is_cut(tmp_path: Path) -> None:
    file, cut = tmp_path / "whole.ckpt", tmp_path / "cut.ckpt"
    WholeFile().save_checkpoint(checkpoint(16, 18), file)
    content = file.read_bytes()
    for length in (0, 1, *random.Random(0).sample(range(len(content)), 60), len(content) - 1):
        cut.write_bytes(content[:length])
        with pytest.raises(Exception, match=r"."):
            checkpoints._read(cut, ME, STEPS)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_where_the_last_one_is_damaged_the_previous_one_is_used(
    record: Record, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = bytearray(record.last.read_bytes())
    record.last.unlink()
    if damage == "truncated":
        record.last.write_bytes(content[:1000])
    elif damage == "flipped":
        with zipfile.ZipFile(record.previous) as archive:
            place = next(m.header_offset for m in archive.infolist() if m.file_size == 256) + 128  # in a weight
        content[place] ^= 1
        record.last.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert find(record, ME, STEPS) == Start(record.previous, 8, 9)
    assert [m.startswith(f"warning  {record.last} is damaged: ") for m in caplog.messages] == [True] * (
        damage != "gone"
    )


def test_what_is_damaged_does_not_displace_what_was_used(record: Record) -> None:
    record.last.write_bytes(b"damaged")
    WholeFile().save_checkpoint(checkpoint(16, 18), record.checkpoints / ".writing.ckpt")
    put_in_place(record.checkpoints / ".writing.ckpt", record, best=False, keep=False)
    assert find(record, ME, STEPS).step == 16
    assert torch.load(record.previous, weights_only=True)["global_step"] == 8


def test_curves_that_are_damaged_may_do_for_the_previous_one(record: Record) -> None:
    lines = record.metrics.read_bytes().splitlines(keepends=True)
    record.metrics.write_bytes(b"".join([*lines[:12], b"\xff" + lines[12], *lines[13:]]))
    assert find(record, ME, STEPS) == Start(record.previous, 8, 9)
    for gone in (lambda: record.metrics.write_bytes(b"".join(lines[:8])), record.metrics.unlink):
        gone()
        with pytest.raises(RecordDamagedError, match=r"metrics\.jsonl is missing or damaged; resume=never"):
            find(record, ME, STEPS)


def test_two_damaged_ones_are_left_to_the_user(record: Record) -> None:
    record.last.write_bytes(b"")
    record.previous.write_bytes(b"")
    with pytest.raises(RecordDamagedError, match=r"last\.ckpt is missing or damaged; resume=never"):
        find(record, ME, STEPS)


def test_a_full_disk_keeps_no_half_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        WholeFile().save_checkpoint(checkpoint(8, 9), tmp_path / ".writing.ckpt")
    assert list(tmp_path.iterdir()) == []


def saved(record: Record, content: dict[str, Any]) -> None:
    """In place of the last checkpoint; the previous one is another file."""
    record.last.unlink()
    WholeFile().save_checkpoint(content, record.last)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"recipe": "99999999"}, "99999999 seed 4 on data f00d; this one is recipe 0123abcd seed 4 on data f00d"),
        ({"seed": 5}, "recipe 0123abcd seed 5"),
        ({"data": "beef"}, "seed 4 on data beef"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(record: Record, changed: dict[str, Any], named: str) -> None:
    saved(record, checkpoint(16, 18, replace(ME, **changed)))
    with pytest.raises(AnotherRunError, match=rf"last\.ckpt is of another run \(.*{named}.*\): take it away"):
        find(record, ME, STEPS)


def test_a_checkpoint_from_before_they_named_their_run_is_taken(record: Record) -> None:
    saved(record, checkpoint(16, 18, None))
    assert find(record, ME, STEPS) == Start(record.last, 16, 18)


WRONG: list[tuple[str, Any]] = [
    ("global_step", "16"), ("global_step", True), ("global_step", 0), ("global_step", 21), ("global_step", -3),
    ("global_step", 15), ("callbacks", []), ("callbacks.Curves", None), ("callbacks.Curves.lines", "18"),
    ("callbacks.Curves.lines", -1), ("callbacks.Curves.seconds", None), ("callbacks.Curves.mark", 8),
    ("state_dict", []), ("optimizer_states", {}), ("loops", 7), (f"{OWNER}.step", 8),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG, ids=str)
def test_fields_of_another_type_or_step_are_said_and_the_previous_one_is_used(
    record: Record, key: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    *groups, name = key.split(".")
    content = node = checkpoint(16, 18)
    for group in groups:
        node = node[group]
    node[name] = value
    saved(record, content)
    with caplog.at_level(logging.WARNING):
        assert find(record, ME, STEPS) == Start(record.previous, 8, 9)
    (said,) = caplog.messages
    assert said.startswith(f"warning  {record.last} is damaged: ")
    assert name in said or key.partition(".")[0] in said


def test_what_is_no_checkpoint_at_all_is_not_said_in_the_words_of_python(
    record: Record, caplog: pytest.LogCaptureFixture
) -> None:
    for content in ([1, 2], None, torch.zeros(3)):
        record.last.unlink()
        torch.save(content, record.last)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert find(record, ME, STEPS).step == 8
        assert "is damaged: global_step is missing, and should be a whole number from 1 to 20" in caplog.text
