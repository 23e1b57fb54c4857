"""Tables from the logs of other programs: each format as its own writer leaves it."""

from __future__ import annotations

import csv
import json
import math
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from calling import Call
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter

from caspr_cli.commands import report
from caspr_cli.common.errors import UserError
from caspr_cli.report import logs
from caspr_cli.report.compare import tables
from caspr_cli.report.trackers import Asked, Found

METRIC = "val/loss"
OBJECTS = "shape: !!python/tuple [1, 2]\nnet: !!python/object:a.B {c: 1}\n"  # in hparams.yaml
BEST = {"caspr": 3.0, "adamw": 4.0}  # the last value of seed 0
CURVE = ((10, 2.0), (20, 0.5), (30, 0.0))  # step, and what is above the last value
RUNS = [(optimizer, seed) for optimizer in BEST for seed in range(3)]


def last(optimizer: str, seed: int) -> float:
    return BEST[optimizer] + seed * (0.25 if optimizer == "caspr" else 0.125)


def curve(optimizer: str, seed: int) -> list[tuple[int, float]]:
    return [(step, last(optimizer, seed) + above) for step, above in CURVE]


def events(path: Path, points: Iterable[tuple[int, float]], tag: str = METRIC, **how: Any) -> None:
    with SummaryWriter(str(path), **how) as writer:
        for step, value in points:
            writer.add_scalar(tag, value, step)


