"""Reads the logs of other programs, TensorBoard and CSV (Lightning, Keras, W&B), as curves of one metric.

Nothing here decides what is a seed or a row; see ``logs``. MLflow is in ``mlflow``.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from caspr_cli.common.errors import UserError
from caspr_cli.common.format import listed
from caspr_cli.common.shape import DONE, FAILED, LOADER, NO_YAML, flat
from caspr_cli.report.model import Run

if TYPE_CHECKING:
    from pandas import DataFrame, Series

SEEDS = ("seed", "random_seed", "rng_seed", "seed_everything", "manual_seed")
# Columns of steps: the first that a file has counts. (W&B's _step counts calls of its log.)
STEPS = ("step", "global_step", "trainer/global_step", "_step", "iteration", "iter", "epoch")
RUNS = ("name", "run", "run_name", "run name", "run_id", "id")  # columns that say which run a line is of
STATES = ("state", "status")
UNNAMED = ("metrics", "history", "log", "logs", "training", "results")  # a CSV of this name is called like its folder
STAMPED = re.compile(r"\d{9,}\.\d+")  # the folder that SummaryWriter.add_hparams opens is called by the time
BANDS = ("__MIN", "__MAX")  # W&B's columns beside each curve
# MLflow writes the number of a state.
STATE = {"3": DONE, "4": FAILED, "5": FAILED, "1": "running", "2": "running", "finished": DONE, "failed": FAILED,
         "killed": FAILED, "crashed": FAILED, "running": "running", "scheduled": "running"}  # fmt: skip
Points = list[tuple[float, float]]  # step and value, in the order in which they were logged


@dataclass(frozen=True)
class Asked:
    """The flags of the command line."""

    kind: str  # one of `READERS`
    metric: str | None
    # the hyperparameters of which each value is a row; None: the name of a run without its seed
    group: Sequence[str] | None = None
    seed: str | None = None
    names: str | None = None  # how a run is called, as `{optimizer}/seed{seed}`; its parts become hyperparameters
    step: str | None = None  # the column of steps
    tuned: Sequence[str] = ()  # hyperparameters among whose values the best is chosen
    higher: bool | None = None  # whether a higher value is better; None: by the name of the metric
    at: str | int = "end"  # `end`, `best`, or the last value at or before this step
    where: Sequence[str] = ()  # conditions; see `selection.where`

    def is_seed(self, key: str) -> bool:
        return same(self.seed, key) if self.seed else re.split(r"[./]", key)[-1].casefold() in SEEDS


@dataclass
class Log:
    """One run."""

    path: str  # its file or folder
    name: str  # what it is called, as `runs/adam/seed0`
    points: Points
    keys: dict[str, Any]  # hyperparameters
    task: str | None = None  # what it is a run of, where the log says it
    state: str | None = None  # `done`, `failed` or `running`, where the log says it
    updated: str = ""  # when it was written last


@dataclass
class Found:
    """The runs that were found below the given paths."""

    runs: list[Run] = field(default_factory=list)
    logs: list[Log] = field(default_factory=list)  # those with the metric, or that failed before they logged it
    metrics: set[str] = field(default_factory=set)  # the names of all
    without: list[str] = field(default_factory=list)  # files and folders without the metric
    warnings: list[str] = field(default_factory=list)  # of files that cannot be read
    notes: list[str] = field(default_factory=list)  # what was guessed or left out
    where: list[str] = field(default_factory=list)  # conditions that are of no hyperparameter, and not met yet

    def add(self, log: Log, name: str | None = None) -> None:
        if log.points or log.state == FAILED:
            self.logs.append(log)
        else:
            self.without.append(name or log.path)


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


def walk(root: Path, into: Found) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield each folder with the names of its folders and files; a file is one of its folder."""

    def failed(error: OSError) -> None:
        into.warnings.append(f"{error.filename}: cannot be read ({error.strerror})")

    if root.is_file():
        yield root.parent, [], [root.name]
        return
    for folder, inner, files in os.walk(root, onerror=failed):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield Path(folder), inner, sorted(files)


def _name(root: Path, path: Path) -> str:
    """Return the name of a run: its path from the folder that was named, with this folder's own name."""
    root = root if root.is_dir() else path
    return "/".join([root.resolve().name, *path.relative_to(root).parts])


def updated(*files: Path) -> str:
    return datetime.fromtimestamp(max(file.stat().st_mtime for file in files), UTC).isoformat(timespec="seconds")


# ---- hyperparameters in YAML -----------------------------------------------------------------------------------------


class _Plain(LOADER):
    """Reads values alone: an object of Python is the list, mapping or text that it was written as."""


def _constructed(loader: Any, _: str, node: yaml.Node) -> Any:
    kind = {yaml.MappingNode: "mapping", yaml.SequenceNode: "sequence"}.get(type(node), "scalar")
    return getattr(loader, f"construct_{kind}")(node, **{} if kind == "scalar" else {"deep": True})


