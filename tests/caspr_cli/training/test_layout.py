"""The CUSTOM SCALARS page, as TensorBoard's own plugin puts it together from the runs of a directory."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin

from caspr_cli.optim import CASPR
from caspr_cli.optim.probe import diagnose
from caspr_cli.recipe.schema import AdamWConf, Recipe, TaskConf
from caspr_cli.runs.record import Record
from caspr_cli.tasks.registry import C4LMConf, ResNetConf, TaggingConf
from caspr_cli.training.callbacks import QUANTILES
from caspr_cli.training.layout import layout
from caspr_cli.training.recorder import Recorder


def written(directory: Path, task: TaskConf, *, seed: int = 0, attempts: int = 1) -> None:
    record = Record(directory / f"task{type(task).__name__}" / "adamw" / "0123abcd" / f"seed{seed}")
    record.path.mkdir(parents=True)
    for _ in range(attempts):
        with Recorder(record, Recipe(task=task, optim=AdamWConf(), seed=seed)) as recorder:
            recorder.pages()


def page(directory: Path) -> dict[str, list[dict[str, Any]]]:
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(directory))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(directory))
    plugin = CustomScalarsPlugin(TBContext(logdir=str(directory), data_provider=provider, plugin_name_to_instance={}))
    merged = json.loads(plugin.layout_impl(RequestContext(), ""))
    return {category["title"]: category["chart"] for category in merged["category"]}


def titles(charts: list[dict[str, Any]]) -> list[str]:
    return [chart["title"] for chart in charts]


def test_the_page_begins_with_what_the_task_is_judged_by(tmp_path: Path) -> None:
    written(tmp_path, TaggingConf())
    found = page(tmp_path)
    assert list(found) == ["comparison", "cost", "optimizer"]
    assert titles(found["comparison"]) == ["val/accuracy", "train/loss"]
    assert found["comparison"][0]["multiline"]["tag"] == ["val/accuracy$"]
    assert found["optimizer"][0]["multiline"]["tag"] == [r"optim/condition/p50$"]


def test_tasks_seeds_and_attempts_share_their_charts(tmp_path: Path) -> None:
    written(tmp_path / "one", C4LMConf())
    alone = page(tmp_path / "one")
    for seed in (0, 1):
        written(tmp_path / "all", C4LMConf(), seed=seed, attempts=2)
    for task in (TaggingConf(), ResNetConf()):
        written(tmp_path / "all", task)
    found = page(tmp_path / "all")
    metrics = {task().target.metric for task in (C4LMConf, TaggingConf, ResNetConf)}
    assert sorted(titles(found["comparison"])) == sorted({*metrics, "train/loss"})
    assert (found["cost"], found["optimizer"]) == (alone["cost"], alone["optimizer"])


def test_a_line_is_of_one_tag() -> None:
    """TensorBoard matches from the start of a tag: val/loss would also draw what begins so."""
    _, (expression,) = layout("val/loss")["comparison"]["val/loss"]
    assert [tag for tag in ("val/loss", "val/loss_ema", "test/val/loss") if re.match(expression, tag)] == ["val/loss"]


def test_charts_of_the_optimizer_show_what_is_diagnosed() -> None:
    p = torch.randn(3, 4, requires_grad=True)
    optimizer = CASPR([p], start_step=1)
    p.grad = torch.randn(3, 4)
    optimizer.step()
    tags = [f"optim/{name}/{cut}" for name in diagnose(optimizer) for cut in (*QUANTILES, "max")]
    expressions = [e for _, (e,) in layout("val/loss")["optimizer"].values() if e.startswith("optim/")]
    assert len(expressions) == 6
    assert all(any(re.match(e, tag) for tag in tags) for e in expressions)


def test_what_is_compared_comes_first_among_all_curves(tmp_path: Path) -> None:
    record = Record(tmp_path)
    with Recorder(record, Recipe(task=TaggingConf(), optim=AdamWConf())) as recorder:
        recorder.scalars(10, {"lr": 1e-3, "train/loss": 2.0, "val/loss": 1.5, "val/accuracy": 0.4})
    accumulator = EventAccumulator(str(tmp_path)).Reload()
    tags = sorted(accumulator.Tags()["scalars"])  # as TensorBoard shows them
    assert tags[:3] == ["comparison/train/loss", "comparison/val/accuracy", "lr"]
    assert accumulator.Scalars(tags[1])[0].value == accumulator.Scalars("val/accuracy")[0].value
    assert "comparison" not in record.metrics.read_text()
