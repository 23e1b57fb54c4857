"""Decisions and messages of sweeps, without a single run."""

import json
import os
import pickle
import re
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from caspr_cli.recipe import compose
from caspr_cli.recipe.composer import Composer
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Accelerator, CasprConf, Recipe
from caspr_cli.runs import summary, sweep
from caspr_cli.runs.launch import Allocation, Outcome
from caspr_cli.runs.record import Record
from caspr_cli.runs.session import Session
from caspr_cli.runs.sweep import ENDED, LOST, REFUSED, STARTED, WAITING, Job, Sweep, share, visible_gpus
from caspr_cli.tasks.registry import C4LMConf


def recipe(devices: int = 1, accelerator: str = "auto") -> Recipe:
    made = Recipe(task=C4LMConf(), optim=CasprConf())
    made.trainer.devices, made.trainer.accelerator = devices, Accelerator[accelerator]
    return made


def made(folder: Path, **changes: Any) -> Sweep:
    return Sweep(folder, **({"launcher": "joblib", "here": False, "at_once": 2} | changes))


@pytest.mark.parametrize(
    ("environment", "files", "gpus"),
    [
        ({}, 0, ()),
        ({}, 3, ("0", "1", "2")),
        ({"CUDA_VISIBLE_DEVICES": "2, 5"}, 8, ("2", "5")),
        ({"CUDA_VISIBLE_DEVICES": ""}, 8, ()),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,3"}, 8, ("1",)),  # CUDA stops at the first that is none
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f1a,MIG-77"}, 2, ("GPU-8f1a", "MIG-77")),
    ],
)
def test_gpus_are_those_that_cuda_would_see(environment: dict[str, str], files: int, gpus: tuple[str, ...]) -> None:
    assert visible_gpus(environment, [Path(f"/dev/nvidia{k}") for k in range(files)]) == gpus


def test_jobs_take_disjoint_shares_of_the_machine() -> None:
    gpus = ("4", "5", "6", "7", "8")
    shares = [share(recipe(devices=2), slot, 2, cores=16, gpus=gpus) for slot in range(2)]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in shares] == ["4,5", "6,7"]
    assert {s["OMP_NUM_THREADS"] for s in shares} == {"4"}  # 16 cores, two jobs of two ranks
    assert share(recipe(), 0, 8, cores=4, gpus=()) == {"OMP_NUM_THREADS": "1"}
    assert "CUDA_VISIBLE_DEVICES" not in share(recipe(accelerator="cpu"), 0, 8, cores=4, gpus=("0",))


def test_a_share_with_too_few_gpus_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^trainer.devices=2, but 3 jobs at a time share 4 GPUs, 1 each: lower"):
        share(recipe(devices=2), 0, 3, cores=4, gpus=("0", "1", "2", "3"))
    with pytest.raises(ConfigError, match="0 each"):  # it would train on the CPU instead
        share(recipe(), 0, 2, cores=4, gpus=("0",))


@pytest.mark.parametrize(
    ("kind", "n_jobs", "at_once"),
    [
        ("BasicLauncher", None, 1),
        ("JoblibLauncher", 2, 2),
        ("JoblibLauncher", 20, 6),
        ("JoblibLauncher", -1, 4),
        ("JoblibLauncher", -2, 3),
        ("JoblibLauncher", -9, 1),
        ("LocalLauncher", None, 6),
        ("SlurmLauncher", None, None),
        ("RayLauncher", None, None),
    ],
)
def test_how_many_jobs_share_this_machine(kind: str, n_jobs: int | None, at_once: int | None) -> None:
    launcher = OmegaConf.create({"_target_": f"hydra_plugins.some.{kind}", "n_jobs": n_jobs})
    assert sweep.jobs_at_once(launcher, jobs=6, cores=4) == at_once


def test_a_slot_is_free_again(tmp_path: Path) -> None:
    one = made(tmp_path)
    with one.allocation(recipe(accelerator="cpu")) as first, one.allocation(recipe(accelerator="cpu")) as second:
        assert first.environment["OMP_NUM_THREADS"] == second.environment["OMP_NUM_THREADS"]
        assert {p.name for p in tmp_path.glob("slot*")} == {"slot0", "slot1"}
    with one.allocation(recipe()):
        pass


