"""Sweeps with real processes: by Hydra's own launcher, and by the plugins of the extras."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from running import Process, Runner, losses

pytestmark = pytest.mark.release

JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
LONG = "trainer.max_steps=20000"

# Runs in every process of a run; what is measured is the process group itself, at its end.
MEASURE = """
import atexit, os, sys

def measure():
    dist = sys.modules.get("torch.distributed")
    if "caspr_cli.training.worker" in sys.orig_argv and "torch.distributed.run" not in sys.orig_argv:
        world = dist.get_world_size() if dist and dist.is_initialized() else 1
        with open(os.path.join(os.environ["MEASURED"], str(os.getpid())), "w") as file:
            file.write(f"{sys.argv[-1]} {world}")

atexit.register(measure)
"""


def start(runner: Runner, *overrides: str, **environment: str) -> Process:
    """In a process group of its own, as a shell starts a command."""
    return runner.start("-m", *overrides, env=environment, process_group=0)


def finish(process: Process, expect: int) -> str:
    out = process.ended(expect)
    assert "Traceback" not in out, out
    return out


def rows(out: str) -> dict[int, str]:
    """Return the table's lines by job. A long home directory hides columns; the line that says so is left out."""
    table = out[out.rindex("sweep  ") :].partition("\nnext  ")[0].splitlines()[2:]
    return {int(line.split()[0]): line for line in table if not line.startswith("(no room")}


def records(runner: Runner, output_dir: str) -> list[Path]:
    return sorted(p.parent for p in (runner.home / output_dir).glob("*/*/*/*/status.json"))


def state(record: Path) -> str:
    return str(json.loads((record / "status.json").read_text())["state"])


def until(condition: Callable[[], Any], what: str) -> Any:
    for _ in range(3000):
        if found := condition():
            return found
        time.sleep(0.04)
    raise AssertionError(f"never: {what}")


def training(runner: Runner, output_dir: str, lines: int = 3) -> list[Path]:
    """Records that have got so far."""
    found = (runner.home / output_dir).glob("*/*/*/*/metrics.jsonl")
    return sorted(f.parent for f in found if len(f.read_text().splitlines()) >= lines)


