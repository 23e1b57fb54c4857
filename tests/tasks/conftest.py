"""``caspr-train`` as a user starts it, for each task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHORT = ["trainer.max_steps=6", "trainer.val_every=3", "trainer.log_every=1", "trainer.accelerator=cpu",
         "optim.lr=0.003"]  # fmt: skip


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Run a few steps; returns the rows of ``metrics.jsonl`` by step, with the result under ``"result"``."""
    home = tmp_path_factory.mktemp("runs")

    def run(*overrides: str, name: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "caspr_cli.commands.train", *SHORT, f"output_dir={home / name}", *overrides]
        environment = os.environ | {"CASPR_CACHE": str(home / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (record,) = (home / name).glob("*/*/*/seed0")
        rows = {"result": json.loads((record / "result.json").read_text()), "record": record}
        for line in (record / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(row["step"], {}).update(row)
        return rows

    return run


@pytest.fixture
def shared() -> Path:
    """Real data for development, beside the checkout."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared data beside the checkout")
    return folder
