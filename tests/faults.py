"""Kills runs for real, again and again, and counts what is lost: ``python tests/faults.py``.

Each run is started, hit, started again by the same command, hit again, until it is done. Then its losses must be, bit
for bit, those of a run that was never hit; its result, too, but for times; TensorBoard must show each step once and in
order; and no process, port, lock or half-written file may be left. A fault hits at a step drawn uniformly over the
run's life, or as soon as a phase is seen: start, validation, checkpoint, test, exit. The phase that is printed was read
with all processes stopped.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import count
from pathlib import Path

from kinds import JOBLIB, KINDS, MOUNTED, OF_RANKS, Fault, clock, small_cache
from running import Runner, can_mount, mounted
from seen import MARK, SETTINGS, STEPS, Process, Watched, differences, inode, listening, processes, send, sockets

PHASES = ("train", "validate", "checkpoint", "test", "exit", "start")
FAULTS_A_RUN = 5


# ---- one run ------------------------------------------------------------------------------------------------------


class Run:
    """One run and what befalls it."""

    def __init__(self, runner: Runner, ranks: int, number: int, say: Callable[[str], None]) -> None:
        self.ranks, self.say = ranks, say
        self.name = f"run{number}"
        self.runner, self.watched = runner, Watched(runner.home / self.name)
        self.mark = f"{os.getpid()}-{number}"
        self.ports: set[str] = set()
        self.faults: list[Fault] = []
        self.least = 0  # the step that the next attempt must not fall behind
        self.damaged = 0  # inode of a checkpoint that was damaged: attempts may fall behind while it is there
        self.kept: int | None = None  # lines of the metrics that this attempt began with
        self.cache = self.runner.home / f"cache-{self.name}"  # of an attempt that finds it full
        self.process: subprocess.Popen[str]

    @property
    def data(self) -> Path:
        """A corpus of its own, the same as that of all."""
        corpus = self.runner.home / f"corpus-{self.name}"
        if not corpus.exists():
            shutil.copytree(self.runner.home / "corpus", corpus)
        return corpus

    def start(self, *more: str, **environment: str) -> None:
        self.watched.begin()
        own = [f"output_dir={self.name}", f"trainer.devices={self.ranks}", f"task.root={self.data}", *SETTINGS, *more]
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = self.runner.start(*own, env={MARK: self.mark} | environment, stdout=self.output)

    def wait_for(self, fault: Fault) -> bool:
        """Until the moment of a fault; False if the run was done before."""
        deadline, seen_at, self.kept = time.monotonic() + 120, 0.0, None
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
            rows = self.watched.rows()
            if self.kept is None and self.watched.inode() not in (0, self.watched.before):
                self.kept = len(rows)
                if rows and rows[-1]["step"] < self.least:
                    fault.lost.append(f"went back to step {rows[-1]['step']} of {self.least}")
            phase, step = self.watched.phase(self.kept)
            if fault.phase == "start":
                seen_at = seen_at or time.monotonic()
            elif fault.phase == "train":
                seen_at = seen_at or (time.monotonic() if phase != "start" and step >= fault.at else 0)
            elif phase == fault.phase:
                seen_at = seen_at or time.monotonic()
            if seen_at and time.monotonic() >= seen_at + (0 if fault.phase == "train" else fault.at):
                return not (fault.phase == "start" and phase == "exit")
        return False

    def suffer(self, fault: Fault) -> bool:
        """One attempt and its fault; False if the run was done before it could hit."""
        draw = random.Random(fault.seed)
        if fault.kind == "cache disk":
            small_cache(self, draw)
        more = JOBLIB if fault.kind == "joblib launcher" else []
        environment = {"CASPR_CACHE": str(self.cache)} if fault.kind == "cache disk" else {}
        environment |= clock(self.runner.home, draw) if fault.kind == "clock" else {}
        self.start(*more, **environment)
        stands = self.damaged and inode(self.watched.record / "checkpoints" / "last.ckpt") == self.damaged
        self.least = 0 if stands else self.watched.status.get("step") or 0
        if not self.wait_for(fault):
            self.end({0, 143}, fault)
            return False
        self.ports |= sockets(processes(self.mark))
        while (expected := KINDS[fault.kind](self, fault, draw)) is None:  # nothing there yet that it could hit
            send(signal.SIGCONT, processes(self.mark))
            time.sleep(0.2)
            if self.process.poll() is not None:
                self.end({0}, fault)
                return False
        self.end(expected, fault)
        self.faults.append(fault)
        last = self.text().strip().splitlines()[-3:]
        why = next((line for line in last if line.startswith(("cut off", "failed", "error", "done"))), "")
        if fault.lost:  # at once: the summary is lost itself where this command is ended
            why = f"LOST: {'; '.join(fault.lost)}"
        self.say(f"{self.ranks} rank{'s' if self.ranks > 1 else ' '}  {fault.kind:<15} {fault.done:<24} "
                 f"exit {self.process.returncode:>4}  {why if fault.lost else why[:90]}")  # fmt: skip
        return True

    def freeze(self, fault: Fault) -> list[Process]:
        """All processes stopped, and the moment noted."""
        found = processes(self.mark)
        send(signal.SIGSTOP, found)
        phase, step = self.watched.phase(self.kept)
        fault.done = f"{phase} at step {step}" if phase != "start" else "start"
        return found

    def end(self, expected: set[int], fault: Fault | None) -> None:
        lost = fault.lost if fault else self.faults[-1].lost if self.faults else []
        try:
            code = self.process.wait(timeout=150)
        except subprocess.TimeoutExpired:
            lost.append("hangs")
            send(signal.SIGKILL, processes(self.mark))
            code = self.process.wait()
        if code not in expected:
            lost.append(f"exit {code}: {self.text()[-600:]}")
        if code != -signal.SIGKILL or (fault and fault.kind == "joblib launcher"):
            self.check_nothing_left(lost)

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def check_nothing_left(self, lost: list[str]) -> None:
        """A process that ends lets go of its memory first and of its ports last; jobs of a killed launcher save."""
        deadline = time.monotonic() + (30 if self.process.returncode == -signal.SIGKILL else 5)
        while (left := processes(self.mark)) or self.ports & listening():
            if time.monotonic() > deadline:
                lost.append(f"left: {[(p.pid, p.part, p.rank) for p in left]}" if left else "a port is left")
                send(signal.SIGKILL, left)
                return
            time.sleep(0.05)

    def finish(self, whole: Path) -> None:
        """The same command until it is done, and the comparison."""
        lost: list[str] = []
        for _ in range(3):
            self.start()
            if self.process.wait(timeout=200) == 0:
                break
        else:
            lost.append(f"does not end: {self.text()[-600:]}")
        self.check_nothing_left(lost)
        record = self.watched.record
        assert record
        lost += [] if lost else differences(record, whole)
        for fault in self.faults:
            fault.lost += lost
        self.say(f"{self.ranks} rank{'s' if self.ranks > 1 else ' '}  {self.name:<14} after {len(self.faults)} faults: "
                 + ("; ".join(lost) or "as if it had never been hit"))  # fmt: skip


# ---- the suite ----------------------------------------------------------------------------------------------------


def drawn(number: int, ranks: int, draw: random.Random, kinds: list[str]) -> list[Fault]:
    """Half of the moments uniform over the steps, the others in a phase."""
    kinds = [kind for kind in kinds if ranks > 1 or kind not in OF_RANKS]
    faults = []
    for i in range(number):
        kind = kinds[i % len(kinds)]
        phase = draw.choice(["train"] * 5 + list(PHASES[1:]))
        if kind in ("truncated", "flipped") and phase in ("start", "exit"):
            phase = "train"
        if kind == "cache disk":
            phase = "start"
        at = {"train": draw.uniform(1, STEPS), "start": draw.uniform(0.5, 9)}.get(phase, draw.uniform(0, 0.02))
        faults.append(Fault(kind, phase, at, draw.randrange(1 << 30)))
    return faults


def in_order(faults: list[Fault]) -> list[Fault]:
    """As they can befall one run: the start first, the exit last."""
    place = {"start": -1.0, "test": STEPS + 1.0, "exit": STEPS + 2.0}
    draw = random.Random(faults[0].seed)
    return sorted(faults, key=lambda f: f.at if f.phase == "train" else place.get(f.phase, draw.uniform(0, STEPS)))


def suite(runner: Runner, faults: dict[int, list[Fault]], say: Callable[[str], None]) -> list[tuple[int, Fault]]:
    """Let all faults befall as many runs as it takes. Returns each that hit, with the ranks of its run."""
    mounts, number, counted = can_mount(), count(), []
    if not mounts:
        say(f"left out: {' and '.join(MOUNTED)}, as nothing can be mounted here")
    for ranks, wanted in faults.items():
        runner(f"output_dir=whole{ranks}", f"trainer.devices={ranks}", *SETTINGS)
        whole = runner.record(f"whole{ranks}")  # nothing befell it
        pending = [f for f in wanted if mounts or f.kind not in MOUNTED]
        for attempt in range(6):
            with ThreadPoolExecutor(2 if ranks == 1 else 1) as pool:
                runs = math.ceil(len(pending) / FAULTS_A_RUN)
                groups = [pending[i::runs] for i in range(runs)]
                lives = [pool.submit(live, Run(runner, ranks, next(number), say), g, whole, mounts) for g in groups]
                hit = [fault for life in lives for fault in life.result()]
            counted += [(ranks, fault) for fault in hit]
            pending = [fault for fault in pending if fault not in hit]
            for fault in pending:  # it came too late; nothing comes earlier than a step
                fault.phase, fault.at = "train", random.Random(fault.seed + attempt).uniform(1, STEPS)
    return counted


def live(run: Run, faults: list[Fault], whole: Path, mounts: bool) -> list[Fault]:
    """One run from its first start to its comparison. Returns the faults that hit it."""
    home = run.watched.home
    with mounted(home, "size=8m") if mounts else nullcontext():
        for fault in in_order(faults):
            if run.watched.status.get("state") != "done":
                run.suffer(fault)
        run.finish(whole)
        if any(fault.lost for fault in run.faults):
            kept = shutil.copytree(home, tempfile.mkdtemp(prefix="caspr-lost-"), dirs_exist_ok=True)
            run.say(f"kept     {kept}")
    return run.faults


def table(counted: list[tuple[int, Fault]]) -> list[str]:
    kinds = list(dict.fromkeys(fault.kind for _, fault in counted))
    phases = {phase: Counter(f.kind for _, f in counted if f.done.split()[0] == phase) for phase in PHASES}
    lines = [f"{'kind':<15} {'faults':>6} {'lost':>5}  " + " ".join(f"{phase:>10}" for phase in PHASES)]
    for kind in [*kinds, "all"]:
        of = [f for _, f in counted if kind in ("all", f.kind)]
        cells = [sum(n for k, n in phases[p].items() if kind in ("all", k)) for p in PHASES]
        lost = sum(bool(f.lost) for f in of)
        lines.append(f"{kind:<15} {len(of):>6} {lost:>5}  " + " ".join(f"{cell:>10}" for cell in cells))
    return lines


def possible() -> list[str]:
    """Return the kinds of faults that this machine allows."""
    return [kind for kind in KINDS if can_mount() or kind not in MOUNTED]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="of faults")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    parser.add_argument("--ranks", default="1,2", help="processes a run; the faults are shared out")
    parser.add_argument("--json", type=Path, help="also write each fault there")
    given = parser.parse_args()
    draw, settings = random.Random(given.seed), [int(ranks) for ranks in given.ranks.split(",")]
    began, kinds, faults = time.monotonic(), possible(), {}
    for i, ranks in enumerate(settings):
        draw.shuffle(kinds)
        share = given.count * (i + 1) // len(settings) - given.count * i // len(settings)
        faults[ranks] = drawn(share, ranks, draw, kinds)
    with tempfile.TemporaryDirectory(prefix="caspr-faults-") as directory:
        home = Path(directory)
        counted = suite(Runner(home, home / "cache"), faults, lambda line: print(line, flush=True))
    lost = [(ranks, fault) for ranks, fault in counted if fault.lost]
    for ranks, fault in lost:
        print(f"LOST     {ranks} ranks, {fault.kind} ({fault.done}): {'; '.join(fault.lost)}")
    print("\n".join(["", *table(counted)]))
    print(f"\n{len(counted)} faults, {len(lost)} lost, {time.monotonic() - began:.0f} s")
    if given.json:
        rows = [{"ranks": r, "kind": f.kind, "moment": f.done, "lost": f.lost} for r, f in counted]
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if lost or len(counted) < given.count else 0


if __name__ == "__main__":
    sys.exit(main())
