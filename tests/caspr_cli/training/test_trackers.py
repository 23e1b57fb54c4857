"""Lightning's loggers beside TensorBoard. What needs wandb or mlflow is skipped where they are not installed."""

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from caspr_cli.common import errors
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import AdamWConf, Logger, Recipe, Source
from caspr_cli.report import logs
from caspr_cli.report.trackers import Asked
from caspr_cli.runs.here import refuse_here
from caspr_cli.runs.record import Record
from caspr_cli.tasks.registry import C4LMConf
from caspr_cli.training import trackers
from caspr_cli.training.recorder import Recorder


def recipe(folder: Path, kind: Logger) -> Recipe:
    return Recipe(task=C4LMConf(), optim=AdamWConf(), seed=3, logger=[kind], output_dir=str(folder))


def cut_and_resumed(folder: Path, kind: Logger) -> Record:
    """Return the record of a run that was cut off after step 4, and went on from its checkpoint of step 3."""
    wanted = recipe(folder, kind)
    kept = Record.of(wanted)
    kept.path.mkdir(parents=True)
    with Recorder(kept, wanted) as first:
        for step in range(1, 5):
            first.scalars(step, {"train/loss": 8.0 / step})
    with Recorder(kept, wanted, 3, 3) as again:
        again.scalars(4, {"train/loss": 2.0})
        again.scalars(4, {"val/loss": 0.25, "val/perplexity": float("inf")})
        again.ended = "success"
    return kept


@pytest.mark.parametrize("kind", [Logger.wandb, Logger.mlflow])
def test_a_logger_that_is_not_installed_is_refused_before_data_are_read(
    kind: Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(tmp_path, kind)
    wanted.task.data, wanted.task.root = Source.files, str(tmp_path / "missing")
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    why = f"this needs {kind.name}, which is not installed: pip install 'caspr-cli[{kind.name}]'"
    with pytest.raises(ConfigError, match="logger=") as caught:
        refuse_here(wanted)
    assert str(caught.value) == f"logger=[{kind.name}]: {why}"
    monkeypatch.undo()
    (tmp_path / kind.name).mkdir()
    monkeypatch.syspath_prepend(tmp_path)  # a folder of this name, as wandb itself makes, is no package
    spec = errors.find_spec(kind.name)
    assert errors.uninstalled(kind.name) == (why if spec.origin is None else None)


def test_a_logger_that_cannot_begin_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = RuntimeError("the server is gone.\nmore of it")
    monkeypatch.setitem(trackers.MAKERS, Logger.mlflow, Mock(side_effect=broken))
    with pytest.raises(ConfigError) as caught:
        trackers.begun(recipe(tmp_path, Logger.mlflow), Record(tmp_path), [])
    assert str(caught.value) == "logger=[mlflow]: the server is gone"


def test_a_run_tells_its_loggers_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str | None] = []
    monkeypatch.setattr(trackers, "end", lambda logger, how: told.append(how))
    kept, wanted = Record(tmp_path / "seed0"), recipe(tmp_path, Logger.csv)
    kept.path.mkdir()
    with Recorder(kept, wanted):
        pass  # a signal
    with Recorder(kept, wanted) as recorder:
        recorder.ended = "success"
    with pytest.raises(ValueError, match="of the run"), Recorder(kept, wanted):
        raise ValueError("of the run")
    assert told == [None, "success", "failed"]