def table(path: Path, heads: Sequence[str], lines: Iterable[Sequence[Any]], separator: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf8") as file:
        csv.writer(file, delimiter=separator).writerows([heads, *lines])


def mlflow(path: Path, name: str, points: Iterable[tuple[int, float]], status: int = 3, **params: Any) -> None:
    for part in ("metrics/val", "params", "tags", "artifacts"):
        (path / part).mkdir(parents=True)
    meta = {"run_id": path.name, "run_name": name, "status": status, "lifecycle_stage": "active", "end_time": None}
    (path / "meta.yaml").write_text(yaml.dump(meta), encoding="utf8")
    (path.parent / "meta.yaml").write_text(yaml.dump({"name": "cifar", "experiment_id": path.parent.name}))
    (path / "metrics" / "val" / "loss").write_text("".join(f"1700000000000 {v!r} {step}\n" for step, v in points))
    (path / "tags" / "mlflow.runName").write_text(name)
    for key, value in params.items():
        (path / "params" / key).write_text(str(value))


# ---- one study, in each format ---------------------------------------------------------------------------------------


def by_folder(root: Path) -> Asked:
    for optimizer, seed in RUNS:
        events(root / f"{optimizer}_seed{seed}", curve(optimizer, seed))
    return Asked("tensorboard", METRIC)


def by_add_hparams(root: Path) -> Asked:
    for k, (optimizer, seed) in enumerate(RUNS):
        with SummaryWriter(str(root / f"run{k}")) as writer:
            for step, value in curve(optimizer, seed):
                writer.add_scalar(METRIC, value, step)
            writer.add_hparams({"optimizer": optimizer, "seed": seed, "lr": 0.1}, {METRIC: 99.0})
    return Asked("tensorboard", METRIC, group=["optimizer"])


def by_tensorflow(root: Path) -> Asked:
    """Tensors in place of plain values, and validation in a folder of its own, as Keras writes them."""
    for optimizer, seed in RUNS:
        for part in ("train", "validation"):
            writer = EventFileWriter(str(root / optimizer / f"seed_{seed}" / part))
            for step, value in curve(optimizer, seed):
                found = Summary.Value(tag="epoch_loss")
                found.metadata.plugin_data.plugin_name = "scalars"
                found.tensor.dtype = 1
                found.tensor.tensor_shape.SetInParent()
                found.tensor.float_val.append(value if part == "validation" else -1.0)
                writer.add_event(Event(step=step, summary=Summary(value=[found])))
            writer.close()
    return Asked("tensorboard", "validation/epoch_loss")


def by_lightning(root: Path) -> Asked:
    for k, (optimizer, seed) in enumerate(RUNS):
        lines = [(0, step, "", value) for step, value in curve(optimizer, seed)]
        lines.insert(1, (0, 15, 9.0, ""))
        table(root / f"version_{k}" / "metrics.csv", ["epoch", "step", "train/loss", METRIC], lines)
        own = f"optim:\n  name: {optimizer}\nseed: {seed}\n{OBJECTS}"
        (root / f"version_{k}" / "hparams.yaml").write_text(own)
    return Asked("csv", METRIC, group=["optim.name"])


def by_keras(root: Path) -> Asked:
    for optimizer, seed in RUNS:
        table(root / f"{optimizer}-s{seed}.csv", ["epoch", "loss", METRIC],
              [(step, 9.0, value) for step, value in curve(optimizer, seed)], ";")  # fmt: skip
    return Asked("csv", METRIC)


def by_long_csv(root: Path) -> Asked:
    lines = [(optimizer, seed, step, value) for optimizer, seed in RUNS for step, value in curve(optimizer, seed)]
    table(root / "all.csv", ["optimizer", "seed", "step", METRIC], sorted(lines, key=lambda line: line[2]))
    return Asked("csv", METRIC, group=["optimizer"])


def by_wandb_chart(root: Path) -> Asked:
    names = [f"{optimizer}-{seed}" for optimizer, seed in RUNS]
    heads = [f"{name} - {key}{band}" for name in names for key in ("_step", METRIC) for band in ("", "__MIN", "__MAX")]
    lines = [
        [step, *(x for run in RUNS for x in ([step] * 3 + [dict(curve(*run))[step]] * 3))] for step, _ in CURVE
    ]  # fmt: skip
    table(root / "wandb_export.csv", ["Step", *heads], lines)
    return Asked("wandb", METRIC, names="{optimizer}-{seed}")


def by_wandb_runs(root: Path) -> Asked:
    heads = ["Name", "State", "Created", "Runtime", "optimizer", "seed", METRIC]
    lines = [
        ("fine-tree", "finished", f"2026-01-01T00:00:0{k}.000Z", 60 + k, optimizer, seed, last(optimizer, seed))
        for k, (optimizer, seed) in enumerate(RUNS)
    ]
    table(root / "runs.csv", heads, lines)
    return Asked("wandb", METRIC, group=["optimizer"])


def by_wandb_history(root: Path) -> Asked:
    for optimizer, seed in RUNS:
        lines = [(k, step, "", value, 1.7e9 + k) for k, (step, value) in enumerate(curve(optimizer, seed))]
        table(root / f"{optimizer}_{seed}" / "history.csv", ["", "_step", "train/loss", METRIC, "_timestamp"], lines)
    return Asked("wandb", METRIC, names="{optimizer}_{seed}")


def by_mlflow(root: Path) -> Asked:
    for k, (optimizer, seed) in enumerate(RUNS):
        mlflow(
            root / "mlruns" / "7" / f"{k:032x}", f"wise-owl-{k}", curve(optimizer, seed), optimizer=optimizer, seed=seed
        )
    model = root / "mlruns" / "7" / "models" / "m-1"  # MLflow 3 has models beside runs
    (model / "metrics").mkdir(parents=True)
    (model / "meta.yaml").write_text("model_id: m-1\nstatus: 2\n")
    return Asked("mlflow", METRIC, group=["optimizer"])


def by_mlflow_database(root: Path) -> Asked:
    """The tables and columns of MLflow 3 that are read."""
    root.mkdir()
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        database.executescript(
            "CREATE TABLE experiments (experiment_id INTEGER, name TEXT, lifecycle_stage TEXT);"
            "CREATE TABLE runs (run_uuid TEXT, name TEXT, status TEXT, start_time BIGINT, end_time BIGINT, "
            "lifecycle_stage TEXT, experiment_id INTEGER);"
            "CREATE TABLE metrics (key TEXT, value FLOAT, timestamp BIGINT, step BIGINT, is_nan BOOL, run_uuid TEXT);"
            "CREATE TABLE params (key TEXT, value TEXT, run_uuid TEXT);"
            "INSERT INTO experiments VALUES (7, 'cifar', 'active');"
        )
        for k, (optimizer, seed) in enumerate([*RUNS, ("adamw", 0)]):
            name, stage = f"{k:032x}", "active" if k < len(RUNS) else "deleted"
            database.execute("INSERT INTO runs VALUES (?, 'wise', 'FINISHED', ?, ?, ?, 7)", (name, k, k + 1, stage))
            for key, value in {"optimizer": optimizer, "seed": str(seed)}.items():
                database.execute("INSERT INTO params VALUES (?, ?, ?)", (key, value, name))
            for when, (step, value) in enumerate(reversed([(10, 99.0), *curve(optimizer, seed)])):
                row = (
                    METRIC,
                    0.0 if value == 99 else value,
                    -when,
                    step,
                    value == 99,
                    name,
                )  # nan, and then logged again
                database.execute("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", row)
        database.commit()
    return Asked("mlflow", METRIC, group=["optimizer"])


WRITERS: list[Callable[[Path], Asked]] = [
    by_folder, by_add_hparams, by_tensorflow, by_lightning, by_keras, by_long_csv, by_wandb_chart, by_wandb_runs,
    by_wandb_history, by_mlflow, by_mlflow_database,
]  # fmt: skip


def rows(found: Found, **how: Any) -> dict[str, list[tuple[int, float | None]]]:
    made = tables(found.runs, tuned=[], **how)
    return {row.label: [(run.seed, run.final) for run in row.runs] for table in made for row in table.rows}


@pytest.mark.parametrize("written", WRITERS, ids=lambda written: written.__name__)
def test_the_same_study_in_each_format(tmp_path: Path, written: Callable[[Path], Asked]) -> None:
    root = tmp_path / "runs"
    asked = written(root)
    found = logs.find([root], asked)
    assert not found.warnings
    (made,) = tables(found.runs, tuned=[])
    assert rows(found) == {name: [(seed, pytest.approx(last(name, seed))) for seed in range(3)] for name in BEST}
    assert made.task == ("cifar" if asked.kind == "mlflow" else "runs")
    caspr = made.rows[0]
    assert (made.baseline, caspr.label, caspr.mean) == ("adamw", "caspr", pytest.approx(3.25))
    assert caspr.difference is not None
    assert (caspr.kind, caspr.difference.paired, caspr.difference.n) == ("better", True, 3)
    if written is not by_wandb_runs:
        assert [(p.step, p.value) for p in caspr.runs[1].curve] == [(s, pytest.approx(v)) for s, v in curve("caspr", 1)]


def test_logs_of_caspr_train_give_what_its_records_give(tmp_path: Path) -> None:
    """TensorBoard's file and hyperparameters as ``caspr-train`` writes them; the values as its records have them."""
    from caspr_cli.recipe.schema import OPTIMIZERS, Recipe
    from caspr_cli.tasks.registry import C4LMConf
    from caspr_cli.training import hparams

    for optimizer, seed in RUNS:
        recipe = Recipe(C4LMConf(), OPTIMIZERS[optimizer](), seed=seed)
        with SummaryWriter(str(tmp_path / "c4_lm" / optimizer / "4e9d1440" / f"seed{seed}")) as writer:
            for summary in hparams.summaries(recipe, "4e9d1440"):
                writer.file_writer.add_summary(summary)
            for step, value in curve(optimizer, seed):
                writer.add_scalar(METRIC, value, step)
    found = logs.find([tmp_path], Asked("tensorboard", METRIC, group=["optim.name"]))
    assert rows(found) == {name: [(seed, pytest.approx(last(name, seed))) for seed in range(3)] for name in BEST}


# ---- rows and seeds --------------------------------------------------------------------------------------------------


def study(root: Path, names: Mapping[str, float]) -> Path:
    for name, value in names.items():
        table(root / f"{name}.csv", ["step", METRIC], [(1, value + 1), (2, value)])
    return root


@pytest.mark.parametrize(
    ("names", "how", "expected"),
    [
        (["adam_seed0", "adam_seed1", "sgd_seed0"], {}, {"adam": [0, 1], "sgd": [0]}),
        (["adam/seed=3", "sgd/seed=3"], {}, {"adam": [3], "sgd": [3]}),
        (["a/adam/b/s4", "a/sgd/b/s4"], {}, {"adam/b": [4], "sgd/b": [4]}),
        (["seed1/adam", "seed2/adam"], {}, {"adam": [1, 2]}),
        (["seed1/version_0", "seed2/version_0"], {}, {"runs": [1, 2]}),
        (["optim=adam,lr=0.1,seed=1", "optim=adam,lr=0.2,seed=1"], {}, {"adam lr=0.1": [1], "adam lr=0.2": [1]}),
        (["optim=adam_lr=1e-3_seed=1", "optim=sgd_lr=1e-3_seed=1"], {"group": ["optim"]}, {"adam": [1], "sgd": [1]}),
        (["lr=0.1,seed=1", "lr=0.2,seed=1"], {}, {"run lr=0.1": [1], "run lr=0.2": [1]}),
        (["x-adam-0", "x-adam-1"], {"names": "x-{optimizer}-{seed}"}, {"adam": [0, 1]}),
        (["adam/5", "sgd/5"], {"names": "{optimizer}/{n}", "seed": "n"}, {"adam": [5], "sgd": [5]}),
        (["adam_a", "adam_b", "other"], {"names": "{optimizer}_{_}", "group": ["optimizer"]}, {"adam": [0, 1]}),
        (["resnet18 seed0", "resnet 34=x seed0"], {}, {"resnet18": [0], "resnet_34_x": [0]}),
    ],
)
def test_rows_and_seeds_from_names(
    tmp_path: Path, names: list[str], how: dict[str, Any], expected: dict[str, list[int]]
) -> None:
    found = logs.find([study(tmp_path / "runs", dict.fromkeys(names, 1.0))], Asked("csv", METRIC, **how))
    assert {label: [seed for seed, _ in runs] for label, runs in rows(found).items()} == expected


def test_without_seeds_nothing_is_paired(tmp_path: Path) -> None:
    values = {f"{name}_{'abc'[k]}": base + k * k / 10 for name, base in (("adamw", 1), ("sgd", 2)) for k in range(3)}
    found = logs.find([study(tmp_path, values)], Asked("csv", METRIC, names="{optimizer}_{_}", group=["optimizer"]))
    assert any("no seed known" in note and "no test is paired" in note for note in found.notes)
    (made,) = tables(found.runs, tuned=[])
    assert made.rows[1].difference is not None
    assert not made.rows[1].difference.paired
    assert made.rows[1].kind == "worse"


def test_settings_that_are_no_row_are_refused_or_tuned(tmp_path: Path) -> None:
    lines = [
        (o, lr, seed, 1, 1 + abs(lr - 0.2) + seed / 10) for o in BEST for lr in (0.1, 0.2, 0.3) for seed in range(3)
    ]
    table(tmp_path / "all.csv", ["optimizer", "lr", "seed", "step", METRIC], lines)
    with pytest.raises(UserError, match="is more than one run: --group, --seed and --tuned name the columns"):
        logs.find([tmp_path], Asked("csv", METRIC, group=["optimizer"]))
    found = logs.find([tmp_path], Asked("csv", METRIC, group=["optimizer"], tuned=["lr"]))
    (made,) = tables(found.runs, tuned=["optim.lr"])
    assert [(row.label, len(row.trials), row.n) for row in made.rows] == [("adamw", 3, 3), ("caspr", 3, 3)]
    assert made.rows[0].selected is not None
    assert made.rows[0].selected.values == {"optim.lr": 0.2}
    by_add_hparams(tmp_path / "runs")
    with SummaryWriter(str(tmp_path / "runs" / "more")) as writer:
        writer.add_scalar(METRIC, 1.0, 30)
        writer.add_hparams({"optimizer": "caspr", "seed": 0, "lr": 0.2}, {"hparam/x": 1.0})
    found = logs.find([tmp_path / "runs"], Asked("tensorboard", METRIC, group=["optimizer", "lr"]))
    assert set(rows(found)) == {"adamw", "caspr lr=0.1", "caspr lr=0.2"}
    with pytest.raises(UserError, match=r"2 runs of caspr with seed 0 differ in lr: --group KEY,\.\.\. makes a row"):
        logs.find([tmp_path / "runs"], Asked("tensorboard", METRIC, group=["optimizer"]))


def test_what_differs_within_a_row_is_said(tmp_path: Path) -> None:
    lines = [(f"r{k}", o, lr, k, k, 3.0 + k) for k, (o, lr) in enumerate([("a", 1), ("a", 2), ("b", 1), ("b", 1)])]
    table(tmp_path / "all.csv", ["Name", "optimizer", "width", "seed", "Runtime", METRIC], lines)
    found = logs.find([tmp_path], Asked("wandb", METRIC, group=["optimizer"]))
    assert [note for note in found.notes if "within" in note] == [
        "width differs within a (--group KEY,... makes a row of each value)"
    ]
    assert len({run.path for run in found.runs}) == 4


def test_a_path_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    by_keras(tmp_path / "runs")
    assert len(logs.find([tmp_path / "runs", tmp_path], Asked("csv", METRIC)).runs) == len(RUNS)


# ---- values ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_its_last_values(tmp_path: Path) -> None:
    """The later of two event files counts, and the steps that it purges are gone."""
    events(tmp_path / "adamw_seed0", [(10, 5.0), (20, 4.0), (30, 9.0), (40, 9.0)], filename_suffix=".a")
    for k, file in enumerate((tmp_path / "adamw_seed0").iterdir()):
        file.rename(file.with_name(f"events.out.tfevents.000000000{k}.x"))
    events(tmp_path / "adamw_seed0", [(30, 3.0)], purge_step=25)
    events(tmp_path / "adamw_seed1", [(10, 5.0), (20, 4.0), (20, 4.5), (30, 2.0), (30, 2.5)])
    found = logs.find([tmp_path], Asked("tensorboard", METRIC))
    first, second = found.runs
    assert [(p.step, p.value) for p in first.curve] == [(10, 5.0), (20, 4.0), (30, 3.0)]
    assert [(p.step, p.value) for p in second.curve] == [(10, 5.0), (20, 4.5), (30, 2.5)]
    assert [note for note in found.notes if "the last counts" in note and "adamw_seed1" in note and "seed0" not in note]


def lengths(root: Path) -> Path:
    for name, points in {
        "adamw_seed0": [(10, 4.0), (20, 3.0), (30, 3.5)],
        "adamw_seed1": [(10, 4.0), (20, 3.2)],  # crashed
        "adamw_seed2": [(10, 4.0), (20, 3.4), (30, math.nan)],
    }.items():
        table(root / f"{name}.csv", ["step", METRIC], points)
    return root


@pytest.mark.parametrize(
    ("at", "finals", "states", "said"),
    [
        ("end", [3.5, None, None], ["done", "failed", "done"], "adamw_seed1.csv: ends too early and counts as failed"),
        ("best", [3.0, 3.2, 3.4], ["done"] * 3, "runs end at different steps, from 20 to 30 (--at 20 compares all"),
        (20, [3.0, 3.2, 3.4], ["done"] * 3, ""),
        (25, [3.0, None, 3.4], ["done", "failed", "done"], "adamw_seed1.csv: ends too early"),
        (5, [None] * 3, ["failed"] * 3, ""),
    ],
)
def test_runs_of_different_lengths(
    tmp_path: Path, at: str | int, finals: list[float | None], states: list[str], said: str
) -> None:
    found = logs.find([lengths(tmp_path)], Asked("csv", METRIC, at=at))
    assert [run.final for run in found.runs] == finals
    assert [run.state for run in found.runs] == states
    assert said in "\n".join(found.notes)
    from caspr_cli.report import format

    if at == 5:
        return
    words = {"end": "at the end", "best": "at its best step"}.get(str(at), f"at step {at}")
    assert f": val/loss {words}, lower is better" in format.title(tables(found.runs, tuned=[])[0])


def test_what_a_tracker_says_of_a_run_counts(tmp_path: Path) -> None:
    store = tmp_path / "mlruns" / "0"
    mlflow(store / "a", "adamw-s0", [(10, 3.0), (20, 2.0)])
    mlflow(store / "b", "adamw-s1", [(10, 3.0)])  # finished: it stopped early
    mlflow(store / "c", "adamw-s2", [(10, 3.0)], status=4)
    mlflow(store / "d", "adamw-s3", [], status=5)  # killed before the first value
    mlflow(store / "e", "adamw-s4", [(10, 3.0)], status=1)
    mlflow(store / "f", "adamw-s5", [(10, math.inf)])
    mlflow(store / "g", "adamw-s6", [])
    mlflow(store / "h", "adamw-s7", [(10, 1.0)])
    meta = store / "h" / "meta.yaml"
    meta.write_text(meta.read_text().replace("active", "deleted"))
    (store / "d" / "metrics" / "val" / "loss").unlink()
    found = logs.find([tmp_path], Asked("mlflow", METRIC))
    assert [(run.seed, run.state, run.final) for run in found.runs] == [
        (0, "done", 2.0), (1, "done", 3.0), (2, "failed", None), (3, "failed", None), (4, "running", None),
        (5, "done", None),
    ]  # fmt: skip
    assert any(note.startswith("without val/loss, left out:") and note.endswith("/g") for note in found.notes)


@pytest.mark.parametrize(
    ("metric", "given", "higher", "said"),
    [
        ("val/loss", None, False, False), ("val_acc", None, True, True), ("eval/accuracy", None, True, True),
        ("test/top1", None, True, True), ("mAP@50", None, True, True), ("roc_auc", None, True, True),
        ("map_loss", None, False, False), ("whatever", None, False, True), ("val/loss", True, True, False),
        ("val_acc", False, False, False),
    ],
)  # fmt: skip
def test_the_direction_is_guessed_and_said(
    metric: str, given: bool | None, higher: bool, said: bool, tmp_path: Path
) -> None:
    table(tmp_path / "adamw_seed0.csv", ["step", metric], [(1, 0.5)])
    found = logs.find([tmp_path], Asked("csv", metric, higher=given))
    (made,) = tables(found.runs, tuned=[])
    assert made.higher_is_better == higher
    assert any("by its name" in note for note in found.notes) == said


# ---- the command -----------------------------------------------------------------------------------------------------


DAMAGED = "is no event file of TensorBoard, or is damaged: the rest of it is left out"
OWN = ("--from", "csv", "runs", "--metric", METRIC)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.chdir(tmp_path)
    return Call("caspr-report", report.main, monkeypatch, capsys)


def test_the_examples_of_the_help_run(call: Call) -> None:
    by_add_hparams(Path("runs"))
    for k, (optimizer, seed) in enumerate(RUNS):
        folder = Path("lightning_logs", f"version_{k}")
        table(folder / "metrics.csv", ["step", "val_acc"], [(s, 1 / v) for s, v in curve(optimizer, seed)])
        (folder / "hparams.yaml").write_text(f"optimizer: {optimizer}\nseed: {seed}\n")
        mlflow(Path("mlruns/0", f"{k:032x}"), "wise", curve(optimizer, seed), optimizer=optimizer, seed=seed, lr=0.1)
    by_wandb_chart(Path())
    Path("wandb_export.csv").rename("export.csv")
    assert call("compare", "--help") == 0
    text = call.out
    assert max(map(len, text.splitlines())) <= 80
    lines = text.replace(" \\\n", " ").splitlines()  # as a shell reads a line that goes on
    examples = [shlex.split(line) for line in lines if line.startswith("  caspr-report compare --from")]
    assert [example[3] for example in examples] == list(report.SOURCES)
    for example in examples:
        assert call(*example[1:]) == 0
        out = call.out
        assert "\ncaspr " in out
        assert "against adamw: better" in out
    assert "in short" in Path("report.html").read_text() or "Best mean: caspr" in Path("report.html").read_text()


def test_other_commands_read_logs_too(call: Call) -> None:
    by_keras(Path("runs"))
    assert call("curves", *OWN, "--to", "curves.svg") == 0
    assert "caspr" in Path("curves.svg").read_text()
    assert call("list", *OWN) == 0
    assert "runs/caspr-s2.csv" in call.out
    assert call("compare", *OWN, "--json") == 0
    assert [row["label"] for row in json.loads(call.out)] == ["caspr", "adamw"]
    assert call.err.startswith("note     a row for each value of the name without its seed (--group KEY,...")
    assert call("profile", *OWN, "--target", "runs=3.6") == 0
    assert "caspr" in call.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--from", "tensorboard"], "--from tensorboard: name the folder or the files of the logs"),
        (["--metric", "x"], "--metric: only with --from (tensorboard, csv, wandb, mlflow)"),
        (["--from", "tensorbord", "runs"], "--from tensorbord: no such choice. Did you mean tensorboard?"),
        (["--from", "mlflow", "runs", "--step", "x"], "--step: mlflow has steps of its own"),
        (["--from", "csv", "nowhere"], "nowhere: no such file or directory"),
        (["--from", "tensorboard", "runs"], "runs: no event files of TensorBoard (events.out.tfevents.*) there"),
        (["--from", "mlflow", "runs"], "runs: no runs of MLflow (mlflow.db or mlruns) there"),
        (["--from", "mlflow", "text.txt"], "text.txt: is no database of MLflow"),
        (["--from", "csv", "empty"], "empty: no CSV files there"),
        (["--from", "csv", "text.txt"], "text.txt: is no CSV with a line of heads and as many values in each line"),
        (["--from", "csv", "binary"], "binary: cannot be read as CSV"),
        (["--from", "tensorboard", "text.txt"], f"text.txt: {DAMAGED}"),
        (["--from", "csv", "runs"], "--from csv: name a metric with --metric (metrics: epoch, loss and val/loss)"),
        (["--from", "csv", "runs", "--metric", "val_loss"], "--metric val_loss: no run has it. Did you mean val/loss?"),
        ([*OWN, "--group", "optim"],
         "--group optim: no run has this key. (keys: loss)"),
        ([*OWN, "--names", "{a}+{b}"], "--names {a}+{b}: no run is called so (runs: "),
        ([*OWN, "--names", "x"], "--names x: should have parts in braces, each once"),
        ([*OWN, "--step", "it"], "no column is called it (columns: epoch, loss and val/loss)"),
        ([*OWN, "--step", METRIC], "is no whole number; --step COLUMN names another"),
        ([*OWN, "--at", "last"], "--at: should be end, best, or a step, but is last"),
        (["--from", "csv", "words.csv", "--metric", METRIC],
         "words.csv: step '1' and val/loss 'high' should be numbers"),
        (["--from", "csv", "seeds.csv", "--metric", METRIC],
         "the seed should be a whole number but is 0.5; --seed KEY"),
    ],
)  # fmt: skip
def test_mistakes_get_a_line_and_exit_code_2(argv: list[str], message: str, call: Call) -> None:
    by_keras(Path("runs"))
    Path("empty").mkdir()
    Path("text.txt").write_text("some words, and more\nof them\nand, so, on\nto the end\n")
    Path("binary").write_bytes(b"\x80\xff\x00")
    table(Path("words.csv"), ["step", METRIC], [(1, "high")])
    table(Path("seeds.csv"), ["step", "seed", METRIC], [(1, 0.5, 1.0)])
    assert call("compare", *argv) == 2
    err = call.err
    assert message in err
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")


