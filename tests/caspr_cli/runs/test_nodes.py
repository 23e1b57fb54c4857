"""Several machines: two launchers on this one stand for them."""

import json
import os
import signal
import socket
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import cast

import pytest
from running import Runner, losses, wait_for

from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe, TrainerConf
from caspr_cli.runs import launch
from caspr_cli.runs.nodes import first_host, meeting_place
from caspr_cli.runs.processes import LAUNCHER, with_variable
from caspr_cli.runs.record import Holder, Record

STEPS = "trainer.max_steps=80"  # enough to be hit on the way


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("one", "one"),
        ("one,two", "one"),
        ("gpu[007-012,031],login1", "gpu007"),
        ("n[3]", "n3"),
        ("n[1,2].cluster", "n1.cluster"),
        ("rack2-[10-20]-ib", "rack2-10-ib"),
    ],
)
def test_the_first_machine_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_where_machines_meet() -> None:
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "1234567"}
    assert meeting_place(TrainerConf(nodes=2), slurm) == "n1:34567"
    assert meeting_place(TrainerConf(nodes=2, rendezvous="here:1"), slurm) == "here:1"
    with pytest.raises(ConfigError, match=r"trainer.nodes=2 needs trainer.rendezvous=HOST:PORT"):
        meeting_place(TrainerConf(nodes=2), {})


def test_a_leader_that_was_replaced_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new one would wait for this machine, and this machine for it."""
    record, gone = Record(tmp_path), Holder("another", 1, 2, "then")
    monkeypatch.setattr(launch, "_supervise", lambda *_: (1, None))
    with record.held():
        record.write("status.json", {"state": "running"} | asdict(Holder.me()))
        assert launch._join(cast(Recipe, None), record, launch.Allocation(), gone) is None
        assert record.status["state"] == "running"  # its, and no longer that of the one who is gone


def test_a_leader_that_is_gone_leaves_a_run_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, gone = Record(tmp_path), Holder("another", 1, 2, "then")
    monkeypatch.setattr(launch, "_supervise", lambda *_: (1, None))
    record.write("status.json", {"state": "running"} | asdict(gone))
    outcome = launch._join(cast(Recipe, None), record, launch.Allocation(), gone)
    assert outcome.exit_code == 143
    assert record.status["error"] == "process 1 on another (since then) is gone, which led the run"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port: int = s.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def one_machine(runner: Runner) -> Path:
    """The same run on two ranks of one machine."""
    runner("output_dir=one_machine", "trainer.devices=2", STEPS)
    return runner.record("one_machine")


@pytest.mark.release
def test_two_machines_are_one_run(runner: Runner, one_machine: Path) -> None:
    """The same losses as two ranks of one machine; one record; told to stop, both save together and go on."""
    nodes = ["trainer.nodes=2", f"trainer.rendezvous=localhost:{free_port()}", "output_dir=nodes", STEPS]
    first, second = runner.start(*nodes), runner.start(*nodes)
    out = [process.ended(0) for process in (first, second)]
    record = runner.record("nodes")
    assert losses(record) == losses(one_machine)
    assert json.loads((record / "provenance.json").read_text())["device"]["processes"] == 2
    assert all("done" in text for text in out)
    for process in (runner.start(*nodes), runner.start(*nodes)):
        assert "skipped" in process.ended(0)


def everything_of(launcher: int) -> list[int]:
    """A launcher and what it has started, by what they inherit."""
    return [launcher, *(process.pid for process in with_variable(LAUNCHER, str(launcher)))]


@pytest.mark.release
def test_a_machine_is_lost(runner: Runner, one_machine: Path) -> None:
    """All its processes at once, as by a power cut. The other one ends, and the two commands again end the run."""
    nodes = ["trainer.nodes=2", f"trainer.rendezvous=localhost:{free_port()}", "output_dir=machine_lost", STEPS]
    machines = [runner.start(*nodes)]
    wait_for(runner, "machine_lost", 0, "status.json")  # it leads
    machines.append(runner.start(*nodes))
    record = wait_for(runner, "machine_lost", 10)
    for process in everything_of(machines[1].pid):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    out = machines[0].ended(143)
    assert "the same command continues" in out
    again = [runner.start(*nodes), runner.start(*nodes)]
    assert ["done" in process.ended(0) for process in again] == [True, True]
    assert losses(record) == losses(one_machine)


@pytest.mark.release
def test_a_machine_that_waits_alone_says_so(runner: Runner) -> None:
    nodes = ["trainer.nodes=2", f"trainer.rendezvous=localhost:{free_port()}", "output_dir=lonely", "trainer.timeout=4"]
    out = runner(*nodes, expect=143)
    assert "cut off  fewer than 2 machines came to localhost:" in out
    assert "the same command continues" in out