_Plain.add_multi_constructor("", _constructed)


def keys_of(file: Path, into: Found) -> dict[str, Any]:
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


def read_tensorboard(root: Path, asked: Asked, into: Found) -> Iterator[str]:
    """Read event files, and yield what was read; a folder of them is one run, as TensorBoard has it."""
    own: dict[Path, Log] = {}
    for folder, _, names in walk(root, into):
        files = [folder / name for name in names if "tfevents" in name or folder / name == root]
        curves, keys = _events(files, asked, into)
        yield from curves or keys
        if not files:
            continue
        tags = {tag: (folder, tag) for tag in curves}
        tags |= {f"{folder.name}/{tag}": (folder.parent, tag) for tag in curves}  # Keras: validation/epoch_loss
        into.metrics |= curves.keys()
        run, tag = tags.get(asked.metric or "", (folder, ""))
        keys = keys_of(folder / "hparams.yaml", into) | keys
        named = run.parent if STAMPED.fullmatch(run.name) else run
        name = _name(root, named if root.is_dir() and named.is_relative_to(root) else folder)
        own[folder] = Log(str(run), name, curves.get(tag, []), keys, updated=updated(*files))
    for folder, log in own.items():  # a folder before those in it
        parent = own.get(folder.parent)
        if parent and parent.points and log.keys:
            parent.keys |= log.keys  # SummaryWriter.add_hparams opens a folder of its own
        else:
            into.add(log)


