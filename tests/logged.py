"""One study in the logs of other programs: each format as its own writer leaves it."""

import csv
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter

from caspr_cli.report.trackers import Asked

METRIC = "val/loss"
OBJECTS = "shape: !!python/tuple [1, 2]\nnet: !!python/object:a.B {c: 1}\n"  # in hparams.yaml
DAMAGED = "not an event file of TensorBoard, or damaged: the rest of it is left out"
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
                nan = value == 99  # and then it is logged again
                row = (METRIC, 0.0 if nan else value, -when, step, nan, name)
                database.execute("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", row)
        database.commit()
    return Asked("mlflow", METRIC, group=["optimizer"])


WRITERS: list[Callable[[Path], Asked]] = [
    by_folder, by_add_hparams, by_tensorflow, by_lightning, by_keras, by_long_csv, by_wandb_chart, by_wandb_runs,
    by_wandb_history, by_mlflow, by_mlflow_database,
]  # fmt: skip
