import errno
import json
import math
import os
import shlex
import subprocess
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import cast

import pytest

from caspr_cli.common.files import disk_error
from caspr_cli.recipe import compose
from caspr_cli.recipe.schema import AdamWConf, CasprConf, Recipe, Resume, SGDConf, Source
from caspr_cli.runs import guardian, launch, provenance, summary
from caspr_cli.runs import record as record_module
from caspr_cli.runs.processes import LAUNCHER, birth, lives, memory_error
from caspr_cli.runs.record import (
    PLACE,
    Holder,
    Record,
    RecordBusyError,
    RecordDamagedError,
    clear_left,
    own,
)
from caspr_cli.runs.sweep import ENDED, Job
from caspr_cli.tasks.registry import C4LMConf


def recipe(resume: Resume = Resume.auto) -> Recipe:
    return Recipe(task=C4LMConf(), optim=AdamWConf(), resume=resume)


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.write("result.json", {"final": {"val/loss": 0.5, "val/map": math.nan}, "list": [math.inf, 1]})
    assert "NaN" not in (tmp_path / "result.json").read_text()
    assert record.result == {"final": {"val/loss": 0.5, "val/map": None}, "list": [None, 1]}


def test_a_run_that_was_to_begin_anew_does_not_continue_by_the_same_command(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.write("status.json", {"state": "preempted", "step": 5})
    outcome = launch.Outcome(record, 143, ran=True)
    assert any(line.endswith("; the same command continues") for line in summary.footer(outcome))
    assert any("the same command, without resume=never, continues" in x for x in summary.footer(outcome, anew=True))


def test_after_a_sweep_a_line_is_a_command_or_an_address() -> None:
    compare, board, address = summary.after_sweep("my runs")
    assert shlex.split(compare) == ["next", "caspr-report", "compare", "my runs"]
    assert shlex.split(board) == ["tensorboard", "--logdir", "my runs"]
    assert address.split() == ["open", summary.COMPARISON]


def test_what_comes_next_can_be_run() -> None:
    """The sweep has the usual optimizers that have the given keys, and the one that was run."""
    logs, sweep = summary.next_commands(
        Recipe(task=C4LMConf(), optim=CasprConf(), output_dir="my runs"),
        ["caspr-train", "optim.order=3", "resume=never"],
    )
    assert logs.endswith("tensorboard --logdir 'my runs'")
    assert sweep.split() == ["caspr-train", "-m", "optim.order=3", "optim=caspr", "seed=0,1,2"]
    for command, optim in (
        (["optim.eps=1e-7"], "caspr,shampoo,adamw"),
        (["optim=caspr", "optim.merge=none"], "caspr,shampoo"),
    ):
        made = summary.next_commands(Recipe(task=C4LMConf(), optim=CasprConf()), ["caspr-train", *command])
        assert f" optim={optim} " in made[1]
    given = ["optim=lion", "optim.lr=3e-4", "debug=fast", "task.layers=3"]
    made = summary.next_commands(Recipe(task=C4LMConf(), optim=SGDConf()), ["caspr-train", *given])
    expected = ["caspr-train", "-m", "task.layers=3", "optim=sgd,caspr,shampoo,adamw", "search=lr", "trial=range(6)"]
    assert shlex.split(made[1]) == expected
    own = Recipe(task=C4LMConf(data=Source.files, root="mine"), optim=SGDConf())
    made = summary.next_commands(own, ["caspr-train", "task.data=files", "task.root=mine"])
    assert shlex.split(made[1])[-2:] == ["search=lr", "trial=range(6)"]
    made = summary.next_commands(Recipe(task=C4LMConf(), optim=SGDConf()), ["caspr-train", "optim=sgd"])
    assert " optim=sgd,caspr,shampoo,adamw " in made[1]


def test_the_path_says_what_it_is(tmp_path: Path) -> None:
    made = recipe()
    made.output_dir = str(tmp_path)
    made.seed = 4
    path = Record.of(made).path
    assert path.parts[-4:-2] == ("c4_lm", "adamw")
    assert path.name == "seed4"
    assert path.parent.name == compose.identity(made)  # all of its values are defaults
    made.optim.lr, made.optim.betas = 6e-3, [0.9, 0.95]
    path = Record.of(made).path
    assert path.parent.name == f"lr0.006-betas0.9_0.95-{compose.identity(made)}"
    older = path.parent.with_name(compose.identity(made))
    older.mkdir(parents=True)
    assert Record.of(made).path == older / "seed4"


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
    assert found is not None
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


@pytest.mark.parametrize(
    ("returned", "kills", "log", "expected"),
    [
        (-9, True, "", "too little memory: the system ended a worker with SIGKILL; a smaller task.batch_size"),
        (-9, False, "", "a worker ended with SIGKILL; see "),
        (-7, False, "", "a worker ended with SIGBUS: a full disk, or a file that was cut short"),
        (
            -6,
            False,
            "terminate called after throwing an instance of 'std::bad_alloc'",
            "too little memory: std::bad_alloc",
        ),
        (-6, False, "CUDA error: uncorrectable ECC error encountered", "a GPU is broken or gone: uncorrectable ECC"),
        (1, False, "before: MemoryError", "a worker ended with exit status 1; see "),
    ],
)
def test_why_a_worker_ended_that_could_not_say_it(
    tmp_path: Path, returned: int, kills: bool, log: str, expected: str
) -> None:
    file = tmp_path / "log.txt"
    file.write_text(log)
    since = len(log) if log.startswith("before") else 0
    assert launch._why(file, since, returned, kills).startswith(expected)


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


@pytest.mark.parametrize(
    ("status", "resume", "checkpoint", "expected"),
    [
        ({}, Resume.auto, False, "new"),
        ({"state": "done"}, Resume.auto, True, "skip"),
        ({"state": "done"}, Resume.retry, True, "skip"),
        ({"state": "done"}, Resume.never, True, "new"),
        ({"state": "done", "result": "missing"}, Resume.auto, True, "continue"),  # it is evaluated again
        ({"state": "running"}, Resume.auto, True, "continue"),
        ({"state": "running"}, Resume.auto, False, "new"),
        ({"state": "preempted"}, Resume.auto, True, "continue"),
        ({"state": "failed"}, Resume.auto, True, "failed"),
        ({"state": "failed"}, Resume.retry, True, "continue"),
        ({"state": "failed"}, Resume.retry, False, "new"),
        ({"state": "failed", "user_error": True}, Resume.auto, False, "new"),
        ({"state": "failed", "user_error": True}, Resume.auto, True, "continue"),
    ],
)
def test_what_the_same_command_does(
    tmp_path: Path, status: dict[str, object], resume: Resume, checkpoint: bool, expected: str
) -> None:
    record = Record(tmp_path)
    if status:
        (tmp_path / "status.json").write_text(json.dumps(status))
    if status.get("state") == "done" and "result" not in status:
        (tmp_path / "result.json").write_text('{"final": {}}')
    if checkpoint:
        record.checkpoints.mkdir()
        record.last.touch()
    assert launch.plan(recipe(resume), record) == expected


@pytest.mark.parametrize(
    "status", [{"state": "done"}, {"state": "preempted", "step": 8}, {"state": "running", "step": 8}]
)
def test_what_is_left_of_a_run_is_not_deleted_unasked(tmp_path: Path, status: dict[str, object]) -> None:
    """It has come further than nothing, and its checkpoints are away: a disk that is not mounted, say."""
    record = Record(tmp_path)
    record.write("status.json", status)
    with pytest.raises(
        RecordDamagedError, match=r"last\.ckpt is missing or damaged; resume=never starts this run anew"
    ):
        launch.plan(recipe(), record)
    assert launch.plan(recipe(Resume.never), record) == "new"
    record.checkpoints.mkdir()
    record.previous.touch()
    assert launch.plan(recipe(), record) == "continue"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 900])
