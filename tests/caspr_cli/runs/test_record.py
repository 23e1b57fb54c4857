import errno
import json
import math
import os
import subprocess
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import cast

import pytest

from caspr_cli.common.alive import birth, lives
from caspr_cli.common.files import disk_error
from caspr_cli.recipe import compose
from caspr_cli.recipe.schema import AdamWConf, CasprConf, Recipe
from caspr_cli.runs import guardian, provenance
from caspr_cli.runs import record as record_module
from caspr_cli.runs.processes import LAUNCHER, memory_error
from caspr_cli.runs.record import PLACE, Holder, Record, RecordBusyError, clear_left, own
from caspr_cli.tasks.registry import C4LMConf


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.write("result.json", {"final": {"val/loss": 0.5, "val/map": math.nan}, "list": [math.inf, 1]})
    assert "NaN" not in (tmp_path / "result.json").read_text()
    assert record.result == {"final": {"val/loss": 0.5, "val/map": None}, "list": [None, 1]}


def test_the_path_says_what_it_is(tmp_path: Path) -> None:
    made = Recipe(task=C4LMConf(), optim=AdamWConf())
    made.output_dir = str(tmp_path)
    made.seed = 4
    path = Record.of(made).path
    assert path.parts[-4:-2] == ("c4_lm", "adamw")
    assert path.name == "seed4"
    assert path.parent.name == compose.identity(made)  # all of its values are defaults
    made.optim.lr, made.optim.betas = 6e-3, [0.9, 0.95]
    path = Record.of(made).path
    assert path.parent.name == f"lr0.006-betas0.9_0.95-{compose.identity(made)}"
    for before in ("", "lr0.006-start_step10-"):  # by the identity alone, or where another default was no default
        older = path.parent.with_name(before + compose.identity(made))
        older.mkdir(parents=True)
        assert Record.of(made).path == older / "seed4"
        older.rmdir()


def test_a_name_is_short_and_safe(tmp_path: Path) -> None:
    made = Recipe(task=C4LMConf(), optim=CasprConf(), output_dir=str(tmp_path))
    made.optim.polar, made.optim.eps, made.optim.order = False, 1e-9, math.inf
    name = Record.of(made).path.parent.name
    assert name == f"eps1e-9-no_polar-orderinf-{compose.identity(made)}"
    for key in ("interval", "start_step", "block_size", "weight_decay"):
        setattr(made.optim, key, 77)
    name = Record.of(made).path.parent.name
    assert len(name) <= compose.LONGEST_NAME + len("-more-") + 8
    assert name.endswith(f"-more-{compose.identity(made)}")


def test_one_writer(tmp_path: Path) -> None:
    record = Record(tmp_path / "r")
    with record.held():
        record.write("status.json", {"pid": 123, "host": "here", "started": "then"})
        with pytest.raises(RecordBusyError, match=r"by process 123 on here \(since then\)"), record.held():
            pass
        record.write("status.json", asdict(Holder.me()))
        began = time.monotonic()
        with pytest.raises(RecordBusyError, match=f"by process {os.getpid()} on "), record.held():
            pass
        assert time.monotonic() - began < 1  # who lives is not waited for
    with record.held():
        pass


@pytest.mark.parametrize("before", [{}, {"state": "preempted"}, {"pid": "dead"}])
def test_who_has_not_written_its_status_yet_is_named(tmp_path: Path, before: dict[str, object]) -> None:
    """And it is not waited for as for a dead process, which the old status may name."""
    record = Record(tmp_path)
    record.write("status.json", dead() if before.get("pid") else before)
    with record.held():
        began = time.monotonic()
        with pytest.raises(RecordBusyError, match=rf"by process {os.getpid()} on [^?]+$"), record.held():
            pass
        assert time.monotonic() - began < 1


def dead() -> dict[str, object]:
    """Return what a process that has ended wrote into ``status.json``."""
    process = subprocess.Popen(["true"])
    process.wait()
    return asdict(Holder.me()) | {"pid": process.pid, "born": None}


def test_who_leads_holds_the_lock_and_says_so(tmp_path: Path) -> None:
    """Nobody joins a launcher that was cut off, although ``status.json`` still names it."""
    record = Record(tmp_path)
    assert record.leader is None
    left = {"state": "running"} | dead()
    record.write("status.json", left)
    with record.held():
        assert record.leader is None
        me = Holder.me()
        record.write("status.json", {"state": "running"} | asdict(me))
        assert record.leader == me
        record.update_status(state="done")
        assert record.leader is None
        record.write("status.json", left)  # as it was while this one waits for old workers
        assert record.leader is None
    record.write("status.json", {"state": "running"} | asdict(me))
    assert record.leader is None


def test_a_process_is_its_number_and_its_birth() -> None:
    assert lives(os.getpid(), birth(os.getpid()))
    assert lives(os.getpid())
    assert not lives(cast(int, dead()["pid"]))
    assert not lives(2**40)
    if Path("/proc").exists():
        assert not lives(os.getpid(), cast(int, birth(os.getpid())) - 1)
        process = subprocess.Popen(["true"])
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
        assert not lives(process.pid)
        process.wait()


@pytest.mark.parametrize("lock", ["held", "joined"])
def test_what_a_dead_launcher_left_is_waited_for(tmp_path: Path, lock: str) -> None:
    record, said = Record(tmp_path), []
    record.write("status.json", dead())
    with ExitStack() as left:
        left.enter_context(getattr(record, lock)())
        (tmp_path / ".lock").write_bytes(Holder.of(record).mark)  # of the dead one: the lock is what its worker holds
        threading.Timer(0.3, left.pop_all().close).start()
        began = time.monotonic()
        with record.held(said.append):
            assert 0.2 < time.monotonic() - began < 10
    assert [line.startswith("wait     process ") for line in said] == [True]