def test_threads_are_the_users_where_they_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    given = made(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")  # as a launcher sets them for its processes
    monkeypatch.setenv("MKL_NUM_THREADS", "64")
    with given.allocation(recipe()) as given_share:
        assert given_share.environment["OMP_NUM_THREADS"] == "3"
        assert given_share.environment["MKL_NUM_THREADS"] is None


def test_a_sweep_whose_folder_is_gone_is_over(tmp_path: Path) -> None:
    one = made(tmp_path / "id")
    one.folder.mkdir()
    assert one.stop_requests() == []
    one.request_stop(signal.SIGINT)
    one.request_stop(signal.SIGTERM)
    assert one.stop_requests() == [signal.SIGINT, signal.SIGTERM]
    one.end(whole=True)
    assert one.stop_requests() == [signal.SIGTERM]
    one.note(Job(1, []))  # and so what it says late is not heard
    assert not one.folder.exists()


def test_jobs_of_a_cluster_may_start_after_the_command_has_ended(tmp_path: Path) -> None:
    one = made(tmp_path, launcher="slurm", at_once=None)
    one.end(whole=False)
    assert one.folder.exists()


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_begins_with_a_file_for_each_job(launcher: str, tmp_path: Path) -> None:
    if launcher != "basic":
        pytest.importorskip(launcher)
    given = ["optim=caspr,adamw", "seed=range(2)", f"output_dir={tmp_path}", f"hydra/launcher={launcher}"]
    composer = Composer(given, sweeps=True)
    begun = Sweep.begin(composer, composer.jobs())
    jobs = begun.jobs()
    assert [j.number for j in jobs] == [1, 2, 3, 4]
    assert summary.names(jobs) == [
        "optim=caspr seed=0", "optim=caspr seed=1", "optim=adamw seed=0", "optim=adamw seed=1",
    ]  # fmt: skip
    assert (begun.here, begun.launcher, begun.folder.parent) == (launcher == "basic", launcher, tmp_path / ".sweep")
    if not begun.here:  # what a job elsewhere reads is what is composed here
        here = compose.freeze(composer.config(jobs[3].overrides))
        assert compose.freeze(begun.config(4)) == here
        assert pickle.loads(pickle.dumps(Session(["caspr-train"], begun))).sweep == begun


def test_jobs_that_want_different_things_of_the_launcher(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    given = ["hydra/launcher=slurm", "trainer.devices=1,2", f"output_dir={tmp_path}"]
    composer = Composer(given, sweeps=True)
    with pytest.raises(ConfigError, match=r"gpus_per_node would be 1 for one job and 2 for another: give one for all"):
        Sweep.begin(composer, composer.jobs())
    assert list(tmp_path.iterdir()) == []


def test_only_a_process_that_is_gone_is_lost(tmp_path: Path) -> None:
    one = made(tmp_path)
    here = Job(1, [], STARTED, host=socket.gethostname(), process=os.getpid(), record="r")
    gone = Job(2, [], STARTED, host=socket.gethostname(), process=2**22 + 1, record="r")
    elsewhere = Job(3, [], STARTED, host="node7", process=2**22 + 1, record="r")
    assert [one.lost(job) for job in (here, gone, elsewhere)] == [False, True, False]
    for job in (here, gone):
        one.note(job)
    assert (one.twin(gone), one.twin(here)) == (True, False)


def record(folder: Path, state: str, error: str | None = None, **more: Any) -> str:
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"state": state, "error": error} | more))
    if state == "done":
        target = {"metric": "val/loss", "value": None, "step": None}
        scores = {"final": {"val/loss": 4.0364}, "test": {"test/loss": 4.1976}}
        (folder / "result.json").write_text(json.dumps({"target": target, "seconds": 166.0} | scores))
    return str(folder)