@pytest.mark.parametrize("name", ["status.json", "result.json"])
def test_a_damaged_file_is_named_and_nothing_is_deleted(tmp_path: Path, name: str, content: bytes) -> None:
    record = Record(tmp_path)
    record.write("status.json", {"state": "done"})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordDamagedError, match=f"{name} is missing or damaged; resume=never starts this run anew"):
        launch.plan(recipe(), record)
    assert launch.plan(recipe(Resume.never), record) == "new"


RESULT = {
    "final": {"val/loss": 4.0}, "best": {"step": 8, "val/loss": 4.0}, "test": {"test/loss": 4.1}, "steps": 16,
    "seconds": 3.0, "target": {"metric": "val/loss", "value": 4.5, "step": 8, "seconds": 2.0},
    "optimizer_seconds": {"roots": 1.0}, "optimizer_state_bytes": 1000,
}  # fmt: skip
ODD = [None, 0, 1, -1.5, "text", True, [], [1], {}, {"step": None}, {"step": "x"}, {"val/loss": "x"}, 10**300]


def shown(record: Record) -> str:
    """Why a record is refused; empty where all that the same command reads and prints of it can be had."""
    try:
        todo = launch.plan(recipe(), record)
        if todo in ("skip", "continue"):
            assert summary.footer(launch.Outcome(record, 0, ran=False))
        with record.held():
            assert 1 + (record.status.get("attempts") or 0) is not None
        found = provenance.begun(record.read("provenance.json"), {"code": None}, 2, "now")
        assert provenance.changes(found) is not None
    except RecordDamagedError as damage:
        return str(damage)
    return ""