def processes(*words: str) -> list[int]:
    """Return the processes whose command line has all of these words."""
    lines = {p.pid: " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])}
    return [pid for pid, line in lines.items() if all(word in line for word in words)]


def no_session_is_left(runner: Runner, output_dir: str) -> bool:
    return not list((runner.home / output_dir / ".sweep").glob("[0-9]*"))


def test_each_job_has_a_process_group_of_its_own(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(MEASURE)
    (tmp_path / "measured").mkdir()
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    sweep = ["output_dir=mixed", "trainer.max_steps=4", "trainer.devices=1,2,1"]
    out = finish(start(runner, *sweep, PYTHONPATH=path, MEASURED=str(tmp_path / "measured")), expect=0)
    measured = sorted(f.read_text() for f in (tmp_path / "measured").iterdir())
    by_world = {w: [line for line in measured if line.endswith(f" {w}")] for w in (1, 2)}
    assert {w: len(lines) for w, lines in by_world.items()} == {1: 1, 2: 2}  # the third job is the first
    for record in records(runner, "mixed"):
        said = json.loads((record / "provenance.json").read_text())["device"]["processes"]
        assert any(str(record) in line for line in by_world[said])
    assert ["done before" in row for row in rows(out).values()] == [False, False, True]
    assert no_session_is_left(runner, "mixed")


FAIL = """
import os, sys

if "caspr_cli.training.worker" in sys.orig_argv and sys.orig_argv[-1].endswith("seed0"):
    os._exit(1)
"""


def test_a_job_that_fails_or_is_killed_harms_no_other(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAIL)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    sweep = ["output_dir=harm", "trainer.max_steps=80", "seed=0,1,2", "optim.eps=1e-6,-1"]
    process = start(runner, *sweep, PYTHONPATH=path)
    (record,) = until(lambda: training(runner, "harm"), "a run that trains")
    (worker,) = processes("caspr_cli.training.worker", str(record))
    os.kill(worker, signal.SIGKILL)
    out = finish(process, expect=3)
    assert "sweep    6 jobs: 1 failed, 3 refused, 1 cut off, 1 done" in out
    table = rows(out)
    assert "exit status 1" in table[1]
    assert "log.txt" in table[1]
    assert "optim.eps should be > 0 but is -1.0" in table[2]
    assert "SIGKILL" in table[3]
    assert {state(r) for r in records(runner, "harm")} == {"failed", "preempted", "done"}
    again = finish(start(runner, *sweep, PYTHONPATH=path), expect=3)
    assert "sweep    6 jobs: 1 failed before, 3 refused, 1 done, 1 done before" in again
    assert json.loads((record / "status.json").read_text())["attempts"] == 2


def test_ctrl_c_saves_the_job_and_starts_no_other(runner: Runner) -> None:
    process = start(runner, "output_dir=stopped", LONG, "seed=0,1,2")
    (record,) = until(lambda: training(runner, "stopped"), "a run that trains")
    os.killpg(process.pid, signal.SIGINT)
    out = finish(process, expect=130)
    assert "sweep    3 jobs: 1 cut off, 2 not started" in out
    assert "saved at step" in rows(out)[1]
    assert records(runner, "stopped") == [record]
    assert no_session_is_left(runner, "stopped")


@pytest.fixture(scope="module")
def side_by_side(runner: Runner) -> str:
    """Return the output of a sweep with one recipe twice and half the jobs refused."""
    pytest.importorskip("joblib")
    process = start(runner, *JOBLIB, "output_dir=pair", "seed=0,0,1", "trainer.accumulate=1,3")
    return finish(process, expect=3)


def test_jobs_run_side_by_side(runner: Runner, side_by_side: str) -> None:
    out = side_by_side
    assert "sweep    6 jobs: " in out
    assert "6 jobs, 2 at a time (hydra/launcher=joblib)" in out
    table = rows(out)
    assert ["task.batch_size should be a multiple" in table[k] for k in range(1, 7)] == [False, True] * 3
    assert [("done" in table[k]) for k in range(1, 7)] == [True, False] * 3
    assert [("done before" in table[k]) for k in (1, 3, 5)].count(True) == 1  # one run, whichever was first
    first = {line.split(" ")[0] for line in out.splitlines()}
    numbers = set("123456")
    assert first <= {"caspr-train", "start", "done", "refused", "sweep", "open", "next", "", "(no"} | numbers
    assert [state(r) for r in records(runner, "pair")] == ["done", "done"]
    assert no_session_is_left(runner, "pair")


def test_jobs_of_one_machine_share_its_cores(runner: Runner) -> None:
    pytest.importorskip("joblib")
    environment = runner.environment.copy()
    del environment["OMP_NUM_THREADS"]
    overrides = ["-m", *JOBLIB, "output_dir=share", "trainer.max_steps=2", "seed=0,1"]
    subprocess.run(runner.command(*overrides), cwd=runner.home, env=environment, check=True, capture_output=True)
    for record in records(runner, "share"):
        threads = json.loads((record / "provenance.json").read_text())["device"]["threads"]
        assert threads == max(1, len(os.sched_getaffinity(0)) // 2)


def test_ctrl_c_saves_the_jobs_side_by_side(runner: Runner, side_by_side: str) -> None:
    process = start(runner, *JOBLIB, "output_dir=both", "trainer.max_steps=20000,20", "seed=0,1")
    until(lambda: len(training(runner, "both")) == 2, "two runs that train")
    os.killpg(process.pid, signal.SIGINT)  # the terminal sends it to all of the group
    out = finish(process, expect=130)
    assert "sweep    4 jobs: 2 cut off, 2 not started" in out
    assert out.count("stop     jobs that run save and end") == 1
    assert [state(r) for r in records(runner, "both")] == ["preempted", "preempted"]
    assert out.count("saved at step") == 4  # as each ended, and in the table
    assert no_session_is_left(runner, "both")
    assert until(lambda: not processes("caspr_cli", str(runner.home / "both")), "all processes gone")


def test_the_process_of_a_job_is_killed(runner: Runner, side_by_side: str) -> None:
    """Not its worker, but that of the launcher: joblib gives up, and what was lost is said, and continued."""
    sweep = [*JOBLIB, "output_dir=lost", "trainer.max_steps=200", "seed=0,1"]
    process = start(runner, *sweep)
    (record, _) = until(lambda: len(r := training(runner, "lost")) == 2 and r, "two runs that train")
    job = json.loads((record / "status.json").read_text())["pid"]
    os.kill(job, signal.SIGKILL)
    out = finish(process, expect=3)
    assert "error: hydra/launcher=joblib: TerminatedWorkerError" in out
    assert "lost" in rows(out)[1]
    again = finish(start(runner, *sweep), expect=0)
    assert set(rows(again)) == {1, 2}


def test_preempted_it_is_requeued_and_ends_the_same(runner: Runner, side_by_side: str) -> None:
    pytest.importorskip("submitit")
    sweep = ["hydra/launcher=submitit_local", "seed=0", "output_dir=preempted"]
    process = start(runner, *sweep)
    (record,) = until(lambda: training(runner, "preempted"), "a run that trains")
    (job,) = processes("submitit.core._submit", str(runner.home / "preempted"))
    os.kill(job, signal.SIGUSR2)
    out = finish(process, expect=0)
    assert json.loads((record / "status.json").read_text())["attempts"] == 2
    assert out.count("start    job 1") == 1
    assert losses(record) == losses(runner.record("pair"))
    assert processes("submitit", str(runner.home / "preempted")) == []


FAKE_SBATCH = """#!/bin/sh
cp "$1" "$SUBMITTED"
echo "Submitted batch job 77"
"""
FAKE_SACCT = """#!/bin/sh
printf 'JobID|State\n77_0|FAILED\n77_1|FAILED\n'
"""


def test_a_cluster_is_asked_for_what_a_job_needs(runner: Runner, tmp_path: Path) -> None:
    """SLURM as far as it goes without one: what is submitted, and what is said of jobs that never come."""
    pytest.importorskip("submitit")
    for name, script in {"sbatch": FAKE_SBATCH, "srun": "#!/bin/sh\n", "sacct": FAKE_SACCT}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    sweep = ["hydra/launcher=slurm", "hydra.launcher.partition=big", "output_dir=cluster", "trainer.devices=2"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    process = start(runner, *sweep, "seed=0,1", PATH=path, SUBMITTED=str(tmp_path / "script"))
    out = finish(process, expect=2)
    assert re.search("^error: hydra/launcher=slurm: UncompletedJobError", out, re.MULTILINE)
    asked = set((tmp_path / "script").read_text().splitlines())
    for line in ("array=0-1%2", "ntasks-per-node=1", "gpus-per-node=2", "partition=big", "nodes=1", "job-name=caspr"):
        assert f"#SBATCH --{line}" in asked
    assert any(line.startswith("#SBATCH --signal=USR2@") for line in asked)


def test_ray_runs_jobs(runner: Runner, side_by_side: str) -> None:
    pytest.importorskip("ray")
    init = "hydra.launcher.ray.init"
    sweep = [f"+{init}.num_cpus=2", f"+{init}.include_dashboard=false", "seed=0", "trainer.accumulate=1,3"]
    out = finish(start(runner, "hydra/launcher=ray", *sweep, "output_dir=rays"), expect=3)
    assert "sweep    2 jobs: 1 done, 1 refused" in out
    assert losses(runner.record("rays")) == losses(runner.record("pair"))
