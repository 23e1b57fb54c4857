"""Reads the logs of other programs, TensorBoard and CSV (Lightning, Keras, W&B), as curves of one metric.

Nothing here decides what is a seed or a row; see ``logs``. MLflow is in ``mlflow``.
"""

from __future__ import annotations

import csv
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from caspr_cli.common.errors import UserError
from caspr_cli.common.format import listed
from caspr_cli.common.shape import DONE, FAILED
from caspr_cli.report.records import LOADER, NO_YAML, flat

# The first there is. (W&B's _step counts calls of its log.)
STEPS = ("step", "global_step", "trainer/global_step", "_step", "iteration", "iter", "epoch")
RUNS = ("name", "run", "run_name", "run name", "run_id", "id")  # columns that say which run a line is of
STATES = ("state", "status")
UNNAMED = ("metrics", "history", "log", "logs", "training", "results")  # such a CSV is called as its folder
BANDS = ("__MIN", "__MAX")  # W&B's columns beside each curve
# MLflow writes the number of a state.
STATE = {"3": DONE, "4": FAILED, "5": FAILED, "1": "running", "2": "running", "finished": DONE, "failed": FAILED,
         "killed": FAILED, "crashed": FAILED, "running": "running", "scheduled": "running"}  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What to read: the metric, the column of steps, and which columns say of which run a line is."""

    metric: str | None
    step: str | None = None
    keys: Sequence[str] = ()
    is_seed: Callable[[str], bool] = lambda _: False


@dataclass
class Log:
    """One run.

    Args:
        path: its file or folder.
        name: what it is called, as ``runs/adam/seed0``.
        points: step and value in the order in which they were logged.
        keys: hyperparameters.
        task: what it is a run of, where the log says it.
        state: ``done``, ``failed`` or ``running``, where the log says it.
        updated: when it was written last.
    """

    path: str
    name: str
    points: list[tuple[float, float]]
    keys: dict[str, Any]
    task: str | None = None
    state: str | None = None
    updated: str = ""


@dataclass
class Logs:
    """What was found: runs, the names of all metrics, what could not be read, and folders without the metric."""

    runs: list[Log] = field(default_factory=list)
    metrics: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)


def value_of(text: Any) -> Any:
    """Return the number or truth value that a text is, or else the text."""
    if not isinstance(text, str) or "_" in text:  # Python reads 1_0 as 10
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.casefold(), text)


def same(key: str, column: str) -> bool:
    """Return whether a user may call a column so: in full, or by the last part of its name."""
    return key == column or key == re.split(r"[./]", column)[-1]


def walk(root: Path, into: Logs) -> Iterator[tuple[Path, list[str], list[str]]]:
    def failed(error: OSError) -> None:
        into.warnings.append(f"{error.filename}: cannot be read ({error.strerror})")

    for folder, inner, files in os.walk(root, onerror=failed):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield Path(folder), inner, sorted(files)


def _name(root: Path, path: Path) -> str:
    """Return the name of a run: its path from the folder that was named, with this folder's own name."""
    return "/".join([root.resolve().name, *path.relative_to(root).parts])


def updated(*files: Path) -> str:
    return datetime.fromtimestamp(max(file.stat().st_mtime for file in files), UTC).isoformat(timespec="seconds")


# ---- hyperparameters in YAML -----------------------------------------------------------------------------------------


class _Plain(LOADER):
    """Reads values alone: an object of Python is the list, mapping or text that it was written as."""