def test_thirty_jobs_can_be_read(tmp_path: Path) -> None:
    grid = [(optim, seed) for optim in ("caspr", "full_adagrad", "sgd") for seed in range(10)]
    jobs = [
        Job(n, ["output_dir=out", f"optim={o}", f"seed={seed}"], ENDED, record(tmp_path / f"{n}", "done"), 0, n != 2)
        for n, (o, seed) in enumerate(grid, 1)
    ]
    failed = record(tmp_path / "bad", "failed", "ValueError: no\nmore of it")
    cut = record(tmp_path / "cut", "preempted", "a worker ended with SIGKILL", step=12)
    jobs[4:9] = [
        Job(5, jobs[4].overrides, ENDED, failed, 1),
        Job(6, jobs[5].overrides, ENDED, cut, 143),
        Job(7, jobs[6].overrides, REFUSED, None, 2, why="optim.lr should be >= 0 but is -1"),
        Job(8, jobs[7].overrides, LOST, cut),
        Job(9, jobs[8].overrides, WAITING),
    ]
    head, titles, *lines = summary.table(jobs)
    assert head == ("sweep    30 jobs: 24 done, 1 done before, 1 failed, 1 cut off, 1 refused, 1 lost, 1 not started")
    assert [int(line.split()[0]) for line in lines] == list(range(1, 31))
    assert not any("output_dir" in line for line in lines)  # what all have says nothing
    column = titles.index("result")
    assert all(line[column:].startswith("val/loss 4.0364  test/loss 4.1976  2 min 46 s") for line in lines[9:])
    assert len({line.index(str(tmp_path)) for line in lines[9:]}) == 1
    assert lines[4].endswith(f"{failed}/log.txt")
    assert "ValueError: no" in lines[4]
    assert "more of it" not in lines[4]
    assert "SIGKILL; before the first checkpoint" in lines[5]
    assert lines[6].endswith("optim.lr should be >= 0 but is -1")
    assert "the same command continues" in lines[7]
    assert lines[8].endswith("not started")


def test_two_hundred_jobs_can_be_read(tmp_path: Path) -> None:
    grid = [(optim, seed) for optim in ("caspr", "adamw") for seed in range(100)]
    jobs = [
        Job(n, [f"optim={o}", f"seed={seed}"], ENDED, record(tmp_path / o / f"seed{seed}", "done"), 0)
        for n, (o, seed) in enumerate(grid, 1)
    ]
    jobs[7] = Job(8, jobs[7].overrides, REFUSED, None, 2, why="no data")
    head, titles, *lines = summary.table(jobs)
    assert head == "sweep    200 jobs: 199 done, 1 refused"
    assert "mean ± sd" in titles
    assert len(lines) == 3
    assert lines[0].split()[:2] == ["99", "optim=caspr"]
    assert "val/loss 4.0364 ± 0.0000  test/loss 4.1976 ± 0.0000  n = 99" in lines[0]
    assert lines[0].endswith(str(tmp_path / "caspr"))
    assert lines[1].startswith("8 ")
    assert "no data" in lines[1]
    many = [Job(n, [f"optim.lr={n}"], REFUSED, None, 2, why="no") for n in range(1, 101)]
    lines = summary.table(many)
    assert len(lines) == 2 + summary.MOST_ROWS + 1
    assert lines[-1].startswith("... and 60 more")


