"""What befalls runs: nothing is lost, and what happened is said in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Fault, can_mount, suite
from running import Runner, losses, wait_for

from caspr_cli.runs.processes import workers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(runner: Runner) -> Path:
    """A run that nothing befell."""
    runner("output_dir=untouched")
    return runner.record("untouched")


def cut_off(runner: Runner, whole: Path, output_dir: str) -> Path:
    """The same run, as a kill after its last step leaves it."""
    shutil.copytree(runner.home / "untouched", runner.home / output_dir)
    record = runner.record(output_dir)
    (record / "result.json").unlink()
    status = json.loads((record / "status.json").read_text())
    (record / "status.json").write_text(json.dumps(status | {"state": "running"}))
    return record


def damage(file: Path) -> None:
    """One bit, in the middle of a weight."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    file.write_bytes(content)


def test_a_flipped_bit_in_the_last_checkpoint_costs_only_time(runner: Runner, whole: Path) -> None:
    record = cut_off(runner, whole, "flipped")
    damage(record / "checkpoints" / "last.ckpt")
    out = runner("output_dir=flipped")
    (warning,) = (line for line in out.splitlines() if line.startswith("warning"))
    assert "last.ckpt is damaged" in warning
    assert losses(record) == losses(whole)


def test_where_nothing_is_whole_nothing_is_deleted(runner: Runner, whole: Path) -> None:
    record = cut_off(runner, whole, "hopeless")
    for name in ("last", "previous"):
        damage(record / "checkpoints" / f"{name}.ckpt")
    before = {path.name: path.read_bytes() for path in (*record.glob("checkpoints/*"), record / "metrics.jsonl")}
    for _ in range(2):  # nor by trying again
        out = runner("output_dir=hopeless", expect=2)
        assert "last.ckpt is missing or damaged; resume=never starts this run anew" in out
        assert "Traceback" not in out
        assert before == {
            path.name: path.read_bytes() for path in (*record.glob("checkpoints/*"), record / "metrics.jsonl")
        }


def test_data_that_were_away_cost_no_progress(runner: Runner, whole: Path) -> None:
    record = cut_off(runner, whole, "data_away")
    corpus, elsewhere = runner.home / "corpus", runner.home / "elsewhere"
    corpus.rename(elsewhere)
    try:
        out = runner("output_dir=data_away", expect=2)
    finally:
        elsewhere.rename(corpus)
    assert "Traceback" not in out
    assert json.loads((record / "status.json").read_text())["user_error"]
    assert "(continues)" in runner("output_dir=data_away")
    assert losses(record) == losses(whole)


def test_a_rank_that_hangs_is_named_and_ended(runner: Runner) -> None:
    """The other one ends it: torch's launcher would ask it, which a stopped process does not hear, and wait."""
    settings = ["output_dir=hung", "trainer.devices=2", "trainer.timeout=4", "trainer.max_steps=3000"]
    process = runner.start(*settings)
    record = wait_for(runner, "hung", 10)
    (second,) = (pid for pid, rank in workers(record, process.pid).items() if rank == 1)
    began = time.monotonic()
    os.kill(second, signal.SIGSTOP)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 143, out
    assert 4 < time.monotonic() - began < 25
    assert "cut off  rank 1 did not answer for 4 s (trainer.timeout)" in out
    assert "the same command continues" in out
    assert not workers(record, process.pid)
    status = json.loads((record / "status.json").read_text())
    assert (status["state"], status["error"]) == ("preempted", "rank 1 did not answer for 4 s (trainer.timeout)")


@pytest.fixture
def read_only(runner: Runner) -> Iterator[Path]:
    directory = runner.home / "read_only"
    directory.mkdir()
    if not can_mount():
        pytest.skip("nothing can be mounted here")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_directory_that_cannot_be_written_is_named_at_once(runner: Runner, read_only: Path) -> None:
    (line,) = runner(f"output_dir={read_only}", expect=2).splitlines()[-1:]
    assert line.startswith(f"error: output_dir={read_only}: cannot write there: ")
    assert "Read-only file system" in line


def test_a_sample_of_the_faults(runner: Runner) -> None:
    """``python tests/faults.py`` has many more."""
    faults = [
        Fault("full disk", "train", 30, seed=1),
        Fault("kill launcher", "checkpoint", 0, seed=2),
        Fault("truncated", "train", 75, seed=3),
        Fault("clock", "train", 110, seed=4),
        Fault("kill all", "validate", 0, seed=5),
        Fault("kill rank", "test", 0, seed=6),
    ]
    said: list[str] = []
    counted = suite(runner, {1: faults}, said.append)
    assert len(counted) == (6 if can_mount() else 5), said
    assert [fault.lost for _, fault in counted] == [[]] * len(counted), said
