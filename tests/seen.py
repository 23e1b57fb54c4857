"""What can be seen of a run while it is hit, and whether it differs from one that was not: for ``faults.py``."""

import fcntl
import json
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from running import losses
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tb_logging

STEPS, VALIDATE, TIMEOUT = 160, 20, 5
SETTINGS = [f"trainer.max_steps={STEPS}", f"trainer.val_every={VALIDATE}", f"trainer.timeout={TIMEOUT}",
            "optim.interval=5"]  # fmt: skip
MARK = "CASPR_FAULTS"  # in the environment of all that a run starts


# ---- what can be seen of a run ------------------------------------------------------------------------------------


@dataclass
class Process:
    """One process of a run."""

    pid: int
    words: list[bytes]
    rank: int | None

    @property
    def part(self) -> str:
        if b"caspr_cli.commands.train" in self.words:
            return "launcher"
        if b"torch.distributed.run" in self.words:
            return "agent"
        return "rank" if b"caspr_cli.training.worker" in self.words else "other"


def processes(mark: str) -> list[Process]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment = (directory / "environ").read_bytes().split(b"\0")
            words = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in environment:
            rank = next((int(w[5:]) for w in environment if w.startswith(b"RANK=")), None)
            found.append(Process(int(directory.name), words, rank))
    return found


def send(number: signal.Signals, to: Iterable[Process]) -> None:
    for process in to:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def listening() -> set[str]:
    """Inodes of all sockets that listen on this machine."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[9] for row in rows if row[3] == "0A"}


def sockets(of: Iterable[Process]) -> set[str]:
    found = set()
    for process in of:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                with suppress(OSError):
                    found.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    return found & listening()


class Watched:
    """One run's record while others write to it."""

    def __init__(self, home: Path) -> None:
        self.home, self._record = home, None  # type: Path, Path | None
        self.before = 0  # the file of the metrics that an earlier attempt wrote

    @property
    def record(self) -> Path | None:
        self._record = self._record or next(self.home.glob("*/*/*/seed0"), None)
        return self._record

    def begin(self) -> None:
        """An attempt is about to start."""
        self.before = self.inode()

    def inode(self) -> int:
        return inode(self.record / "metrics.jsonl") if self.record else 0

    @property
    def status(self) -> dict[str, Any]:
        try:
            return json.loads((self.record / "status.json").read_text()) if self.record else {}
        except (OSError, ValueError):
            return {}

    def rows(self) -> list[dict[str, Any]]:
        """What this attempt has kept and written so far; nothing while it starts."""
        if not self.record or self.inode() == self.before:
            return []
        try:
            lines = (self.record / "metrics.jsonl").read_text().split("\n")[:-1]
        except OSError:
            return []
        return [json.loads(line) for line in lines]

    def phase(self, kept: int | None) -> tuple[str, int]:
        """What it does now, and at which step."""
        rows = self.rows()
        if not rows and not kept:
            return "start", 0
        step = rows[-1]["step"] if rows else 0
        if self.record and ((self.record / "result.json").exists() or self.status.get("state") == "done"):
            return "exit", step
        if self.record and (self.record / "checkpoints" / ".writing.ckpt").exists():
            return "checkpoint", step
        if rows and "test/loss" in rows[-1]:
            return "exit", step
        saved = self.status.get("step") or 0
        if rows and "val/loss" in rows[-1]:
            return ("checkpoint" if saved < step else "test" if step == STEPS else "train"), step
        if step and (step % VALIDATE == 0 or step == STEPS):
            return "validate", step
        return ("start" if len(rows) == kept else "train"), step


def differences(record: Path, whole: Path) -> list[str]:
    """Between a run that was hit and one that was not."""
    found = []
    if losses(record) != losses(whole):
        found.append("other losses")
    one, two = (json.loads((path / "result.json").read_text()) for path in (record, whole))
    for result in (one, two):
        for key in ("seconds", "optimizer_seconds", "peak_memory_bytes"):
            result.pop(key)
        result["target"].pop("seconds")
    if one != two:
        found.append(f"another result: {[key for key in two if one.get(key) != two[key]]}")
    status = json.loads((record / "status.json").read_text())
    if (status["state"], status["error"], status["step"]) != ("done", None, STEPS):
        found.append(f"status {status}")
    known = {"config.yaml", "status.json", "result.json", "provenance.json", "metrics.jsonl", "log.txt", ".lock",
             ".ranks.lock", "checkpoints", "data_files.json"}  # fmt: skip
    found += [f"left: {p.name}" for p in record.iterdir() if p.name not in known and "tfevents" not in p.name]
    left = {p.name for p in (record / "checkpoints").iterdir()} - {"last.ckpt", "previous.ckpt", "best.ckpt"}
    found += [f"left: {name}" for name in left]
    for name in (".lock", ".ranks.lock"):
        with (record / name).open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(f"{name} is held")
    if events(record) != events(whole):
        found.append("TensorBoard shows other losses")
    return found


def events(record: Path) -> dict[str, list[tuple[int, float]]]:
    tb_logging.get_logger().setLevel("ERROR")  # it warns of each restart
    accumulator = EventAccumulator(str(record), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
        if tag.endswith("/loss")
    }


def inode(file: Path) -> int:
    """Return the number of a file on its disk; 0 where there is none."""
    try:
        return file.stat().st_ino
    except OSError:
        return 0
