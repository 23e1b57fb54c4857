"""``caspr-train`` as a user starts it, for each task."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from written import SMALL

pytestmark = pytest.mark.release

FOLDER = ["task.images=folder", "task.size=8", "task.batch_size=8"]
WORDS = {
    "c4_lm": ["task.width=16", "task.layers=1", "task.heads=2", "task.vocab_size=300", "task.sequence=16",
              "task.batch_size=8"],
    "ud_pos": ["task.width=8", "task.layers=1", "task.heads=2", "task.batch_size=8"],
    "ogbg_molpcba": ["task.width=8", "task.steps=2", "task.batch_size=6"],
    "resnet": [*FOLDER, "task.width=4", "task.depth=10"],
    "vit": [*FOLDER, "task.width=8", "task.layers=1", "task.heads=2"],
}  # fmt: skip
STILL = {"ud_pos": ["task.word_dropout=0"], "resnet": ["task.augment=none"], "vit": ["task.augment=none"]}
METRIC = {"c4_lm": "loss", "ogbg_molpcba": "map"}


def command(name: str, home: Path, *words: str) -> list[str]:
    if not (home / "data").exists():
        SMALL[name][0](home / "data")
    return [sys.executable, "-m", "caspr_cli.commands.train", f"task={name}", "task.data=files",
            f"task.root={home / 'data'}", *WORDS[name], "trainer.max_steps=6", "trainer.val_every=3",
            "trainer.log_every=1", "trainer.accelerator=cpu", "optim.lr=0.003", *words]  # fmt: skip


def train(name: str, home: Path, to: str, *words: str) -> dict[Any, Any]:
    """Run a few steps; returns the rows of ``metrics.jsonl`` by step, with the result under ``"result"``."""
    given = command(name, home, f"output_dir={home / to}", *words)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(given, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = (home / to).glob("*/*/*/seed0")
    rows: dict[Any, Any] = {"result": json.loads((record / "result.json").read_text())}
    for line in (record / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["step"], {}).update(row)
    return rows


@pytest.mark.parametrize("name", ["ud_pos", "ogbg_molpcba"])
def test_two_processes_have_the_metrics_of_one(name: str, tmp_path: Path) -> None:
    """The loss is a mean over each process's own words or cells, so it is near that of one; the metric is whole."""
    one, two = (
        train(name, tmp_path, f"of{n}", "optim.lr=0", "task.dropout=0", *STILL.get(name, []), f"trainer.devices={n}")
        for n in (1, 2)
    )
    for key in (f"{split}/{metric}" for split in ("val", "test") for metric in ("loss", METRIC.get(name, "accuracy"))):
        assert two[6][key] == pytest.approx(one[6][key], rel=1e-5)
    assert two[1]["train/loss"] == pytest.approx(one[1]["train/loss"], rel=0.3)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_two_processes_train_what_one_does(name: str, tmp_path: Path) -> None:
    """Batch norm too is over the whole batch, so that every loss agrees; in float64, where rounding shows nothing."""
    words = [*STILL[name], "optim=caspr", "optim.start_step=2", "trainer.precision=64-true"]
    one, two = (train(name, tmp_path, f"of{n}", *words, f"trainer.devices={n}") for n in (1, 2))
    for step in range(1, 7):
        for key in ("train/loss", "val/loss", "test/loss"):
            if key in one[step]:
                assert two[step][key] == pytest.approx(one[step][key], rel=1e-6), (step, key)


def test_cut_off_it_continues_with_the_same_augmentation(tmp_path: Path) -> None:
    """Random numbers of a sample, read in another process, and of a batch follow from seed and step alone."""
    options = ["task.size=72", "task.augment=rand_augment", "task.mixup=0.2", "task.patch=8", "task.dropout=0.1",
               "trainer.max_steps=40", "trainer.val_every=40"]  # fmt: skip

    def start(to: str) -> subprocess.Popen[str]:
        workers = f"trainer.workers={int(to == 'cut')}"  # and the same as without one
        given = command("vit", tmp_path, *options, workers, f"output_dir={tmp_path / to}")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    def metrics(to: str) -> list[str]:
        found = list((tmp_path / to).glob("*/*/*/seed0/metrics.jsonl"))
        return found[0].read_text().splitlines() if found else []

    def losses(to: str) -> list[str]:
        return [line.split('"lr"')[0] for line in metrics(to) if "train/loss" in line]

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
