"""Records without training: as values, and as the directories that caspr-train would have left."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import yaml

from caspr_cli.report.model import Point, Run

CONFIG: dict[str, Any] = {
    "task.name": "c4_lm", "task.data": "sample", "task.root": None, "task.batch_size": 32,
    "task.target.metric": "val/loss", "task.target.value": 4.5, "task.target.higher_is_better": False,
    "task.layers": 4, "optim.name": "adamw", "optim.lr": 0.003, "optim.weight_decay": 0.0, "optim.betas": [0.9, 0.95],
    "scale": "sample", "debug": "none", "trainer.devices": 1, "trainer.precision": "32-true", "trainer.max_steps": 300,
    "trainer.val_every": 100, "trainer.rendezvous": None, "schedule.warmup": 0.05, "seed": 0, "trial": None,
    "search.name": None, "search.trials": 20, "resume": "auto", "output_dir": "/home/someone/outputs",
}  # fmt: skip
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
PROVENANCE = {
    "command": ["/usr/bin/caspr-train", "optim=adamw", "task.root=/data/secret"],
    "caspr_cli": "0.1.0",
    "code": {"commit": "0123456789abcdef", "diff": "- a\n+ b\n", "diff_sha256": "feedfeedfeedfeed"},
    "python": "3.11.7",
    "packages": {"torch": "2.9.0"},
    "machine": {"host": "somewhere", "processor": "A CPU", "cores": 2},
    "data": {"name": "words", "source": "sample", "hash": "abcd"},
    "device": {"type": "cpu", "name": "cpu", "processes": 1, "threads": 1},
}


def run(
    optim: str = "adamw",
    seed: int = 0,
    final: float | None = 4.0,
    state: str = "done",
    curve: Sequence[tuple[int, float | None, float | None]] | None = None,
    provenance: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
    **given: Any,
) -> Run:
    """A record as it is read.

    Args:
        curve: step, seconds and value of each validation; by default three, the last of them ``final``.
        without: keys that the config lacks.
        given: keys of the config, with ``__`` for the dot.
    """
    changes = {key.replace("__", "."): value for key, value in given.items()}
    config = {k: v for k, v in (CONFIG | {"optim.name": optim, "seed": seed} | changes).items() if k not in without}
    metric = config["task.target.metric"]
    last = 5.0 if final is None else final
    points = [(100, 10.0, last + 1), (200, 20.0, last + 0.2), (300, 30.0, final)] if curve is None else list(curve)
    result: dict[str, Any] = {}
    if state == "done":
        result = {
            "steps": 300,
            "seconds": 31.0,
            "final": {"step": 300, metric: final},
            "test": {metric.replace("val/", "test/"): None if final is None else final + 0.1},
            "target": _target(config, points),
        }
    status = {"state": state, "error": "loss is nan" if state == "failed" else None, "pid": 77, "host": "somewhere"}
    status |= {"step": 300 if state == "done" else 100, "updated": f"2026-01-01T00:00:{seed:02d}Z"}
    path = f"outputs/{config['task.name']}/{optim}/{crc32(str(changes).encode()):08x}/seed{seed}"
    made = tuple(Point(*point) for point in points) if state != "new" else ()
    return Run(path, config, status, result, PROVENANCE | dict(provenance or {}), made)


def _target(config: Mapping[str, Any], points: Sequence[tuple[int, float | None, float | None]]) -> dict[str, Any]:
    value, sign = config["task.target.value"], -1 if config["task.target.higher_is_better"] else 1
    reached = [p for p in points if value is not None and p[2] is not None and sign * p[2] <= sign * value]
    step, seconds = reached[0][:2] if reached else (None, None)
    return {"metric": config["task.target.metric"], "value": value, "step": step, "seconds": seconds}


def write(run: Run, path: Path, training_lines: int = 3) -> Path:
    """The directory of such a record."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.dump(_nested(run.config), Dumper=DUMPER), encoding="utf8")
    for name, content in (("status", run.status), ("result", run.result), ("provenance", run.provenance)):
        if content:
            (path / f"{name}.json").write_text(json.dumps(content), encoding="utf8")
    lines = [{"step": k, "train/loss": 5.0, "lr": 1e-3} for k in range(training_lines)]
    for point in run.curve:
        seconds = {} if point.seconds is None else {"time/seconds": point.seconds}
        lines.append({"step": point.step, run.metric: point.value, **seconds})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
    return path


def _nested(config: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in config.items():
        *groups, name = key.split(".") if not key.startswith("search.space.") else _space(key)
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    return tree


def _space(key: str) -> list[str]:
    """search, space, the tuned key as one word, and the kind of its range."""
    inner, _, kind = key.removeprefix("search.space.").rpartition(".")
    return ["search", "space", inner, kind]
