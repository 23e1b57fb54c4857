"""The kinds of faults for ``faults.py``: each hits a run, and returns the exit codes that may follow."""

from __future__ import annotations

import gzip
import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from running import snapshot
from seen import inode, processes, send

if TYPE_CHECKING:
    from faults import Run

DAY = 86400


@dataclass
class Fault:
    kind: str
    phase: str
    at: float  # the step for "train", else seconds after the phase is seen
    seed: int
    done: str = ""
    lost: list[str] = field(default_factory=list)


Hit = Callable[["Run", Fault, random.Random], set[int] | None]  # None: there is nothing yet that it could hit


def kill(part: str) -> Hit:
    def hit(run: Run, fault: Fault, draw: random.Random) -> set[int] | None:
        found = run.freeze(fault)
        chosen = found if part == "all" else [p for p in found if p.part == part.removesuffix("s")]
        if not chosen:
            return None
        if part == "rank":
            chosen = [draw.choice(chosen)]
        send(signal.SIGKILL, chosen)
        send(signal.SIGCONT, found)
        return {-signal.SIGKILL} if part in ("launcher", "all") else {143, 0}

    return hit


def ask(number: signal.Signals) -> Hit:
    def hit(run: Run, fault: Fault, draw: random.Random) -> set[int] | None:
        found = run.freeze(fault)
        run.process.send_signal(number)
        send(signal.SIGCONT, found)
        codes = {128 + number, 0}
        # before Python has put a handler in its place, and after it was taken away, a signal just ends the launcher
        return codes | {-number} if fault.done.split()[0] in ("start", "exit") else codes

    return hit


def stop_one(run: Run, fault: Fault, draw: random.Random) -> set[int] | None:
    found = run.freeze(fault)
    ranks = [p for p in found if p.part == "rank"]
    if not ranks:
        return None
    stopped = draw.choice(ranks)
    send(signal.SIGCONT, [p for p in found if p.pid != stopped.pid])
    return {143, 0}


@contextmanager
def mended(run: Run, undo: Callable[[], None]) -> Any:
    try:
        yield
        run.process.wait(timeout=200)
    finally:
        undo()


def full(run: Run, fault: Fault, draw: random.Random) -> set[int] | None:
    found = run.freeze(fault)
    filler = run.watched.home / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * draw.choice((1 << 20, 4096)))
    with mended(run, filler.unlink):
        send(signal.SIGCONT, found)
    return {143, 0}


