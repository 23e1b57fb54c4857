"""Runs that are cut off: nothing is lost, and one line says what happened."""

import gzip
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from running import Runner, can_mount, losses, mounted, snapshot, wait_for  # noqa: F401 (can_mount is a condition)

from caspr_cli.runs.processes import workers

pytestmark = pytest.mark.release


def damage(file: Path) -> None:
    """One bit, in the middle of a weight."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    file.write_bytes(content)


def test_where_nothing_is_whole_nothing_is_deleted(runner: Runner, whole: Path) -> None:
    record = runner.cut_off(whole, "hopeless")
    for name in ("last", "previous"):
        damage(record / "checkpoints" / f"{name}.ckpt")
    before = snapshot(record)
    for _ in range(2):  # nor by trying again
        out = runner("output_dir=hopeless", expect=2)
        assert "last.ckpt is missing or damaged; resume=never starts this run anew" in out
        assert "Traceback" not in out
        assert snapshot(record) == before


@contextmanager
def other_data(runner: Runner) -> Iterator[None]:
    """While a word of the corpus is another one, at the same length; what is put back has another time."""
    (file,) = (runner.home / "corpus").glob("c4-train*")
    whole = file.read_bytes()
    text = gzip.decompress(whole)
    file.write_bytes(gzip.compress(text[:10] + bytes([text[10] ^ 1]) + text[11:]))
    try:
        yield
    finally:
        file.write_bytes(whole)


def test_data_that_are_away_or_changed_are_refused_and_nothing_is_lost(runner: Runner, whole: Path) -> None:
    """For a run that was cut off and for one that is done. Only content counts, not the times of files."""
    record = runner.cut_off(whole, "changed")
    before = snapshot(record)
    corpus, elsewhere = runner.home / "corpus", runner.home / "elsewhere"
    corpus.rename(elsewhere)
    try:
        out = runner("output_dir=changed", expect=2)
    finally:
        elsewhere.rename(corpus)
    assert "error: task.root: no such directory" in out
    assert "Traceback" not in out
    assert snapshot(record) == before  # it is refused before there is an attempt

    first = json.loads((record / "provenance.json").read_text())
    name = r"c4-train\.00000-of-00001\.json\.gz"
    hashes = rf"hash {first['data']['hash']} then, \w+ now"
    refused = rf"the data have changed since this run began: {hashes} \(changed: {name}\)"
    with other_data(runner):
        assert re.search(refused, out := runner("output_dir=changed", expect=2)), out
        assert snapshot(record) == before
        last = json.loads((record / "provenance.json").read_text())
        assert {key: last[key] for key in first if key != "attempts"}.items() <= first.items()
    assert "(continues)" in runner("output_dir=changed")
    assert losses(record) == losses(whole)
    last = json.loads((record / "provenance.json").read_text())["attempts"][-1]
    assert last["attempt"] == 3
    assert not last.keys() & {"data", "code", "packages", "device"}
    before = snapshot(record)
    with other_data(runner):
        assert re.search(refused, out := runner("output_dir=changed", expect=2)), out
        assert snapshot(record) == before
    assert "skipped  this run is done already" in runner("output_dir=changed")
    # The times of now are kept: the next look at them is enough.
    assert snapshot(record)["data_files.json"] != before["data_files.json"]


def test_a_checkpoint_that_does_not_fit_is_named(runner: Runner, whole: Path) -> None:
    """Whole, with the right checksums and steps, and tensors of another model."""
    record = runner.cut_off(whole, "misfit")
    for name in ("last", "previous"):
        file = record / "checkpoints" / f"{name}.ckpt"
        saved = torch.load(file, weights_only=True)
        saved["state_dict"] = {key: torch.zeros(3) for key in saved["state_dict"]}
        file.unlink()
        torch.save(saved, file)
    out = runner("output_dir=misfit", expect=2)
    assert "last.ckpt is missing or damaged; resume=never starts this run anew (it does not fit this run's model" in out
    assert "Traceback" not in out


def test_a_second_command_that_starts_with_the_first_names_it(runner: Runner) -> None:
    first = runner.start("output_dir=twice", "trainer.max_steps=4000")
    lock = until_lock(runner.home / "twice")
    out = runner("output_dir=twice", "trainer.max_steps=4000", expect=2)
    assert f"is being written by process {first.pid} on " in out
    assert "?" not in out
    first.stopped_by(signal.SIGINT, expect=130)
    assert lock.exists()


def until_lock(directory: Path) -> Path:
    for _ in range(3000):
        if found := list(directory.glob("*/*/*/seed0/.lock")):
            return found[0]
        time.sleep(0.01)
    raise AssertionError("the run does not begin")


def shell(runner: Runner, line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", line], cwd=runner.home, env=runner.environment, capture_output=True, text=True, check=False
    )


def test_a_run_with_no_streams_at_all_is_done(runner: Runner, whole: Path) -> None:
    done = shell(runner, f"{shlex.join(runner.command('output_dir=closed'))} >&- 2>&- <&-")
    assert done.returncode == 0
    record = runner.record("closed")
    assert losses(record) == losses(whole)
    assert json.loads((record / "status.json").read_text())["error"] is None
    assert len(json.loads((record / ".lock").read_text())) == 3  # and nothing that was printed


def test_too_little_memory_is_named(runner: Runner) -> None:
    limits = "ulimit -v 3000000"  # kB: enough to compose, not to train
    done = shell(runner, f"{limits}; exec {shlex.join(runner.command('output_dir=memory'))}")
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "failed   too little memory: " in said
    assert "Traceback" not in said


def test_a_rank_that_hangs_is_named_and_ended(runner: Runner) -> None:
    """The other one ends it: torch's launcher would ask it, which a stopped process does not hear, and wait."""
    settings = ["output_dir=hung", "trainer.devices=2", "trainer.timeout=4", "trainer.max_steps=3000"]
    process = runner.start(*settings)
    record = wait_for(runner, "hung", 10)
    (second,) = (pid for pid, rank in workers(record, process.pid).items() if rank == 1)
    began = time.monotonic()
    os.kill(second, signal.SIGSTOP)
    out = process.ended(143)
    assert 4 < time.monotonic() - began < 25
    assert "cut off  rank 1 did not answer for 4 s (trainer.timeout)" in out
    assert "the same command continues" in out
    assert not workers(record, process.pid)
    status = json.loads((record / "status.json").read_text())
    assert (status["state"], status["error"]) == ("preempted", "rank 1 did not answer for 4 s (trainer.timeout)")


needs_mount = pytest.mark.skipif("not can_mount()", reason="nothing can be mounted here")


@needs_mount
def test_a_directory_that_cannot_be_written_is_named_at_once(runner: Runner) -> None:
    with mounted(runner.home / "read_only", "ro") as directory:
        (line,) = runner(f"output_dir={directory}", expect=2).splitlines()[-1:]
    assert line.startswith(f"error: output_dir={directory}: cannot write there: ")
    assert "Read-only file system" in line


@needs_mount
@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["run", "sweep"])
def test_a_disk_that_is_full_at_the_start_is_a_cut_off(runner: Runner, sweep: list[str]) -> None:
    with mounted(runner.home / f"no_room{len(sweep)}", "nr_inodes=2") as directory:
        out = runner(f"output_dir={directory}", *sweep, expect=143)
    assert "No space left on device" in out.splitlines()[-1]
    assert str(directory) in out.splitlines()[-1]
    assert "Traceback" not in out
