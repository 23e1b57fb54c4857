"""Logs of other programs as runs of a table: which row, trial and seed each is, and which value counts.

Every guess is said, in a note; a key of the command line replaces it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caspr_cli.common.errors import UserError, nearest
from caspr_cli.common.format import count, listed
from caspr_cli.common.selection import finite
from caspr_cli.common.shape import DONE, FAILED, printable
from caspr_cli.report import trackers
from caspr_cli.report.mlflow import read_mlflow
from caspr_cli.report.model import Point, Run
from caspr_cli.report.selection import where
from caspr_cli.report.settings import frozen, joined, short
from caspr_cli.report.trackers import Asked, Found, Log, value_of

if TYPE_CHECKING:
    from pandas import DataFrame

SEED = re.compile(r"seed[-_=:. /]?(\d+)|(?:^|(?<=[-_/,. ]))s(\d+)(?=$|[-_/,. ])", re.IGNORECASE)
VERSION = re.compile(r"(?:^|/)version_\d+(?=$|/)")  # Lightning's number of a folder
SETTING = re.compile(r"(?:^|(?<=[-_,/ ]))([A-Za-z][\w.]*?)=([^=,/ ]+?)(?=$|[,/ ]|[-_][A-Za-z][\w.]*=)")  # Hydra's names
HIGHER = {
    "acc", "accuracy", "map", "ap", "auc", "auroc", "auprc", "f1", "bleu", "rouge", "iou", "miou", "dice", "precision",
    "recall", "r2", "psnr", "ssim", "top", "ndcg", "mrr", "reward", "return", "score",
}  # fmt: skip
LOWER = {"loss", "error", "err", "nll", "perplexity", "ppl", "mse", "mae", "rmse", "wer", "cer", "fid"}
AT = {"end": "at the end", "best": "at its best step"}
STAMP = 10**8  # a number from here on is a time or an identity, no hyperparameter

READERS: dict[str, tuple[Callable[[Path, Asked, Found], Iterator[str]], str]] = {
    "tensorboard": (trackers.read_tensorboard, "no event files of TensorBoard (events.out.tfevents.*) there"),
    "csv": (trackers.read_csv, "no CSV files there"),
    "wandb": (trackers.read_csv, "no CSV files there: export runs or a chart of W&B as CSV"),
    "mlflow": (read_mlflow, "no runs of MLflow (mlflow.db or mlruns) there"),
}


def key(name: str) -> str:
    """Return the key that a hyperparameter has in a run; labels show it as ``lr``."""
    return f"optim.{short(name)}{'_' * (short(name) == 'name')}"


def find(paths: Sequence[Path], asked: Asked) -> Found:
    """Return all runs below these paths. Raises UserError if there are none, or they do not have what was asked for."""
    found = Found()
    for path in paths:
        _read(asked, path, found)
    if not any(log.points for log in found.logs):
        there = f"metrics: {listed(sorted(found.metrics), 12)}"
        if asked.metric is None:
            raise UserError(f"--from {asked.kind}: name a metric with --metric ({there})")
        if asked.metric in found.metrics:
            raise UserError(f"--metric {asked.metric}: no run has a value of it")
        raise UserError(f"--metric {asked.metric}: no run has it.{nearest(asked.metric, found.metrics)} ({there})")
    if found.without:
        found.notes.append(f"left out, as they have no {asked.metric}: {listed(found.without, 4)}")
    logs = list({os.path.realpath(log.path): log for log in found.logs}.values())  # of a path that was named twice
    named = _where(_named(logs, asked, found.notes), asked, found.where)
    members = _members(named, asked, found.notes)
    _number(members, found.notes)
    found.notes += _mixed(members, asked)
    higher = _higher(str(asked.metric), asked.higher, found.notes)
    members["curve"] = members["log"].map(_curve)
    if several := [log.name for log, curve in zip(members["log"], members["curve"], strict=True)
                   if len(curve) < len(log.points)]:  # fmt: skip
        found.notes.append(f"several values at one step, as after a resume: the last counts ({listed(several, 4)})")
    members["last"] = [curve[-1].step if curve else 0 for curve in members["curve"]]
    members["longest"] = members.groupby("same")["last"].transform("max")
    task = printable(paths[0].resolve().name if len(paths) == 1 else "logs")
    target = {"task.target.metric": asked.metric, "task.target.higher_is_better": higher}
    for one in members.itertuples():
        config = {**target, "task.name": printable(one.log.task or task), "seed": one.seed, **one.settings, **one.trial}
        found.runs.append(Run(one.log.path, config, *_end(one, higher, asked), {}, one.curve))
    found.notes += _about_ends(found.runs, asked)
    return found


def _read(asked: Asked, path: Path, into: Found) -> None:
    """Read all logs below a folder, or one file. Raises UserError if the path holds none."""
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    reader, what = READERS[asked.kind]
    before = len(into.warnings)
    if not list(reader(path, asked, into)):
        raise UserError(into.warnings[before] if into.warnings[before:] else f"{path}: {what}")


# ---- rows and seeds --------------------------------------------------------------------------------------------------


def _named(logs: list[Log], asked: Asked, notes: list[str]) -> list[Log]:
    """Return the logs whose names match the pattern, with the parts of the names among their keys."""
    pattern = _pattern(asked.names) if asked.names else None
    found, other = list[Log](), list[Log]()
    for log in logs:
        log.keys = {key: value_of(value) for key, value in SETTING.findall(log.name)} | log.keys
        levels = str(asked.names).count("/") + 1
        match = pattern.fullmatch("/".join(log.name.split("/")[-levels:])) if pattern else None
        log.keys |= {key: value_of(value) for key, value in match.groupdict().items()} if match else {}
        (found if match or not pattern else other).append(log)
    if not found:
        raise UserError(f"--names {asked.names}: no run has such a name (runs: {listed([o.name for o in other], 4)})")
    if other:
        notes.append(f"left out, as their names do not match {asked.names}: {listed([log.name for log in other], 4)}")
    return found


def _where(logs: list[Log], asked: Asked, others: list[str]) -> list[Log]:
    """Return the logs that meet the conditions on hyperparameters, also on those that make no row.

    ``others`` gets the other conditions, as on states and on names of rows.
    """
    known = sorted({key for log in logs for key in log.keys})
    own, keys = list[str](), dict[str, str]()
    for condition in asked.where:
        name = condition.partition("=")[0]
        fitting = [name] if name in known else [key for key in known if trackers.same(name, key)]
        if len(fitting) == 1 and name != "state":
            keys[name] = fitting[0]
        (own if name in keys else others).append(condition)
    configs = [{name: _word(log.keys[key]) for name, key in keys.items() if key in log.keys} for log in logs]
    runs = [Run(log.path, config, {}, {}, {}) for log, config in zip(logs, configs, strict=True)]
    kept = {run.path for run in where(runs, own)}
    return [log for log in logs if log.path in kept]


def _pattern(names: str) -> re.Pattern[str]:
    parts = re.split(r"\{([A-Za-z_]\w*)\}", names)
    if len(parts) < 3 or len(set(parts[1::2])) < len(parts[1::2]):
        raise UserError(f"--names {names}: should have parts in braces, each once, as {{optimizer}}-{{seed}}")
    return re.compile("".join(f"(?P<{part}>[^/]+?)" if k % 2 else re.escape(part) for k, part in enumerate(parts)))


def _resolved(name: str, logs: Sequence[Log], flag: str) -> str:
    """Return the key of the logs that a user means by this name."""
    known = sorted({key for log in logs for key in log.keys})
    fitting = [name] if name in known else [key for key in known if trackers.same(name, key)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(f"{flag} {name}: several keys are called so: {listed(fitting)}")
    if not known:
        names = f"leave it out, or read it from their names, as {logs[0].name}: --names '{{{name}}}_seed{{seed}}'"
        raise UserError(f"{flag} {name}: these runs have no hyperparameters; {names}")
    raise UserError(f"{flag} {name}: no run has this key.{nearest(name, known)} (keys: {listed(known, 12)})")


def _members(logs: list[Log], asked: Asked, notes: list[str]) -> DataFrame:
    """Return a line for each log.

    Its columns are ``log``, ``settings`` (of the row), ``trial`` (the tuned keys), ``seed`` (None: not known), ``row``
    and ``same`` (texts that all runs of a row and of a trial share), and ``label``.
    """
    from pandas import DataFrame  # slow to import

    tuned = [_resolved(name, logs, "--tuned") for name in asked.tuned]
    seed = _resolved(asked.seed, logs, "--seed") if asked.seed else None
    group = None if asked.group is None else [_resolved(name, logs, "--group") for name in asked.group]
    if group is None:  # keys that names of runs have, as lr=0.1 or by the pattern
        parts = _pattern(asked.names).groupindex if asked.names else {}
        keys = dict.fromkeys([*parts, *(key for log in logs for key, _ in SETTING.findall(log.name))])
        group = [key for key in keys if key not in (*tuned, seed) and not asked.is_seed(key)]
        how = listed(group) if group else "the name without its seed"
        notes.append(f"a row for each value of {how} (--group KEY,... chooses others)")
    own = {*group, *tuned}
    if lacking := [log.name for log in logs if not own <= log.keys.keys()]:
        notes.append(f"left out, as they have no {listed(sorted(own))}: {listed(lacking, 4)}")
        logs = [log for log in logs if own <= log.keys.keys()]
    if not logs:
        raise UserError(f"no run has all of {listed(sorted(own))}")
    words = bool(group) and all(isinstance(log.keys[group[0]], str) for log in logs)
    names = ["run"] * len(logs) if group else _stems([log.name for log in logs])
    found = []
    for log, stem in zip(logs, names, strict=True):
        settings = {key(each): _word(log.keys[each]) for each in group[words:]}
        trial = {key(each): _word(log.keys[each]) for each in tuned}
        name = _word(log.keys[group[0]] if words else stem)
        row, label = frozen([log.task, name, settings]), " ".join(filter(None, [name, joined(settings)]))
        settings["optim.name"] = name
        found.append((log, settings, trial, _seed(log, seed, asked), row, frozen([row, trial]), label))
    return DataFrame(found, columns=["log", "settings", "trial", "seed", "row", "same", "label"], dtype=object)


def _word(value: Any) -> Any:
    """Return a text as one word of a label: without spaces and equals signs."""
    return re.sub(r"[\s=]+", "_", printable(value)) if isinstance(value, str) else value


def _stems(names: Sequence[str]) -> list[str]:
    """Return names of runs without seeds, numbers of versions, and the folders that all have in common."""
    parts = []
    for name in names:
        bare = re.sub(r"[-_=:,. ]*(?=/|$)|(?<=/)[-_=:,. ]+|^[-_=:,. ]+", "", SEED.sub("", VERSION.sub("", name)))
        parts.append([part for part in bare.split("/") if part])
    most = max(min(map(len, parts)) - 1, 0)
    shared = next((k for k in range(most) if len({part[k] for part in parts}) > 1), most)
    return ["/".join(part[shared:]) or "run" for part in parts]


def _seed(log: Log, given: str | None, asked: Asked) -> int | None:
    """Return the seed of a run, by its keys or else by its name; None if neither has one."""
    keys = [given] if given else [key for key in log.keys if asked.is_seed(key)]
    values = [log.keys[key] for key in keys if key in log.keys and log.keys[key] not in (None, "None")]
    if not values and not given:
        values = [int(next(filter(None, match.groups()))) for match in [*SEED.finditer(log.name)][-1:]]
    value = values[0] if values else None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | None):
        raise UserError(f"{log.path}: the seed should be a whole number but is {value!r}; --seed KEY names another")
    return value


def _number(members: DataFrame, notes: list[str]) -> None:
    """Where a seed is not known, set numbers that no two rows share as seeds, so that nothing is paired."""
    if not (without := [log.name for log in members["log"][members["seed"].isna()]]):
        return
    sizes = members.groupby("row", sort=False)["same"].agg(lambda own: own.value_counts().max())
    members["seed"] = members["row"].map(sizes.cumsum() - sizes) + members.groupby("same").cumcount()
    notes.append(f"no seed known of {listed(without, 4)}: runs are numbered, and no test is paired (--seed KEY, or "
                 "--names '{optimizer}-{seed}')")  # fmt: skip


def _mixed(members: DataFrame, asked: Asked) -> Iterator[str]:
    """Yield the hyperparameters in which runs of one row and trial differ.

    Raises UserError if runs of one seed do, too: the row would be a mixture of them.
    """
    values = [{key: frozen(value) for key, value in log.keys.items() if _setting(value)} for log in members["log"]]
    table = type(members)(values, index=members.index)
    for (_, seed), own in members.groupby(["same", "seed"], sort=False):
        shared = table.loc[own.index].dropna(axis=1)
        if differing := [key for key in shared if shared[key].nunique() > 1]:
            raise UserError(
                f"{count(len(own), 'run')} of {own['label'].iloc[0]} with seed {seed} differ in "
                f"{listed(differing, 6)}: --group KEY,... makes a row of each value, --tuned KEY chooses the best"
            )
    for key in table:
        known = table[key].dropna()
        if 2 * known.nunique() > len(known) or asked.is_seed(key):  # values that do not recur are results
            continue
        several = table[key].fillna("").groupby(members["same"]).transform("nunique") > 1
        if labels := sorted(set(members["label"][several])):
            yield f"{key} differs within {listed(labels, 4)} (--group KEY,... makes a row of each value)"


def _setting(value: Any) -> bool:
    """Return whether a value may be one of a hyperparameter, and not the time or place of a run."""
    if isinstance(value, (int, float)):
        return abs(value) < STAMP
    return not isinstance(value, str) or not re.search(r"[/\\:]|\d{4}-?\d\d", value)


# ---- values ----------------------------------------------------------------------------------------------------------


def _higher(metric: str, given: bool | None, notes: list[str]) -> bool:
    """Return whether a higher value is better, by the words in the metric's name if it is not said."""
    if given is not None:
        return given
    words = re.findall(r"[a-z]+\d*", metric.casefold())
    words += [word.rstrip("0123456789") for word in words]
    if LOWER.intersection(words):
        return False
    higher = bool(HIGHER.intersection(words))
    how, other = ("higher", "lower") if higher else ("lower", "higher")
    notes.append(f"{metric}: {how} is better, by its name (--{other}-is-better says otherwise)")
    return higher