def read_only(run: Run, fault: Fault, draw: random.Random) -> set[int] | None:
    found = run.freeze(fault)
    home = str(run.watched.home)
    subprocess.run(["mount", "--bind", home, home], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", home], check=True)
    with mended(run, lambda: subprocess.run(["umount", "-l", home], check=True) and None):
        send(signal.SIGCONT, found)
    return {143, 0} | ({2} if fault.done == "start" else set())  # 2: before anything was run


def damage(how: str) -> Hit:
    def hit(run: Run, fault: Fault, draw: random.Random) -> set[int] | None:
        found = run.freeze(fault)
        assert run.watched.record
        last, previous = (run.watched.record / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
        if not previous.exists():
            return None
        send(signal.SIGKILL, found)
        content = bytearray(last.read_bytes())
        if how == "truncated":
            del content[draw.randrange(len(content)) :]
        else:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        last.unlink()  # other names of this file keep what it was
        last.write_bytes(content)
        run.damaged = inode(last)
        return {-signal.SIGKILL}

    return hit


def changed_data(run: Run, fault: Fault, draw: random.Random) -> set[int] | None:
    """Killed, and started again on other data of the same sizes: refused, and nothing is written over."""
    found, record = run.freeze(fault), run.watched.record
    if not record or "data" not in json.loads((record / "provenance.json").read_text()):
        return None
    send(signal.SIGKILL, found)
    run.process.wait()
    file = draw.choice(sorted(run.data.iterdir()))
    whole, before = file.read_bytes(), snapshot(record)
    text = bytearray(gzip.decompress(whole))
    places = [at for at in range(10, len(text)) if 97 <= text[at] <= 103 and text[at - 1 : at] == b" "]
    text[draw.choice(places)] ^= 8  # a word is another one
    file.write_bytes(gzip.compress(bytes(text)))
    run.start()
    run.process.wait(timeout=200)
    if "the data have changed since this run began" not in run.text():
        fault.lost.append(f"other data are not refused: {run.text()[-300:]}")
    if snapshot(record) != before:
        fault.lost.append("other data were written over what there was")
    file.write_bytes(whole)
    return {2}


def kill_joblib(run: Run, fault: Fault, draw: random.Random) -> set[int] | None:
    """The command line of a sweep alone: what joblib has started ends, too, and the sweep's folder goes."""
    found = run.freeze(fault)
    chosen = [p for p in found if p.part == "launcher"]
    if not any(p.part == "rank" for p in found):
        return None
    send(signal.SIGKILL, chosen)
    send(signal.SIGCONT, found)
    deadline = time.monotonic() + 60
    while processes(run.mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left := list((run.watched.home / ".sweep").glob("[0-9]*")):
        fault.lost.append(f"left: {[path.name for path in left]}")
    return {-signal.SIGKILL}


def small_cache(run: Run, draw: random.Random) -> None:
    """A cache of its own, on a disk with less room than the run's token files need."""
    run.cache = run.runner.home / f"cache-{run.name}"
    run.cache.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(run.cache)], check=True)
    with (run.cache / "filler").open("wb", buffering=0) as file:
        file.write(b"\0" * 4096 * draw.randrange(24, 32))


def full_cache(run: Run, fault: Fault, draw: random.Random) -> set[int] | None:
    fault.done = "start"
    with mended(run, lambda: subprocess.run(["umount", "-l", str(run.cache)], check=True) and None):
        pass
    return {143}


JOBLIB = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
CLOCK = """
import datetime, os, time
_shift, _jump, _after = map(float, os.environ["FAULTS_CLOCK"].split())
_time, _time_ns, _begin = time.time, time.time_ns, time.monotonic()
def _off():
    return _shift + (_jump if time.monotonic() - _begin > _after else 0)
time.time = lambda: _time() + _off()
time.time_ns = lambda: _time_ns() + int(_off() * 1e9)
class _Moved(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=_off())
    @classmethod
    def utcnow(cls):
        return super().utcnow() + datetime.timedelta(seconds=_off())
_Moved.__name__ = _Moved.__qualname__ = "datetime"
_Moved.__module__ = "datetime"
datetime.datetime = _Moved
"""


def clock(home: Path, draw: random.Random) -> dict[str, str]:
    """The environment of an attempt whose clock is a day off, and jumps another day somewhere in the middle."""
    directory = home / "clock"
    directory.mkdir(exist_ok=True)
    (directory / "sitecustomize.py").write_text(CLOCK)
    shift, jump = draw.choice((-DAY, DAY)), draw.choice((-DAY, DAY))
    return {"PYTHONPATH": str(directory), "FAULTS_CLOCK": f"{shift} {jump} {draw.uniform(3, 12):.1f}"}


KINDS: dict[str, Hit] = {
    "kill rank": kill("rank"),
    "kill launcher": kill("launcher"),
    "kill all": kill("all"),
    "SIGTERM": ask(signal.SIGTERM),
    "SIGINT": ask(signal.SIGINT),
    "full disk": full,
    "read-only": read_only,
    "truncated": damage("truncated"),
    "flipped": damage("flipped"),
    "clock": kill("all"),
    "changed data": changed_data,
    "joblib launcher": kill_joblib,
    "cache disk": full_cache,
    # of several ranks
    "kill ranks": kill("ranks"),
    "kill agent": kill("agent"),
    "stop rank": stop_one,
}
OF_RANKS = ("kill ranks", "kill agent", "stop rank")
MOUNTED = ("full disk", "read-only", "cache disk")