def _events(files: Sequence[Path], asked: Asked, into: Found) -> tuple[dict[str, Points], dict[str, Any]]:
    """Return the scalars by tag, and hyperparameters. What a later attempt says to purge is left out.

    TensorBoard's own loader imports TensorFlow where it is installed, and without it takes three times as long.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from tensorboard.util.tensor_util import make_ndarray

    curves: dict[str, Points] = defaultdict(list)
    keys: dict[str, Any] = {}
    tag = (asked.metric or "").rpartition("/")[2].encode()
    for file in files:
        try:
            for event in map(Event.FromString, _records(file, tag)):
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
            into.warnings.append(f"{file}: not an event file of TensorBoard, or damaged: the rest of it is left out")
    return curves, keys


def _records(file: Path, checked: bytes) -> Iterator[bytes]:
    """Yield the records of an event file, to its end or to where it was cut off. Raises ValueError if a sum is wrong.

    ``checked``: the sums of records that hold these bytes are checked, and that of the first.
    """
    from tensorboard.summary.writer.record_writer import masked_crc32c

    content, at = file.read_bytes(), 0
    while at < len(content):  # length (8 bytes), its sum (4), the record, its sum (4)
        end = at + 12 + int.from_bytes(content[at : at + 8], "little")
        record, total = content[at + 12 : end], content[end : end + 4]
        if len(total) < 4 and at:
            return
        if (at == 0 or checked in record) and total != masked_crc32c(record).to_bytes(4, "little"):
            raise ValueError
        yield record
        at = end + 4


# ---- CSV -------------------------------------------------------------------------------------------------------------


def read_csv(root: Path, asked: Asked, into: Found) -> Iterator[str]:
    """Read tables: a file a run (Lightning, Keras), a column a run (a chart of W&B), or a column that names the run."""
    from pandas import read_csv  # slow to import
    from pandas.errors import EmptyDataError, ParserError

    for file in (folder / name for folder, _, names in walk(root, into) for name in names):
        if file.suffix != ".csv" and file != root:
            continue
        try:
            with file.open(encoding="utf-8-sig") as stream:
                separator = max(",;\t", key=stream.readline().count)
            frame = read_csv(file, sep=separator, header=None, dtype=str, encoding="utf-8-sig", na_values=[],
                             keep_default_na=False, index_col=False)  # fmt: skip
            heads, short = frame.iloc[0].tolist(), frame.isna().any(axis=1)
            if len(heads) < 2 or "" in heads[1:] or short[:-1].any():
                raise ParserError
        except (OSError, ValueError) as error:
            what = "is no CSV with a line of heads and as many values in each line"
            parsed = isinstance(error, (ParserError, EmptyDataError))
            into.warnings.append(f"{file}: {what if parsed else 'cannot be read as CSV'}")
            continue
        yield str(file)
        if not file.read_bytes().endswith((b"\n", b"\r")):
            into.notes.append(f"{file}: does not end with a line break, so that its last value may be cut")
        frame = frame[1:][~short[1:]].set_axis(heads, axis=1)  # the last line may be cut
        name = file.with_suffix("") if file.stem.casefold() not in UNNAMED else file.parent
        into.metrics |= {head.rpartition(" - ")[2] for head in heads if not head.endswith(BANDS)}
        try:
            _table(frame, Log(str(file), _name(root, name), [], {}, updated=updated(file)), asked, into)
        except ValueError as error:
            raise UserError(f"{file}: {error}") from error


def _table(frame: DataFrame, file: Log, asked: Asked, into: Found) -> None:
    """Add the runs of one file.

    Raises ValueError if a step or a value is no number, or there is no such column of steps.
    """
    heads: list[str] = list(frame.columns)
    wide = [k for k, head in enumerate(heads) if head.endswith(f" - {asked.metric}")]  # each is a run
    if twice := [head for head in dict.fromkeys(heads) if heads.count(head) > 1 and not (wide and " - " in head)]:
        into.notes.append(f"{file.path}: several columns are called {listed(twice, 4)}: the last counts")
    columns, frame = frame, frame.loc[:, ~frame.columns.duplicated(keep="last")]
    lower = {head.casefold(): head for head in reversed(heads)}
    step = asked.step or next((lower[name] for name in STEPS if name in lower), None)
    if step is not None and step not in heads:
        raise ValueError(f"no column is called {step} (columns: {listed(heads, 12)})")
    if asked.metric in heads:
        _runs(frame, file, str(asked.metric), step, asked, into)
        return
    for k in wide:
        head, called = heads[k], heads[k].removesuffix(f" - {asked.metric}")
        path = f"{file.path}:{called}" + (f":{k + 1}" if heads.count(head) > 1 else "")
        points = _points(frame[step] if step else None, columns.iloc[:, k])
        into.add(Log(path, called, points, {}, updated=file.updated))
    if not wide:
        into.without.append(file.path)


def _runs(frame: DataFrame, file: Log, metric: str, step: str | None, asked: Asked, into: Found) -> None:
    """Add the runs of a file with a column of the metric."""
    heads: list[str] = list(frame.columns)
    named = [head for head in heads if head.casefold() in RUNS]
    keys = (*(asked.group or ()), *asked.tuned)
    naming = named or [head for head in heads if _is_text(frame[head].tolist())]
    telling = [head for head in heads if asked.is_seed(head) or any(same(key, head) for key in keys)]
    owners = list(dict.fromkeys([*naming, *telling]))
    state = next((head for head in heads if head.casefold() in STATES), None)
    several = any(frame[head].nunique() > 1 for head in owners)
    beside = keys_of(Path(file.path).parent / "hparams.yaml", into)
    single = several and not step  # each line is the whole run that it names
    valued = frame.loc[frame[metric] != "", owners]
    again = valued[valued.duplicated(keep=False)].values.tolist() if single else []
    if again and any(map(asked.is_seed, owners)):
        raise ValueError(
            f"{file.name} has several lines of {', '.join(again[0])}, and no column of steps: --step names one, or "
            f"--group, --seed and --tuned the columns that tell runs apart"
        )
    if again:
        into.notes.append(f"{file.path}: no column of steps: each line counts as a run (--step COLUMN)")
    for _, own in frame.groupby(frame.index if single else owners or (lambda _: 0), sort=False):
        first = own.iloc[0]
        other = {metric, step, state, *named}
        own_keys = {head: value_of(first[head]) for head in heads if own[head].nunique() == 1 and head not in other}
        called = first[named[0]] if named else file.name
        ended = STATE.get(own[state].iloc[-1].casefold()) if state else None
        points = _points(own[step] if step else None, own[metric])
        if several and [at for at, _ in points].count(min(points, default=(0, 0))[0]) > 1:  # a resume begins later
            raise ValueError(
                f"{called} has several values of {metric} at its first step, so it is more than one run: "
                f"--group, --seed and --tuned name the columns that tell them apart"
            )
        place = [str(own.index[0] + 1)] if again else []
        path = ":".join([file.path, *(first[head] for head in owners if several), *place])
        own_keys = beside | {head: value for head, value in own_keys.items() if value != ""}
        into.add(Log(path, called, points, own_keys, None, ended, file.updated), f"{called} in {file.path}")


def _is_text(values: Sequence[str]) -> bool:
    """Return whether a column holds words of which each occurs again, as names of optimizers do, and times do not."""
    known = [value for value in values if value != ""]
    return any(isinstance(value_of(value), str) for value in known) and 2 * len(set(known)) <= len(known)


def _points(steps: Series | None, values: Series) -> Points:
    """Return step and value of each line that has the metric; without a column of steps, lines are numbered.

    Raises ValueError if one of them is no number.
    """
    found = []
    places = range(1, len(values) + 1) if steps is None else steps
    for (number, value), at in zip(values.items(), places, strict=True):  # 1 is the line below heads
        try:
            if value != "":
                found.append((float(at), float(value)))
        except ValueError:
            raise ValueError(f"line {number + 1}: step {at!r} and {values.name} {value!r} should be numbers") from None
    return found
