"""What a user gets: the README's lines, and a wheel that works where there is no checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_two_lines_work_alone() -> None:
    train, test = blocks("bash")
    for line in (train, test):
        assert len(line.splitlines()) == 1
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install --quiet -e ")
    assert "caspr-train task=c4_lm optim=caspr" in train
    assert "-m pytest" in test


def test_the_loop_of_the_readme_runs_as_it_stands() -> None:
    (code,) = blocks("python")
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("tokens", nn.Embedding(5, 8))
    model.add_module("body", nn.Linear(8, 8))
    model.add_module("head", nn.Linear(8, 5))
    losses: list[float] = []

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        value = nn.functional.cross_entropy(model(batch), (batch + 1) % 5)
        losses.append(float(value.detach()))
        return value

    exec(code, {"model": model, "loss": loss, "batches": [torch.arange(5)] * 200})
    assert losses[-1] < losses[0] / 2


def test_the_wheel_brings_its_configs_and_works_from_anywhere(tmp_path: Path) -> None:
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    (wheel,) = builder.build(directory=str(tmp_path / "dist"), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = set(archive.namelist())
    configs = {f"caspr_cli/{f.relative_to(ROOT)}" for f in (ROOT / "conf").rglob("*.yaml")}
    assert configs <= names
    templates = (ROOT / "caspr_cli" / "report" / "templates").iterdir()
    assert {f"caspr_cli/report/templates/{file.name}" for file in templates} <= names
    assert not any(name.startswith(("tests/", "outputs/")) for name in names)
    code = (
        "import caspr_cli, sys; from caspr_cli.commands.train import main; print(caspr_cli.__file__); sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--cfg", "job"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )
    assert str(tmp_path) in done.stdout.splitlines()[0]
    assert "name: caspr" in done.stdout