def _curve(log: Log) -> tuple[Point, ...]:
    points = {}
    for step, value in log.points:
        if not step.is_integer():
            raise UserError(f"{log.path}: step {step:g} is no whole number; --step COLUMN names another column")
        points[int(step)] = Point(int(step), None, finite(value))
    return tuple(points[step] for step in sorted(points))


def _end(one: Any, higher: bool, asked: Asked) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return status and result of a run: it failed if its log says so, or ends before the others of its trial."""
    state, error, at = one.log.state or DONE, None, asked.at
    if isinstance(at, int) and one.last < at and state == DONE:
        state, error = FAILED, f"ends at step {one.last}"
    if at == "end" and one.log.state is None and one.last < one.longest:
        state, error = FAILED, f"ends at step {one.last} of {one.longest}"
    if isinstance(at, int) and one.curve and one.curve[0].step > at:
        state, error = FAILED, f"begins at step {one.curve[0].step}"
    said = AT.get(str(at), f"at step {at}")
    status = {"state": state, "error": error, "step": one.last, "updated": one.log.updated, "at": said}
    if state != DONE:
        return status, {}
    chosen = one.curve[-1]
    if isinstance(at, int):
        chosen = [point for point in one.curve if point.step <= at][-1]
    elif at == "best":
        sign = -1 if higher else 1
        chosen = min(one.curve, key=lambda point: (point.value is None, sign * (point.value or 0.0)))
    final = {"step": chosen.step, asked.metric: chosen.value}
    return status, {"steps": one.last, "final": final}


def _about_ends(runs: Sequence[Run], asked: Asked) -> Iterator[str]:
    if short := [run.path for run in runs if str(run.status.get("error") or "").startswith("ends at")]:
        s = "s" * (len(short) == 1)
        yield f"{listed(short, 4)}: end{s} too early and count{s} as failed (--at best or --at STEP, if that was meant)"
    ends = sorted({run.result["steps"] for run in runs if run.result})
    if len(ends) > 1 and not isinstance(asked.at, int):
        yield f"runs end at different steps, from {ends[0]} to {ends[-1]} (--at {ends[0]} compares all there)"