def test_a_damaged_file_among_others_is_named(tmp_path: Path) -> None:
    by_folder(tmp_path)
    (tmp_path / "adamw_seed9").mkdir()
    (tmp_path / "adamw_seed9" / "events.out.tfevents.1.x").write_bytes(b"nonsense")
    found = logs.find([tmp_path], Asked("tensorboard", METRIC))
    assert len(found.runs) == 6
    assert [line.partition(": ")[2] for line in found.warnings] == [DAMAGED]
    whole = next((tmp_path / "caspr_seed0").iterdir())
    whole.write_bytes(whole.read_bytes()[:-5])  # cut off while it was written
    flipped = next((tmp_path / "caspr_seed1").iterdir())
    content = bytearray(flipped.read_bytes())
    content[-6] ^= 1  # in the last value
    flipped.write_bytes(content)
    found = logs.find([tmp_path], Asked("tensorboard", METRIC))
    assert [line.partition(": ")[0] for line in found.warnings if DAMAGED in line][-1] == str(flipped)
    states = {run.path: run.state for run in found.runs}
    assert states.pop(str(tmp_path / "caspr_seed1")) == "failed"
    assert states.pop(str(tmp_path / "caspr_seed0")) == "failed"
    assert set(states.values()) == {"done"}


def test_tensorboard_is_read_without_torch_and_tensorflow(tmp_path: Path) -> None:
    """Without TensorBoard itself, a line says what to install."""
    by_folder(tmp_path)
    program = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
from caspr_cli.commands.report import main
sys.exit(main())
"""
    argv = ["compare", "--from", "tensorboard", str(tmp_path), "--metric", METRIC]
    for blocked, code, said in (
        (("torch", "tensorflow", "lightning", "hydra"), 0, "against adamw: better"),
        (("tensorboard",), 2, "error: this needs tensorboard, which is not installed: pip install 'caspr-cli[run]'\n"),
    ):
        command = [sys.executable, "-c", program.format(blocked=blocked), *argv]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == code, done.stderr
        assert said in (done.stderr if code else done.stdout)


def test_without_hyperparameters_the_message_says_where_a_key_can_come_from(tmp_path: Path) -> None:
    (tmp_path / "adam_seed0").mkdir()
    (tmp_path / "adam_seed0" / "log.csv").write_text("step,loss\n1,2.0\n2,1.0\n")
    with pytest.raises(UserError) as caught:
        logs.find([tmp_path], Asked("csv", "loss", group=["optimizer"]))
    said = str(caught.value)
    assert said.startswith("--group optimizer: these runs have no hyperparameters; leave it out, or ")
    assert said.endswith(": --names '{optimizer}_seed{seed}'")
    assert "adam_seed0" in said