def _constructed(loader: Any, _: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    return (
        loader.construct_sequence(node, deep=True)
        if isinstance(node, yaml.SequenceNode)
        else loader.construct_scalar(node)
    )


_Plain.add_multi_constructor("", _constructed)


def keys_of(file: Path, into: Logs) -> dict[str, Any]:
    """Return the dotted keys of a file; none if it is not there or, with a warning, cannot be read."""
    try:
        plain = yaml.load(file.read_bytes(), Loader=_Plain)
    except FileNotFoundError:
        return {}
    except (OSError, *NO_YAML):
        into.warnings.append(f"{file}: cannot be read: its keys are not known")
        return {}
    return {key: value_of(value) for key, value in flat(plain).items()} if isinstance(plain, dict) else {}


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def read_tensorboard(root: Path, wanted: Wanted, into: Logs) -> Iterator[str]:
    """Read event files; a folder of them is one run, as TensorBoard has it."""
    folders: dict[Path, Log] = {}
    nested: dict[Path, dict[str, Any]] = {}
    for folder, _, names in walk(root, into) if root.is_dir() else [(root.parent, [], [root.name])]:
        files = [folder / name for name in names if "tfevents" in name or folder / name == root]
        if not files:
            continue
        curves, keys = _events(files, wanted, into)
        yield from curves or keys
        tags = {tag: (folder, tag) for tag in curves}
        tags |= {f"{folder.name}/{tag}": (folder.parent, tag) for tag in curves}  # Keras: validation/epoch_loss
        into.metrics |= curves.keys()
        run, tag = tags.get(wanted.metric or "", (folder, ""))
        keys = keys_of(folder / "hparams.yaml", into) | keys
        nested[folder] = keys
        name = _name(root if root.is_dir() else folder, run if run.is_relative_to(root) else folder)
        folders[folder] = Log(str(run), name, curves.get(tag, []), keys, updated=updated(*files))
    for folder, log in folders.items():
        if folder.parent in folders and folders[folder.parent].points and nested[folder]:
            folders[folder.parent].keys |= nested[folder]  # SummaryWriter.add_hparams opens a folder of its own
        elif log.points:
            into.runs.append(log)
        else:
            into.without.append(log.path)


def _events(
    files: Sequence[Path], wanted: Wanted, into: Logs
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, Any]]:
    """Return the scalars by tag, and hyperparameters. What a later attempt says to purge is left out.

    TensorBoard's own loader imports TensorFlow where it is installed, and without it takes three times as long.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from tensorboard.util.tensor_util import make_ndarray

    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    keys: dict[str, Any] = {}
    tag = (wanted.metric or "").rpartition("/")[2].encode()
    for file in files:
        try:
            for record in _records(file, tag):
                event = Event.FromString(record)
                if event.session_log.status == SessionLog.START:
                    for name, points in curves.items():
                        curves[name] = [point for point in points if point[0] < event.step]
                for value in event.summary.value:
                    plugin = value.metadata.plugin_data
                    if value.HasField("simple_value"):
                        curves[value.tag].append((float(event.step), value.simple_value))
                    elif plugin.plugin_name == "scalars" or (value.tag in curves and value.HasField("tensor")):
                        curves[value.tag].append((float(event.step), float(make_ndarray(value.tensor))))
                    elif plugin.plugin_name == "hparams":
                        own = HParamsPluginData.FromString(plugin.content).session_start_info.hparams
                        keys |= {key: getattr(v, kind) for key, v in own.items() if (kind := v.WhichOneof("kind"))}
        except OSError as error:
            into.warnings.append(f"{file}: cannot be read ({error.strerror})")
        except (DecodeError, ValueError):
            into.warnings.append(f"{file}: is no event file of TensorBoard, or is damaged: the rest of it is left out")
    return curves, keys


def _records(file: Path, checked: bytes) -> Iterator[bytes]:
    """Yield the records of an event file, to its end or to where it was cut off.

    Args:
        checked: the sums of records that hold these bytes are checked, and that of the first.

    Raises:
        ValueError: a sum is wrong.
    """
    from tensorboard.summary.writer.record_writer import masked_crc32c

    content, at = file.read_bytes(), 0
    while at < len(content):  # length (8 bytes), its sum (4), the record, its sum (4)
        end = at + 12 + int.from_bytes(content[at : at + 8], "little")
        record, total = content[at + 12 : end], content[end : end + 4]
        if (
            (at == 0 or checked in record)
            and len(total) == 4
            and int.from_bytes(total, "little") != masked_crc32c(record)
        ):
            raise ValueError
        if len(total) < 4:
            if at == 0:
                raise ValueError
            return
        yield record
        at = end + 4


# ---- CSV -------------------------------------------------------------------------------------------------------------


def read_csv(root: Path, wanted: Wanted, into: Logs) -> Iterator[str]:
    """Read tables: a file a run (Lightning, Keras), a column a run (a chart of W&B), or a column that names the run."""
    found = (folder / name for folder, _, names in walk(root, into) for name in names if name.endswith(".csv"))
    for file in [root] if root.is_file() else found:
        try:
            with file.open(newline="", encoding="utf-8-sig") as stream:
                head = stream.readline()
                stream.seek(0)
                separator = max(",;\t", key=head.count)
                heads, *lines = [line for line in csv.reader(stream, delimiter=separator) if line] or [[]]
        except (OSError, ValueError, csv.Error):
            into.warnings.append(f"{file}: cannot be read as CSV")
            continue
        if len(heads) < 2 or "" in heads[1:] or any(len(line) != len(heads) for line in lines[:-1]):
            into.warnings.append(f"{file}: is no CSV with a line of heads and as many values in each line")
            continue
        yield str(file)
        rows = [dict(zip(heads, line, strict=True)) for line in lines if len(line) == len(heads)]  # the last may be cut
        name = file.with_suffix("") if file.stem.casefold() not in UNNAMED else file.parent
        own = _name(root, name) if root.is_dir() else name.resolve().name
        into.metrics |= {head.rpartition(" - ")[2] for head in heads if not head.endswith(BANDS)}
        try:
            into.runs += _table(heads, rows, Log(str(file), own, [], {}, updated=updated(file)), wanted, into)
        except ValueError as error:
            raise UserError(f"{file}: {error}") from error


def _table(heads: Sequence[str], rows: list[dict[str, str]], file: Log, wanted: Wanted, into: Logs) -> Iterator[Log]:
    """Yield the runs of one file.

    Raises:
        ValueError: a step or a value is no number.
    """
    lower = {head.casefold(): head for head in reversed(heads)}
    step = wanted.step or next((lower[name] for name in STEPS if name in lower), None)
    wide = [head for head in heads if head.endswith(f" - {wanted.metric}")]
    if wanted.metric is not None and wanted.metric in heads:
        owners = [head for head in heads if head.casefold() in RUNS]
        owners = owners or [head for head in heads if _is_text(rows, head)]
        owners += [head for head in heads if wanted.is_seed(head) or any(same(key, head) for key in wanted.keys)]
        state = next((lower[name] for name in STATES if name in lower), None)
        groups: dict[Any, list[dict[str, str]]] = defaultdict(list)
        several = any(len({row[head] for row in rows}) > 1 for head in owners)
        for number, row in enumerate(rows):  # without steps, each line is the whole run that it names
            groups[number if several and not step else tuple(row[head] for head in owners)].append(row)
        beside = keys_of(Path(file.path).parent / "hparams.yaml", into)
        for own in groups.values():
            keys = {head: value_of(own[0][head]) for head in heads if len({row[head] for row in own}) == 1}
            others = {wanted.metric, step, state, *(head for head in owners if head.casefold() in RUNS)}
            keys = beside | {head: value for head, value in keys.items() if value != "" and head not in others}
            called = next((own[0][head] for head in owners if head.casefold() in RUNS), file.name)
            ended = STATE.get(own[-1][state].casefold()) if state else None
            points = _points(own, step, wanted.metric)
            if several and [at for at, _ in points].count(min(points, default=(0, 0))[0]) > 1:  # a resume begins later
                raise ValueError(
                    f"{called} has several values of {wanted.metric} at its first step, so it is more than one run: "
                    f"--group, --seed and --tuned name the columns that tell them apart"
                )
            if points or ended == FAILED:
                path = ":".join([file.path, *(own[0][head] for head in owners if several)])
                yield Log(path, called, points, keys, None, ended, file.updated)
            else:
                into.without.append(f"{called} in {file.path}")
    elif wide:
        for head in wide:
            called = head.removesuffix(f" - {wanted.metric}")
            yield Log(f"{file.path}:{called}", called, _points(rows, step, head), {}, updated=file.updated)
    else:
        into.without.append(file.path)


def _is_text(rows: Sequence[Mapping[str, str]], head: str) -> bool:
    """Return whether a column holds words of which each occurs again, as names of optimizers do, and times do not."""
    values = [row[head] for row in rows if row[head] != ""]
    words = {value for value in values if isinstance(value_of(value), str)}
    return bool(words) and 2 * len(set(values)) <= len(values)


def _points(rows: Sequence[Mapping[str, str]], step: str | None, metric: str) -> list[tuple[float, float]]:
    """Return step and value of each line that has the metric; without a column of steps, lines are numbered.

    Raises:
        ValueError: one of them is no number, or there is no such column.
    """
    found = []
    for number, row in enumerate(rows, 1):
        if step is not None and step not in row:
            raise ValueError(f"no column is called {step} (columns: {listed(list(row), 12)})")
        if row[metric] != "":
            at = row[step] if step else number
            try:
                found.append((float(at), float(row[metric])))
            except ValueError:
                raise ValueError(f"step {at!r} and {metric} {row[metric]!r} should be numbers") from None
    return found