def test_a_launcher_that_waits_for_ever_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs in a queue need not start any more once those that ran have ended."""
    monkeypatch.setattr(sweep, "PATIENCE", 0.1)
    monkeypatch.setattr(sweep, "LOOK", 0.02)
    one = made(tmp_path, launcher="slurm", at_once=None)
    one.note(Job(1, ["seed=0"]))
    one.note(Job(2, ["seed=1"], ENDED, "record", 0))
    ended: list[int] = []
    before = signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    started = time.monotonic()

    def launch() -> None:
        with sweep.watching(one, print, lambda job: ended.append(job.number)):
            os.kill(os.getpid(), signal.SIGINT)
            while time.monotonic() - started < 30:
                time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        launch()
    assert time.monotonic() - started < 20
    assert ended == [2]
    assert one.stop_requests() == [signal.SIGINT]
    assert (signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, [])) == before


# ---- one line a job ----------------------------------------------------------------------------------------------


def test_on_a_narrow_terminal_the_table_is_without_records(tmp_path: Path) -> None:
    jobs = [
        Job(n, [f"optim={optim}"], ENDED, record(tmp_path / optim, "done"), 0)
        for n, optim in enumerate(("caspr", "adamw"), 1)
    ]
    failed = record(tmp_path / "bad", "failed", "ValueError: no")
    lines = summary.table(jobs, 80)
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "(no room for the records: caspr-report list has them)"
    assert not any(str(tmp_path) in line for line in lines)
    lines = summary.table([*jobs, Job(3, ["optim=sgd"], ENDED, failed, 1)], 80)
    assert f"{failed}/log.txt" in lines[-2]  # where to look stays


@pytest.mark.parametrize(
    ("ran", "before", "waiting", "seconds", "said"),
    [
        (0, 0, 8, 100.0, ""),
        (0, 2, 6, 1.0, ""),  # they were done before, and say nothing
        (2, 0, 6, 40.0, ", 2 min left"),
        (2, 2, 4, 40.0, ", 80 s left"),
        (3, 0, 5, 3 * 3600.0, ", 5 h left"),
        (8, 0, 0, 100.0, ""),
    ],
)
def test_how_long_the_jobs_that_are_left_take(ran: int, before: int, waiting: int, seconds: float, said: str) -> None:
    states = [(ENDED, True)] * ran + [(ENDED, False)] * before + [(WAITING, True)] * waiting
    jobs = [Job(n, [], state, ran=did) for n, (state, did) in enumerate(states, 1)]
    assert summary.left(jobs, seconds) == said


def test_in_an_experiment_a_job_has_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = []

    def ran(recipe: Recipe, command: list[str], allocation: Allocation) -> Outcome:
        labels.append(allocation.brief)
        path = Record.of(recipe).path
        good = recipe.seed == 1
        record(path, "done" if good else "failed", None if good else "ValueError: no")
        return Outcome(Record.of(recipe), 0 if good else 1, ran=True)

    monkeypatch.setattr("caspr_cli.runs.session.run", ran)
    Session(["caspr-train"], brief=True).all(
        Composer(["optim=adamw", "trainer.max_steps=5,6", "seed=1,2", f"output_dir={tmp_path}"], sweeps=True)
    )
    lines = capsys.readouterr().out.splitlines()
    assert labels == [f"job {n} of 4" for n in (1, 2, 3, 4)]
    assert len(lines) == 4
    assert re.fullmatch(
        r"job 1 of 4, \d+ (s|min) left  trainer.max_steps=5 seed=1  val/loss 4.0364  2 min 46 s", lines[0]
    )
    assert "  failed  ValueError: no  " in lines[1]
    assert lines[3].startswith("job 4 of 4  ")


@pytest.mark.parametrize("brief", [True, False])
def test_an_output_directory_that_is_removed_is_named(
    brief: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No other job starts, and the same command can be given again."""
    output_dir = tmp_path / "runs"

    def ran(recipe: Recipe, *_: object) -> Outcome:
        shutil.rmtree(output_dir)
        return Outcome(Record.of(recipe), 143, ran=True)

    monkeypatch.setattr("caspr_cli.runs.session.run", ran)
    monkeypatch.chdir(tmp_path)
    session = Session(["caspr-train"], brief=brief)
    session.all(Composer(["optim=adamw", "seed=1,2", "output_dir=runs"], sweeps=True))
    assert session.end() == 143
    out, err = capsys.readouterr()
    assert err == "error: runs was removed while jobs ran; the same command begins anew\n"
    if brief:
        assert out == ""
        return
    where = Path("runs/c4_lm/adamw")
    assert re.search(rf"\ncut off  {where}/\S+/seed1 was removed while the run wrote to it; the same command", out)
    assert "job 2 of 2" not in out
