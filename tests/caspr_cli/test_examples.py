"""The programs in ``caspr_cli/examples`` run as they stand. (Own tasks and optimizers: ``test_own_packages``.)"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from caspr_cli.examples import own_loop
from caspr_cli.report import logs
from caspr_cli.report.trackers import Asked

EXAMPLES = Path(own_loop.__file__).parent


def test_every_example_is_listed_with_its_command_and_is_short() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert set(re.findall(r"\]\(([\w./]+)\)", listed)) >= {file.name for file in EXAMPLES.glob("[a-z]*.*")}
    for file in EXAMPLES.glob("[a-z]*.py"):
        assert f"`python -m caspr_cli.examples.{file.stem}`" in listed
        assert len(file.read_text().splitlines()) <= 70
    for link in re.findall(r"\]\(([\w./]+)\)", listed):
        assert (EXAMPLES / link).exists()
    assert "(caspr_cli/examples/README.md)" in (EXAMPLES.parents[1] / "README.md").read_text()


def test_own_loop_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_loop, "STEPS", 50)
    losses = [own_loop.main(name, 0)[-1][1] for name in ("caspr", "adamw")]
    assert max(losses) < 1.1  # chance: 2.08


@pytest.mark.filterwarnings("ignore")
def test_own_lightning_module_learns() -> None:
    pytest.importorskip("lightning")
    from caspr_cli.examples import lightning_ddp

    assert lightning_ddp.main(1) < 1.1


@pytest.mark.release
def test_own_lightning_module_learns_on_two_processes() -> None:
    command = [sys.executable, "-m", "caspr_cli.examples.lightning_ddp"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    said = re.search(r"2 processes, 128 steps  val/loss (\S+)", done.stdout)
    assert said is not None, done.stdout + done.stderr
    assert float(said[1]) < 1.1


@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer_learns() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from caspr_cli.examples import transformers_trainer

    assert transformers_trainer.main() < 1.6  # chance: 2.77


def test_the_chart_of_wandb_is_a_table() -> None:
    found = logs.find([EXAMPLES / "wandb_chart.csv"], Asked("wandb", "val/loss"))
    assert found.warnings == []
    assert sorted({run.config["optim.name"] for run in found.runs}) == ["adamw", "caspr"]
    assert sorted(run.seed for run in found.runs) == [0, 0, 1, 1, 2, 2]
    assert [point.step for point in found.runs[0].curve] == [50, 100, 150, 200]
