from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.release

DATA = ["task.data=files", "task.images=folder", "task.size=8", "task.batch_size=8"]
RESNET = ["task=resnet", *DATA, "task.width=4", "task.depth=10"]
VIT = ["task=vit", *DATA, "task.width=8", "task.layers=1", "task.heads=2"]


@pytest.mark.parametrize("optim", ["caspr", "shampoo", "adamw"])
@pytest.mark.parametrize("task", [RESNET, VIT], ids=["resnet", "vit"])
def test_it_trains_validates_and_tests(
    task: list[str], optim: str, train: Callable[..., dict[str, Any]], folder: Path
) -> None:
    rows = train(*task, f"task.root={folder}", f"optim={optim}", name=f"{task[0][5:]}-{optim}")
    assert rows[6]["train/loss"] != rows[1]["train/loss"]
    for split in ("val", "test"):
        assert 0 <= rows[6][f"{split}/accuracy"] <= rows[6][f"{split}/top5"] <= 1
    assert rows["result"]["target"]["metric"] == "val/accuracy"


@pytest.mark.parametrize("task", [RESNET, VIT], ids=["resnet", "vit"])
def test_two_processes_train_what_one_does(task: list[str], train: Callable[..., dict[str, Any]], folder: Path) -> None:
    """Batch norm too is over the whole batch, so that every loss agrees; in float64, where rounding shows nothing."""
    one, two = (
        train(*task, f"task.root={folder}", "task.augment=none", "optim=caspr", "optim.start_step=2",
              "trainer.precision=64-true", f"trainer.devices={n}", name=f"{task[0][5:]}-{n}")
        for n in (1, 2)
    )  # fmt: skip
    for step in range(1, 7):
        for name in ("train/loss", "val/loss", "test/loss"):
            if name in one[step]:
                assert two[step][name] == pytest.approx(one[step][name], rel=1e-6), (step, name)


def test_cut_off_it_continues_with_the_same_augmentation(tmp_path: Path, folder: Path) -> None:
    """What a sample draws when it is read in another process, and what a batch draws, follow from seed and step."""
    options = [*VIT, f"task.root={folder}", "task.size=72", "task.augment=rand_augment", "task.mixup=0.2",
               "task.patch=8", "task.dropout=0.1", "trainer.max_steps=40", "trainer.log_every=1",
               "trainer.val_every=40", "trainer.accelerator=cpu"]  # fmt: skip

    def start(name: str) -> subprocess.Popen[str]:
        workers = f"trainer.workers={int(name == 'cut')}"  # and the same as without one
        command = [sys.executable, "-m", "caspr_cli.commands.train", *options, workers, f"output_dir={tmp_path / name}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    def metrics(name: str) -> list[str]:
        found = list((tmp_path / name).glob("*/*/*/seed0/metrics.jsonl"))
        return found[0].read_text().splitlines() if found else []

    def losses(name: str) -> list[str]:
        return [line.split('"lr"')[0] for line in metrics(name) if "train/loss" in line]

    whole, cut = start("whole"), start("cut")
    while len(metrics("cut")) < 4 and cut.poll() is None:
        time.sleep(0.02)
    cut.send_signal(signal.SIGTERM)
    for process, code in ((whole, 0), (cut, 143)):
        out, _ = process.communicate(timeout=300)
        assert process.returncode == code, out
    assert 4 <= len(losses("cut")) < 40
    again = start("cut")
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0, out
    assert losses("cut") == losses("whole")
    assert len(losses("whole")) == 40