def test_it_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "SECONDS_TO_WAIT", 0.2)
    record = Record(tmp_path)
    record.write("status.json", dead())
    with record.joined():
        with pytest.raises(RecordBusyError, match=r"by a worker that process \d+ on .* left"), record.held():
            pass
        with record.joined():  # ranks are several
            pass


def test_half_written_files_are_cleared_away_and_no_others(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.checkpoints.mkdir()
    half = [".status.json.k3_x9z0a", ".metrics.jsonl.abcdefgh", ".config.yaml.01234567", ".waited.1"]
    half += [f"checkpoints/.{name}.ckpt" for name in ("writing", "best", "previous")]
    whole = ["status.json", "metrics.jsonl", ".mine", "checkpoints/last.ckpt", "log.txt"]
    for name in (*half, *whole):
        (tmp_path / name).write_text("{}")
    with record.held():
        pass
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*whole, ".lock", ".ranks.lock"}


def test_an_error_of_the_disk_is_found_behind_others() -> None:
    def error() -> Exception:
        try:
            try:
                raise OSError(errno.ENOSPC, "No space left on device", "file")
            except OSError:
                raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904
        except RuntimeError as found:
            return found

    found = disk_error(error(), PLACE)
    assert found.filename == "file"
    assert disk_error(FileNotFoundError(errno.ENOENT, "No such file"), PLACE) is None
    assert disk_error(ValueError(), PLACE) is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "there is not enough"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "[Errno 12] Cannot allocate memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nto"),
            "DefaultCPUAllocator: can't allocate",
        ),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "libtorch_cpu.so: failed to map"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "CUDA out of memory"),
        (ValueError("out of memory"), None),
        (RuntimeError("size mismatch"), None),
    ],
)
def test_too_little_memory_is_known_by_many_names(error: Exception, expected: str | None) -> None:
    found = memory_error(error)
    assert found is None if expected is None else found is not None and found.startswith(expected)


def test_folders_of_commands_that_were_killed_are_cleared_away_and_no_others(tmp_path: Path) -> None:
    for name in ("mine", "left", "elsewhere", "nobodys", "damaged"):
        (tmp_path / name).mkdir()
    own(tmp_path / "mine")
    gone = dead()
    (tmp_path / "left" / ".owner").write_text(json.dumps([gone["host"], gone["pid"], None]))
    (tmp_path / "elsewhere" / ".owner").write_text(json.dumps(["another host", gone["pid"], None]))
    (tmp_path / "damaged" / ".owner").write_text("[")
    clear_left(tmp_path, "*")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "elsewhere", "nobodys", "damaged"}


def test_what_a_killed_sweep_left_ends(tmp_path: Path) -> None:
    """Idle processes at once; one with a job and its worker when they have saved; Python's tracker by itself."""
    environment = os.environ | {guardian.SWEEP: str(tmp_path)}
    idle, busy = (subprocess.Popen(["sleep", "60"], env=environment) for _ in range(2))
    worker = subprocess.Popen(["sleep", "60"], env=environment | {LAUNCHER: str(busy.pid)})
    words = ["sh", "-c", "read line", "multiprocessing.resource_tracker"]
    tracker = subprocess.Popen(words, env=environment, stdin=subprocess.PIPE)
    job = {"state": "started", "process": busy.pid}
    (tmp_path / "job1.json").write_text(json.dumps(job))
    thread = threading.Thread(target=guardian.end, args=(tmp_path, 30))
    thread.start()
    assert idle.wait(10) == -9
    time.sleep(0.5)
    assert (busy.poll(), worker.poll(), tracker.poll()) == (None, None, None)
    assert (tmp_path / "stop").read_text() == "15\n"
    worker.kill()
    worker.wait()
    (tmp_path / "job1.json").write_text(json.dumps(job | {"state": "ended"}))
    assert busy.wait(10) == -9
    assert tracker.poll() is None
    tracker.communicate(b"\n", 10)
    thread.join(10)
    assert not tmp_path.exists()


def test_what_an_attempt_ran_with_is_kept_beside_the_first() -> None:
    one = {"command": ["a"], "code": {"commit": "1" * 40}, "packages": {"torch": "2.9.0"}, "python": "3.11"}
    two = one | {"command": ["b"], "packages": {"torch": "2.14.1", "tensorboard": "9"}}
    here = {"data": {"hash": "f00d"}, "device": {"name": "cpu"}}
    first = provenance.completed(provenance.begun({}, one, 1, "then"), here)
    assert first == one | here
    assert provenance.changes(first) == []
    where = {"data": {"hash": "f00d"}, "device": {"name": "H100"}}
    again = provenance.completed(provenance.begun(first, two, 2, "now"), where)
    assert {key: again[key] for key in first} == first
    assert again["attempts"] == [
        {"attempt": 2, "started": "now", "command": ["b"], "packages": two["packages"], "device": {"name": "H100"}}
    ]
    assert provenance.changes(again) == ["device cpu, now H100", "torch 2.9.0, now 2.14.1"]
    same = provenance.completed(provenance.begun(again, one, 3, "later"), {"device": {"name": "cpu"}})
    assert same["attempts"][1:] == [{"attempt": 3, "started": "later"}]
    assert provenance.changes(same) == []
    old = provenance.completed(provenance.begun(one, one, 2, "now"), where)  # its first attempt did not say which data
    assert old["data"] == {"hash": "f00d"}