@pytest.mark.parametrize("key", [*RESULT, "target.metric", "target.value", "target.step", "target.seconds"])
def test_a_result_of_any_shape_is_shown_or_named(tmp_path: Path, key: str) -> None:
    """Each field of it left out, null, 0, or of another type."""
    record = Record(tmp_path)
    record.write("status.json", {"state": "done"})
    *owner, name = key.split(".")
    for value in [*ODD, "left out"]:
        content = json.loads(json.dumps(RESULT))
        node = content[owner[0]] if owner else content
        node[name] = value
        if value == "left out":
            del node[name]
        (tmp_path / "result.json").write_text(json.dumps(content))
        damage = shown(record)
        assert damage == "" or name in damage or key == "final"  # without a final value it is not done
        assert summary.table([Job(1, [], ENDED, record=str(tmp_path), exit_code=0)])


STATUS = ("state", "error", "step", "attempts", "pid", "born", "host", "started", "updated")
PROVENANCE = ("command", "code", "data", "packages", "machine", "device", "attempts", "python")


@pytest.mark.parametrize(
    ("name", "key"), [*(("status", key) for key in STATUS), *(("provenance", key) for key in PROVENANCE)]
)
def test_a_file_of_any_shape_is_read_or_named(tmp_path: Path, name: str, key: str) -> None:
    record = Record(tmp_path)
    if name == "status":
        record.checkpoints.mkdir()
        record.last.touch()
    for value in ODD:
        inner = {"attempts": [{key: value}]} if key != "attempts" else {}
        of = {"status": {"state": "preempted", "step": 8, key: value}, "provenance": {"code": {}, key: value} | inner}
        (tmp_path / f"{name}.json").write_text(json.dumps(of[name]))
        damage = shown(record)
        assert damage == "" or f"({key} is " in damage or (name == "status" and value is None)


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


def test_a_record_without_a_status_is_not_taken_for_an_empty_directory(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.checkpoints.mkdir()
    with pytest.raises(RecordDamagedError, match=r"status\.json"):
        launch.plan(recipe(), record)


def test_ranks_are_started_by_torch_on_a_port_of_their_own(tmp_path: Path) -> None:
    made = recipe()
    assert launch.worker_command(made, Record(tmp_path))[1:3] == ["-m", "caspr_cli.training.worker"]
    made.trainer.devices = 3
    command = launch.worker_command(made, Record(tmp_path))
    assert command[2:5] == ["torch.distributed.run", "--nproc-per-node=3", "--standalone"]


def report(*ends: tuple[int, str]) -> bytes:
    """The part of what torch's launcher writes that is read."""
    rows = [f"  rank      : {r}\n  exitcode  : {end} (pid: 1{r}) {how}" for r, (end, how) in enumerate(ends)]
    return "\n".join(["Failures:", *rows]).encode()


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([(75, ""), (-9, "(SIGKILL)")], -9),
        ([(75, ""), (-15, "(SIGTERM)")], -9),
        ([(75, "")], 75),
        ([(75, ""), (-11, "(SIGSEGV)")], -11),
        ([(75, ""), (1, "")], 1),
        ([], 1),
    ],
)
def test_of_several_ranks_the_first_cause_counts(ends: list[tuple[int, str]], expected: int) -> None:
    assert launch._first_cause(report(*ends), 1) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)", 75),
        ("watchdog thread terminated with exception: CUDA error: uncorrectable ECC error encountered", 75),
        ("watchdog thread terminated with exception: CUDA error: device-side assert triggered", -6),
    ],
)
def test_a_rank_that_nccl_ended_was_cut_off_unless_it_was_at_fault(said: str, expected: int) -> None:
    assert launch._first_cause(said.encode() + b"\n" + report((-6, "(SIGABRT)")), 1) == expected
