"""A sweep with real processes, in the first tier: the other tests with whole runs are for releases."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import torch
from running import Runner, losses, near, wait_for

from caspr_cli.optim.precision import is_fast_in_bfloat16
from caspr_cli.runs.processes import workers


def device(record: Path) -> Any:
    return json.loads((record / "provenance.json").read_text())["device"]


def test_a_sweep_over_ranks_is_cut_off_and_continues(runner: Runner) -> None:
    """The worker of the first job is killed after a checkpoint; both jobs come to the same losses."""
    words = ["-m", "output_dir=tier", "trainer.devices=1,2"]
    process = runner.start(*words)
    first = wait_for(runner, "tier", 1, "status.json")
    while not (found := workers(first, process.pid)):
        time.sleep(0.02)
    wait_for(runner, "tier", 10)  # a step after the first checkpoint
    os.kill(next(iter(found)), signal.SIGKILL)
    out = process.ended(3)
    assert "sweep    2 jobs: 1 cut off, 1 done" in out
    assert re.search(r"a worker ended with SIGKILL; saved at step (8|16) ", out), out
    again = runner(*words)
    assert "sweep    2 jobs: 1 done, 1 done before" in again
    records = {
        device(status.parent)["processes"]: status.parent
        for status in (runner.home / "tier").glob("*/*/*/seed0/status.json")
    }
    assert json.loads((records[1] / "status.json").read_text())["attempts"] == 2
    products = "bfloat16" if is_fast_in_bfloat16(torch.device("cpu")) else "float32"
    assert {device(record)["products"] for record in records.values()} == {products}
    assert f" blocks, products in {products}; predicted" in again
    one, two = losses(records[1]), losses(records[2])
    assert sorted(step for step, name in one if name == "val/loss") == [8, 16, 20]
    assert one == near(two)
