"""The same command given again for a record, and the messages about a run that ended."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from caspr_cli.recipe import compose
from caspr_cli.recipe.schema import AdamWConf, CasprConf, Recipe, Resume, SGDConf, Source
from caspr_cli.report import records
from caspr_cli.runs import launch, provenance, summary
from caspr_cli.runs.record import Record, RecordDamagedError
from caspr_cli.runs.sweep import ENDED, Job
from caspr_cli.tasks.registry import C4LMConf


def recipe(resume: Resume = Resume.auto) -> Recipe:
    return Recipe(task=C4LMConf(), optim=AdamWConf(), resume=resume)


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
    none = Recipe(task=C4LMConf(), optim=AdamWConf(eps=0.0))  # of the others it is the damping, which is above 0
    made = summary.next_commands(none, ["caspr-train", "optim=adamw", "optim.eps=0"])
    assert shlex.split(made[1])[-2:] == ["optim=adamw", "seed=0,1,2"]
    given = ["caspr-train", "-r", "--run", "optim=sgd"]  # a flag beside -m is refused
    made = summary.next_commands(Recipe(task=C4LMConf(), optim=SGDConf()), given)
    assert shlex.split(made[1])[:2] == ["caspr-train", "-m"]
    assert not {"-r", "--run"} & set(shlex.split(made[1]))
    assert " optim=sgd,caspr,shampoo,adamw " in made[1]


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


@pytest.mark.parametrize(
    ("status", "resume", "checkpoint", "expected"),
    [
        ({}, Resume.auto, False, "new"),
        ({"state": "done"}, Resume.auto, True, "skip"),
        ({"state": "done"}, Resume.retry, True, "skip"),
        ({"state": "done"}, Resume.never, True, "new"),
        ({"state": "done", "result": "missing"}, Resume.auto, True, "continue"),  # it is evaluated again
        ({"state": "done", "result": "damaged"}, Resume.auto, True, "continue"),
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
    if status.get("result") == "damaged":
        (tmp_path / "result.json").write_text('{"fi')
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


@pytest.mark.parametrize("cut", [0, 40, 400])
def test_a_config_that_was_cut_short_is_written_again(tmp_path: Path, cut: int) -> None:
    """A report leaves the record out without it, and the run is done."""
    given = replace(recipe(), output_dir=str(tmp_path))
    record = Record.of(given)
    record.path.mkdir(parents=True)
    whole = compose.save(given)
    record.config.write_text(whole[:cut], encoding="utf8")
    record.write("status.json", {"state": "done"})
    record.write("result.json", {"final": {"val/loss": 4.0}})
    assert "config.yaml: " in records.find([tmp_path]).warnings[0]
    assert launch.run(given, ["caspr-train"]).exit_code == 0
    assert record.config.read_text(encoding="utf8") == whole
    assert records.find([tmp_path]).warnings == []
    later = whole.replace("resume: auto", "resume: retry")
    record.config.write_text(later, encoding="utf8")  # of another command: it stays
    assert launch.run(given, ["caspr-train"]).exit_code == 0
    assert record.config.read_text(encoding="utf8") == later


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
