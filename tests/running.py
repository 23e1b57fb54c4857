"""Runs in tests: how they are started, and what is read from their records."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from caspr_cli.recipe import compose
from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs.record import Record

TINY = [
    "task.data=files", "task.width=16", "task.layers=1", "task.heads=2", "task.sequence=16", "task.batch_size=8",
    "task.vocab_size=300", "trainer.log_every=1", "trainer.val_every=8", "trainer.max_steps=20",
    "trainer.accelerator=cpu", "optim.lr=0.01",
]  # fmt: skip


class Process(subprocess.Popen[str]):
    """A command that was started."""

    def ended(self, expect: int) -> str:
        """Return what it wrote; its exit code has to be the expected one."""
        out, _ = self.communicate(timeout=300)
        assert self.returncode == expect, out
        return out

    def stopped_by(self, number: signal.Signals, expect: int) -> str:
        """Send it a signal, and return what it wrote."""
        self.send_signal(number)
        return self.ended(expect)


class Runner:
    """``caspr-train`` as a user starts it, on a corpus small enough for a test."""

    def __init__(self, home: Path, cache: Path) -> None:
        self.home = home
        write_corpus(home / "corpus")
        self.environment = os.environ | {"CASPR_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        self.environment.pop("COLUMNS", None)  # a terminal's, which would wrap the lines that tests look for
        self.started: list[Process] = []

    def command(self, *overrides: str) -> list[str]:
        corpus = f"task.root={self.home / 'corpus'}"
        return [sys.executable, "-m", "caspr_cli.commands.train", *overrides[:1], *TINY, corpus, *overrides[1:]]

    def start(self, *overrides: str, env: dict[str, str] | None = None, **how: Any) -> Process:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        how = {"cwd": self.home, "env": self.environment | (env or {}), **streams, **how}
        self.started.append(Process(self.command(*overrides), **how))
        return self.started[-1]

    def end(self) -> None:
        """End the commands that a test has left when it failed."""
        for process in self.started:
            if process.poll() is None:
                process.terminate()
                process.communicate(timeout=300)

    def __call__(self, *overrides: str, expect: int = 0) -> str:
        return self.start(*overrides).ended(expect)

    def record(self, output_dir: str, seed: int = 0) -> Path:
        (found,) = (self.home / output_dir).glob(f"*/*/*/seed{seed}")
        return found

    def cut_off(self, done: Path, output_dir: str) -> Path:
        """A copy of a record that is done, as a kill after the last step leaves it: without a result."""
        shutil.copytree(done.parents[3], self.home / output_dir)
        record = self.record(output_dir)
        (record / "result.json").unlink()
        status = json.loads((record / "status.json").read_text())
        (record / "status.json").write_text(json.dumps(status | {"state": "running"}))
        return record


def ended(recipe: Recipe, value: float | None, state: str = "done", **status: Any) -> None:
    """Write the record of a run, with this value of its metric at the end: the best on the way was another."""
    record, metric = Record.of(recipe), recipe.task.target.metric
    record.path.mkdir(parents=True, exist_ok=True)
    record.config.write_text(compose.save(recipe), encoding="utf8")
    record.write("status.json", {"state": state, "attempts": 1} | status)
    if state == "done":
        record.write("result.json", {"final": {metric: value}, "best": {metric: 100.0}, "seconds": 30.0})


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as directory, suppress(subprocess.CalledProcessError), mounted(Path(directory)):
        return True
    return False


@contextmanager
def mounted(directory: Path, options: str = "size=1m") -> Iterator[Path]:
    """A disk of its own while the context is open."""
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", directory], capture_output=True, check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def losses(record: Path) -> dict[tuple[int, str], float]:
    """Every loss of a record by step and name; a step that stands there twice is an error."""
    found: dict[tuple[int, str], float] = {}
    for line in (record / "metrics.jsonl").read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        for name in ("train/loss", "val/loss", "test/loss"):
            if name in row:
                assert (row["step"], name) not in found
                found[row["step"], name] = row[name]
    return found


def snapshot(record: Path) -> dict[str, bytes]:
    """The files of curves, results and checkpoints, as they are now."""
    names = ("metrics.jsonl", "result.json", "data_files.json")
    files = [*(record / name for name in names), *record.glob("checkpoints/[a-z]*")]
    return {file.name: file.read_bytes() for file in files if file.exists()}


def near(losses: dict[tuple[int, str], float]) -> Any:
    """Equal to these but for what another order of sums makes of float32."""
    return pytest.approx(losses, rel=2e-4)


def wait_for(runner: Runner, output_dir: str, lines: int, file: str = "metrics.jsonl") -> Path:
    """Until so many lines of metrics were written."""
    for _ in range(9000):
        found = list((runner.home / output_dir).glob(f"*/*/*/seed0/{file}"))
        if found and len(found[0].read_text().splitlines()) >= lines:
            return found[0].parent
        time.sleep(0.02)
    raise AssertionError("the run does not get there")


def write_corpus(directory: Path) -> None:
    """Documents of drawn words, in files as C4 has them: 20 steps of ``TINY`` are a little more than one epoch."""
    directory.mkdir()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(200)]
    for split, documents in (("train", 20), ("validation", 8)):
        with gzip.open(directory / f"c4-{split}.00000-of-00001.json.gz", "wt", encoding="utf8") as file:
            for _ in range(documents):
                file.write(json.dumps({"text": " ".join(draw.choices(words, k=100))}) + "\n")
