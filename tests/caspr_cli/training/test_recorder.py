import csv
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator, HistogramEvent
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from caspr_cli.optim import CASPR
from caspr_cli.optim.probe import diagnose
from caspr_cli.recipe.schema import AdamWConf, Logger, Recipe
from caspr_cli.report import logs
from caspr_cli.report.trackers import Asked
from caspr_cli.runs.record import Record
from caspr_cli.tasks.registry import C4LMConf
from caspr_cli.training.callbacks import Curves
from caspr_cli.training.recorder import Recorder


def recipe(seed: int = 0) -> Recipe:
    return Recipe(task=C4LMConf(), optim=AdamWConf(), seed=seed)


def record(tmp_path: Path, seed: int = 0) -> Record:
    found = Record(tmp_path / "c4_lm" / "adamw" / "0123abcd" / f"seed{seed}")
    found.path.mkdir(parents=True)
    return found


def read(record: Record) -> Any:
    """What TensorBoard has read of it."""
    return EventAccumulator(str(record.path), size_guidance={HISTOGRAMS: 0}).Reload()  # 0: all of them


def events(record: Record, tag: str) -> list[tuple[int, float]]:
    return [(e.step, pytest.approx(e.value)) for e in read(record).Scalars(tag)]


def test_lines_and_events_hold_the_same(tmp_path: Path) -> None:
    kept = record(tmp_path)
    with Recorder(kept, recipe()) as recorder:
        recorder.scalars(1, {"train/loss": 2.5})
        recorder.scalars(2, {"train/loss": 1.5, "lr": 0.1})
    assert [json.loads(line) for line in kept.metrics.read_text().splitlines()] == [
        {"step": 1, "train/loss": 2.5},
        {"step": 2, "train/loss": 1.5, "lr": 0.1},
    ]
    assert events(kept, "train/loss") == [(1, 2.5), (2, 1.5)]


