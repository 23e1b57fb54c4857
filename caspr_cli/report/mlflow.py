"""Reads runs of MLflow, from its databases and its older file stores, as curves of one metric."""

import math
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from caspr_cli.report.trackers import STATE, Asked, Found, Log, Points, keys_of, updated, value_of, walk


def read_mlflow(root: Path, asked: Asked, into: Found) -> Iterator[str]:
    """Read the runs of databases, and of file stores: folders with ``meta.yaml``, ``metrics`` and ``params``."""
    for folder, inner, files in walk(root, into):
        for file in (folder / name for name in files if name.endswith(".db") or folder / name == root):
            yield from _database(file, asked, into)
        meta = keys_of(folder / "meta.yaml", into) if "meta.yaml" in files else {}
        if "run_id" not in meta or "metrics" not in inner:
            continue
        inner.clear()
        if meta.get("lifecycle_stage") == "deleted":
            continue
        yield str(folder)
        metrics, params = (_texts(folder / part) for part in ("metrics", "params"))  # a slash in a name is a folder
        into.metrics |= metrics.keys()
        keys = {key: value_of(text.strip()) for key, text in params.items()}
        points: Points = []
        try:
            for line in metrics.get(asked.metric or "", "").splitlines():
                _, value, step = line.split()
                points.append((float(step), float(value)))
        except ValueError:
            file = folder / "metrics" / str(asked.metric)
            into.warnings.append(f"{file}: line {len(points) + 1} should be time, value and step: {folder} is left out")
            continue
        experiment = keys_of(folder.parent / "meta.yaml", into).get("name", folder.parent.name)
        name, state = str(meta.get("run_name") or meta["run_id"]), STATE.get(str(meta.get("status")).casefold())
        into.add(Log(str(folder), name, points, keys, str(experiment), state, updated(folder / "meta.yaml")))


def _texts(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): file.read_text(encoding="utf8", errors="replace") for file in files}


def _database(file: Path, asked: Asked, into: Found) -> Iterator[str]:
    """Read a database of SQLite, in which MLflow keeps runs since 3.7."""
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as database:
            into.metrics |= {name for (name,) in database.execute("SELECT DISTINCT key FROM metrics")}
            keys: dict[str, dict[str, Any]] = defaultdict(dict)
            for run, key, value in database.execute("SELECT run_uuid, key, value FROM params"):
                keys[run][key] = value_of(value)
            values = "SELECT run_uuid, step, value, is_nan FROM metrics WHERE key = ? ORDER BY timestamp, rowid"
            points: dict[str, Points] = defaultdict(list)
            for run, step, value, nan in database.execute(values, [asked.metric]):
                points[run].append((float(step), math.nan if nan else value))
            runs = database.execute(
                "SELECT run_uuid, runs.name, status, end_time, experiments.name FROM runs JOIN experiments "
                "USING (experiment_id) WHERE runs.lifecycle_stage = 'active' ORDER BY start_time, run_uuid"
            ).fetchall()
    except sqlite3.Error:
        into.warnings.append(f"{file}: is no database of MLflow")
        return
    for run, name, status, end, experiment in runs:
        yield str(run)
        state = STATE.get(status.casefold())
        into.add(Log(f"{file}:{run}", name or run, points[run], keys[run], experiment, state, str(end or "")))
