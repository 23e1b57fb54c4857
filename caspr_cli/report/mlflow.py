"""Reads runs of MLflow, from its databases and its older file stores, as curves of one metric."""

from __future__ import annotations

import math
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from caspr_cli.common.shape import FAILED
from caspr_cli.report.trackers import STATE, Log, Logs, Wanted, keys_of, updated, value_of, walk


def read_mlflow(root: Path, wanted: Wanted, into: Logs) -> Iterator[str]:
    """Read the runs of databases, and of file stores: folders with ``meta.yaml``, ``metrics`` and ``params``."""
    if root.is_file():
        yield from _database(root, wanted, into)
    for folder, inner, files in walk(root, into) if root.is_dir() else ():
        for name in files:
            if name.endswith(".db"):
                yield from _database(folder / name, wanted, into)
        meta = keys_of(folder / "meta.yaml", into) if "meta.yaml" in files else {}
        if "run_id" not in meta or "metrics" not in inner:
            continue
        inner.clear()
        if meta.get("lifecycle_stage") == "deleted":
            continue
        yield str(folder)
        metrics, params = (_files(folder / part) for part in ("metrics", "params"))
        into.metrics |= metrics.keys()
        keys = {key: value_of(_text(file).strip()) for key, file in params.items()}
        points, file = [], metrics.get(wanted.metric or "")
        try:
            for line in _text(file).splitlines() if file else ():
                _, value, step = line.split()
                points.append((float(step), float(value)))
        except ValueError:
            into.warnings.append(f"{file}: line {len(points) + 1} should be time, value and step: {folder} is left out")
            continue
        state = STATE.get(str(meta.get("status")).casefold())
        if not points and state != FAILED:
            into.without.append(str(folder))
            continue
        experiment = keys_of(folder.parent / "meta.yaml", into).get("name", folder.parent.name)
        name = str(meta.get("run_name") or meta["run_id"])
        into.runs.append(Log(str(folder), name, points, keys, str(experiment), state, updated(folder / "meta.yaml")))


def _database(file: Path, wanted: Wanted, into: Logs) -> Iterator[str]:
    """Read a database of SQLite, in which MLflow keeps runs since 3.7."""
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as database:
            into.metrics |= {name for (name,) in database.execute("SELECT DISTINCT key FROM metrics")}
            keys: dict[str, dict[str, Any]] = defaultdict(dict)
            for run, key, value in database.execute("SELECT run_uuid, key, value FROM params"):
                keys[run][key] = value_of(value)
            values = "SELECT run_uuid, step, value, is_nan FROM metrics WHERE key = ? ORDER BY timestamp, rowid"
            points: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for run, step, value, nan in database.execute(values, [wanted.metric]):
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
        log = Log(f"{file}:{run}", name or run, points[run], keys[run], experiment, state, str(end or ""))
        if log.points or state == FAILED:
            into.runs.append(log)
        else:
            into.without.append(log.path)


def _files(folder: Path) -> dict[str, Path]:
    """Return the files below a folder by name; a slash in a name is a folder of its own."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {"/".join(path.relative_to(folder).parts): path for path in found}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf8", errors="replace")