def test_what_lies_after_the_checkpoint_is_dropped_and_a_torn_line_too(tmp_path: Path) -> None:
    kept = record(tmp_path)
    with Recorder(kept, recipe()) as first:
        for step in range(1, 6):
            first.scalars(step, {"train/loss": float(step)})
    with kept.metrics.open("a") as file:
        file.write('{"step": 6, "train/lo')  # as a kill leaves it
    with Recorder(kept, recipe(), 3, 3) as again:
        again.scalars(4, {"train/loss": 40.0})
    rows = [json.loads(line) for line in kept.metrics.read_text().splitlines()]
    assert [(r["step"], r["train/loss"]) for r in rows] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert events(kept, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_lightnings_csv_has_each_line_once_after_a_resume(tmp_path: Path) -> None:
    kept, wanted = record(tmp_path), recipe(seed=3)
    wanted.logger = [Logger.csv]
    first = Recorder(kept, wanted)
    for step in range(1, 6):
        first.scalars(step, {"train/loss": float(step)})
    first.scalars(5, {"val/loss": float("nan"), "val/accuracy": 0.5})
    first.flush()  # and then it is killed
    assert len((kept.path / "csv" / "metrics.csv").read_text().splitlines()) == 7
    with Recorder(kept, wanted, 3, 3) as again:
        again.scalars(4, {"train/loss": 40.0})
        again.scalars(4, {"val/loss": 0.25})
    with (kept.path / "csv" / "metrics.csv").open(newline="") as file:
        lines = [{key: float(value) for key, value in line.items() if value} for line in csv.DictReader(file)]
    assert lines == [{"step": s, "train/loss": s} for s in (1, 2, 3)] + [
        {"step": 4, "train/loss": 40}, {"step": 4, "val/loss": 0.25},
    ]  # fmt: skip
    (run,) = logs.find([tmp_path], Asked("csv", "val/loss", group=["optim.name"])).runs
    assert (run.seed, run.config["optim.name"], run.final) == (3, "adamw", 0.25)


def test_a_clock_that_goes_back_or_ahead_changes_no_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, real = record(tmp_path), time.time
    for attempt, day in enumerate((0, -1, 1, -2)):
        monkeypatch.setattr(time, "time", lambda day=day: real() + 86400 * day)
        with Recorder(kept, recipe(), 3 * attempt, 3 * attempt) as recorder:
            for step in range(3 * attempt + 1, 3 * attempt + 6):  # two more than the next attempt goes on from
                recorder.scalars(step, {"train/loss": float(step)})
    assert events(kept, "train/loss") == [(step, float(step)) for step in range(1, 15)]
    names = sorted(path.name for path in kept.path.glob("events.out.tfevents.*"))
    assert [name.count("0000000000.") for name in names] == [1, 1, 1, 0]


def test_what_was_flushed_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, synced = record(tmp_path), []
    recorder = Recorder(kept, recipe())
    recorder.scalars(1, {"train/loss": 1.0})
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    recorder.flush()
    assert {path.stat().st_ino for path in (kept.metrics, *kept.path.glob("events*"))} == set(synced)
    assert events(kept, "train/loss") == [(1, 1.0)]
    recorder.close()


def test_seeds_share_a_group_on_the_hparams_page(tmp_path: Path) -> None:
    groups, rates = set(), set()
    for seed in (0, 1):
        kept = record(tmp_path, seed)
        with Recorder(kept, recipe(seed)) as recorder:
            recorder.pages()
        content = read(kept).summary_metadata["_hparams_/session_start_info"].plugin_data.content
        start = HParamsPluginData.FromString(content).session_start_info
        groups.add(start.group_name)
        rates.add(start.hparams["optim.lr"].number_value)
    assert groups == {"c4_lm/adamw/0123abcd"}
    assert rates == {1e-3}


def histograms(record: Record) -> dict[str, list[HistogramEvent]]:
    accumulator = read(record)
    return {tag: accumulator.Histograms(tag) for tag in accumulator.Tags()["histograms"]}


def test_a_histogram_counts_each_eigenvalue(tmp_path: Path) -> None:
    kept = record(tmp_path)
    values = torch.tensor([0.0, -0.05, -0.2, -0.2, -3.9, 0.0, torch.nan])  # what no solver found is not counted
    with Recorder(kept, recipe()) as recorder:
        recorder.spectrum(7, values)
        recorder.spectrum(8, torch.zeros(3))  # of matrices that are 1 x 1
    seven, eight = histograms(kept)["optim/spectrum"]
    assert (seven.step, seven.histogram_value.num, seven.histogram_value.min) == (7, 6, pytest.approx(-3.9))
    counts = dict(zip(seven.histogram_value.bucket_limit, seven.histogram_value.bucket, strict=True))
    assert {limit: count for limit, count in counts.items() if count} == {-3.875: 1, -0.125: 2, 0.0: 3}
    assert sum(eight.histogram_value.bucket) == 3


def test_the_spectrum_of_all_blocks_is_one_histogram_and_no_number(tmp_path: Path) -> None:
    weights = [torch.randn(6, 4, requires_grad=True), torch.randn(5, 3, requires_grad=True)]
    optimizer = CASPR(weights, block_size=3, start_step=1)
    for p in weights:
        p.grad = torch.randn_like(p)
    optimizer.step()
    kept = record(tmp_path)
    trainer = cast(Any, SimpleNamespace(optimizers=[optimizer], global_step=1))
    with Recorder(kept, recipe()) as recorder:
        values = Curves(recipe(), recorder, None)._diagnostics(trainer)
    (event,) = histograms(kept).pop("optim/spectrum")
    assert event.histogram_value.num == len(diagnose(optimizer)["spectrum"])
    assert list(histograms(kept)) == ["optim/spectrum"]
    assert "optim/condition/p50" in values
    assert not [tag for tag in values if "spectrum" in tag]


@pytest.mark.parametrize("purged", [False, True])
def test_what_was_written_after_the_last_checkpoint_at_its_own_step_is_shown_once(tmp_path: Path, purged: bool) -> None:
    """For instance the test part of a run that is killed before it has written its result."""
    kept = record(tmp_path)
    with Recorder(kept, recipe()) as first:
        for step in range(1, 4):
            first.scalars(step, {"val/loss": step / 10})
        first.scalars(3, {"test/loss": 0.5})  # after the checkpoint of step 3, and no checkpoint follows
    if purged:  # the last checkpoint was damaged, and the one of step 2 used
        with Recorder(kept, recipe(), 2, 2) as second:
            second.scalars(3, {"val/loss": 0.3})
    with Recorder(kept, recipe(), 3, 3) as third:
        third.scalars(3, {"test/loss": 0.5})
    assert events(kept, "test/loss") == [(3, 0.5)]
    assert [step for step, _ in events(kept, "val/loss")] == [1, 2, 3]