def written(log: bytes) -> Iterator[bytes]:
    """Yield the records of wandb's file, a log of LevelDB: blocks of 32 KiB, after a head of 7 bytes in the first."""
    at, parts = 7, b""
    while at < len(log):
        if (room := -at % 32768) < 7 and room:  # of a block, which its writer has filled with zeros
            at += room
            continue
        size, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]  # after a checksum
        parts += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_has_one_run_offline_and_its_history_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install 'caspr-cli[wandb]'")
    from wandb.proto.wandb_internal_pb2 import Record as Line

    monkeypatch.setenv("WANDB_MODE", "offline")
    kept = cut_and_resumed(tmp_path, Logger.wandb)
    (name,) = kept.read("trackers.json").values()
    (file,) = kept.path.glob("wandb/offline-run-*/*.wandb")  # wandb cannot go on with the one of the first attempt
    assert file.name == f"run-{name}.wandb"
    deadline, lines = time.monotonic() + 60, list[Any]()
    while "exit" not in [line.WhichOneof("record_type") for line in lines]:  # its own process writes them
        assert time.monotonic() < deadline
        lines = [Line.FromString(content) for content in written(file.read_bytes())]
    history = [
        {each.nested_key[0] or each.key: json.loads(each.value_json) for each in line.history.item}
        for line in lines
        if line.WhichOneof("record_type") == "history"
    ]
    losses = [(line["trainer/global_step"], line["train/loss"]) for line in history if "train/loss" in line]
    assert losses == [(1, 8.0), (2, 4.0), (3, 8.0 / 3), (4, 2.0)]  # all of them, and none twice
    heads = sorted({head for line in history for head in line})
    table = tmp_path / "exports" / "history.csv"  # as run.history().to_csv() has it
    table.parent.mkdir()
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["", *heads])
        writer.writeheader()
        writer.writerows({"": number, **line} for number, line in enumerate(history))
    (run,) = logs.find([table.parent], Asked("wandb", "val/loss")).runs
    assert (run.final, [point.step for point in run.curve]) == (0.25, [4])  # and not _step, which counts calls


def test_wandb_online_is_asked_what_it_has_and_no_step_is_logged_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is imitated: wandb itself runs offline, and says that it has resumed the run."""
    wandb = pytest.importorskip("wandb", reason="pip install 'caspr-cli[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    server: list[dict[str, Any]] = []  # the history, as its API has it: each line with all tags
    asked: list[str] = []
    log = wandb.sdk.wandb_run.Run.log

    def logged(self: Any, data: dict[str, Any], *rest: Any, **more: Any) -> None:
        server.append({"train/loss": None, "val/loss": None, "_step": len(server)} | data)
        log(self, data, *rest, **more)

    class Api:
        def run(self, path: str) -> Any:
            asked.append(path)
            return type("Known", (), {"scan_history": lambda _: list(server)})()

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", logged)
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "resumed", property(lambda _: bool(server)))
    monkeypatch.setattr(wandb, "Api", Api)
    kept = cut_and_resumed(tmp_path, Logger.wandb)
    (name,) = kept.read("trackers.json").values()
    assert [path.rpartition("/")[2] for path in asked] == [name]
    losses = [(line["trainer/global_step"], line["train/loss"]) for line in server if line["train/loss"] is not None]
    assert losses == [(1, 8.0), (2, 4.0), (3, 8.0 / 3), (4, 2.0)]
    assert [line["trainer/global_step"] for line in server] == [1, 2, 3, 4, 4]
    assert server[-1]["val/loss"] == 0.25  # of the step at which the first attempt was cut off


def test_mlflow_has_one_run_in_one_database_and_it_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="pip install 'caspr-cli[mlflow]'")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    kept = cut_and_resumed(tmp_path / "outputs", Logger.mlflow)
    assert list(kept.read("trackers.json")) == ["mlflow"]
    client = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    losses = client.get_metric_history(kept.read("trackers.json")["mlflow"], "train/loss")
    assert [(each.step, each.value) for each in losses] == [(1, 8.0), (2, 4.0), (3, 8.0 / 3), (4, 2.0)]  # none twice
    (run,) = logs.find([tmp_path / "outputs"], Asked("mlflow", "val/loss", group=["optim.name"])).runs
    assert (run.final, run.seed, run.config["optim.name"], run.config["task.name"]) == (0.25, 3, "adamw", "c4_lm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outputs"]
