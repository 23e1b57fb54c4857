"""Logs of other programs as runs of a table: which row, trial and seed each is, and which value counts.

Every guess is said, in a note; a key of the command line replaces it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from caspr_cli.common.errors import UserError, nearest
from caspr_cli.common.format import count, listed
from caspr_cli.common.selection import finite
from caspr_cli.common.shape import DONE, FAILED, printable
from caspr_cli.report import trackers
from caspr_cli.report.mlflow import read_mlflow
from caspr_cli.report.model import Point, Run
from caspr_cli.report.selection import frozen, plain
from caspr_cli.report.trackers import Log

SEEDS = ("seed", "random_seed", "rng_seed", "seed_everything", "manual_seed")
SEED = re.compile(r"seed[-_=:. /]?(\d+)|(?:^|(?<=[-_/,. ]))s(\d+)(?=$|[-_/,. ])", re.IGNORECASE)
VERSION = re.compile(r"(?:^|/)version_\d+(?=$|/)")  # Lightning's number of a folder
SETTING = re.compile(r"(?:^|(?<=[-_,/ ]))([A-Za-z][\w.]*?)=([^=,/ ]+?)(?=$|[,/ ]|[-_][A-Za-z][\w.]*=)")  # Hydra's names
HIGHER = {
    "acc", "accuracy", "map", "ap", "auc", "auroc", "auprc", "f1", "bleu", "rouge", "iou", "miou", "dice", "precision",
    "recall", "r2", "psnr", "ssim", "top", "ndcg", "mrr", "reward", "return", "score",
}  # fmt: skip
LOWER = {"loss", "error", "err", "nll", "perplexity", "ppl", "mse", "mae", "rmse", "wer", "cer", "fid"}
STAMP = 10**8  # a number from here on is a time or an identity, no hyperparameter


READERS: dict[str, tuple[Callable[[Path, trackers.Wanted, trackers.Logs], Iterator[str]], str]] = {
    "tensorboard": (trackers.read_tensorboard, "no event files of TensorBoard (events.out.tfevents.*) there"),
    "csv": (trackers.read_csv, "no CSV files there"),
    "wandb": (trackers.read_csv, "no CSV files there: export runs or a chart of W&B as CSV"),
    "mlflow": (read_mlflow, "no runs of MLflow (mlflow.db or mlruns) there"),
}


@dataclass(frozen=True)
class Asked:
    """The flags of the command line.

    Args:
        kind: one of ``READERS``.
        group: the hyperparameters of which each value is a row; None: the name of a run without its seed.
        tuned: hyperparameters among whose values the best is chosen.
        names: how a run is called, as ``{optimizer}/seed{seed}``; its parts become hyperparameters.
        higher: None: by the name of the metric.
        at: ``end``, ``best``, or the last value at or before this step.
    """

    kind: str
    metric: str | None
    group: Sequence[str] | None = None
    seed: str | None = None
    names: str | None = None
    step: str | None = None
    tuned: Sequence[str] = ()
    higher: bool | None = None
    at: str | int = "end"


@dataclass
class Found:
    """The runs; ``warnings`` are of files, ``notes`` of what was guessed or left out."""

    runs: list[Run] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def key(name: str) -> str:
    """Return the key that a hyperparameter has in a run; labels show it as ``lr``."""
    own = name.removeprefix("optim.")
    return f"optim.{own}{'_' * (own == 'name')}"


@dataclass(frozen=True)
class _Member:
    """A log, and the row, trial and seed that it is."""

    log: Log
    task: str
    name: str  # of the row
    settings: Mapping[str, Any]  # that distinguish rows of this name
    trial: Mapping[str, Any]
    seed: int | None

    @property
    def row(self) -> str:
        return frozen([self.task, self.name, self.settings])

    @property
    def same(self) -> str:
        """The settings that all seeds of a trial share."""
        return frozen([self.row, self.trial])

    @property
    def label(self) -> str:
        return " ".join([self.name, *(f"{k.removeprefix('optim.')}={plain(v)}" for k, v in self.settings.items())])


def find(paths: Sequence[Path], asked: Asked) -> Found:
    """Return all runs below these paths.

    Raises:
        UserError: there are none, or they do not have what was asked for.
    """
    keys = [*(asked.group or ()), *asked.tuned]
    wanted = trackers.Wanted(asked.metric, asked.step, keys, lambda column: _is_seed(column, asked.seed))
    logs = trackers.Logs()
    for path in paths:
        _read(asked.kind, path, wanted, logs)
    if not any(log.points for log in logs.runs):
        there = f"metrics: {listed(sorted(logs.metrics), 12)}"
        if asked.metric is None:
            raise UserError(f"--from {asked.kind}: name a metric with --metric ({there})")
        raise UserError(f"--metric {asked.metric}: no run has it.{nearest(asked.metric, logs.metrics)} ({there})")
    found = Found(warnings=logs.warnings)
    if logs.without:
        found.notes.append(f"without {asked.metric}, left out: {listed(logs.without, 4)}")
    task = paths[0].resolve().name if len(paths) == 1 else "logs"
    runs = list({log.path: log for log in logs.runs}.values())  # of a path that was named twice
    members = _numbered(_members(_named(runs, asked, found.notes), asked, task, found.notes), found.notes)
    _refuse_mixed(members)
    found.notes += _mixed(members, asked.seed)
    base = {
        "task.target.metric": asked.metric,
        "task.target.higher_is_better": _higher(str(asked.metric), asked.higher, found.notes),
    }
    curves = {id(member): _curve(member.log) for member in members}
    if several := [member.log.name for member in members if len(curves[id(member)]) < len(member.log.points)]:
        found.notes.append(f"several values at one step, as after a resume: the last counts ({listed(several, 4)})")
    longest: dict[str, int] = defaultdict(int)
    for member in members:
        longest[member.same] = max([longest[member.same], *(point.step for point in curves[id(member)])])
    for member in members:
        config = {**base, "task.name": member.task, "optim.name": member.name, **member.settings, **member.trial}
        status, result = _end(member, curves[id(member)], longest[member.same], base, asked)
        run = Run(member.log.path, config | {"seed": member.seed}, status, result, {}, curves[id(member)])
        found.runs.append(run)
    found.notes += _about_ends(found.runs, asked)
    return found


# ---- rows and seeds --------------------------------------------------------------------------------------------------


def _named(logs: list[Log], asked: Asked, notes: list[str]) -> list[Log]:
    """Return the logs whose names match the pattern, with the parts of the names among their keys."""
    pattern = _pattern(asked.names) if asked.names else None
    found, other = [], []
    for log in logs:
        log.keys = {key: trackers.value_of(value) for key, value in SETTING.findall(log.name)} | log.keys
        if pattern:
            levels = str(asked.names).count("/") + 1
            match = pattern.fullmatch("/".join(log.name.split("/")[-levels:]))
            if not match:
                other.append(log.name)
                continue
            log.keys |= {key: trackers.value_of(value) for key, value in match.groupdict().items()}
        found.append(log)
    if not found:
        raise UserError(f"--names {asked.names}: no run is called so (runs: {listed(other, 4)})")
    if other:
        notes.append(f"not called {asked.names}, left out: {listed(other, 4)}")
    return found


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


def _members(logs: list[Log], asked: Asked, task: str, notes: list[str]) -> list[_Member]:
    """Return each log with its row, trial and seed."""
    tuned = [_resolved(name, logs, "--tuned") for name in asked.tuned]
    seed = _resolved(asked.seed, logs, "--seed") if asked.seed else None
    group = None if asked.group is None else [_resolved(name, logs, "--group") for name in asked.group]
    if group is None:
        group = _keys_of_names(logs, asked, tuned, seed)
        how = listed(group) if group else "the name without its seed"
        notes.append(f"a row for each value of {how} (--group KEY,... chooses others)")
    own = {*group, *tuned}
    if lacking := [log.name for log in logs if not own <= log.keys.keys()]:
        notes.append(f"without {listed(sorted(own))}, left out: {listed(lacking, 4)}")
        logs = [log for log in logs if own <= log.keys.keys()]
    if not logs:
        raise UserError(f"no run has all of {listed(sorted(own))}")
    words = bool(group) and all(isinstance(log.keys[group[0]], str) for log in logs)
    stems = [] if group else _stems([log.name for log in logs])
    found = []
    for k, log in enumerate(logs):
        name = _word(log.keys[group[0]] if words else stems[k] if stems else "run")
        settings = {key(each): _word(log.keys[each]) for each in group[words:]}
        trial = {key(each): _word(log.keys[each]) for each in tuned}
        found.append(_Member(log, printable(log.task or task), name, settings, trial, _seed(log, seed)))
    return found


def _word(value: Any) -> Any:
    """Return a text as one word of a label, without the sign that ends a key there."""
    return re.sub(r"[\s=]+", "_", printable(value)) if isinstance(value, str) else value


def _keys_of_names(logs: Sequence[Log], asked: Asked, tuned: Sequence[str], seed: str | None) -> list[str]:
    """Return the keys that names of runs have, as ``lr=0.1`` or by the pattern, without seed and tuned ones."""
    pattern = _pattern(asked.names).groupindex if asked.names else {}
    keys = dict.fromkeys([*pattern, *(key for log in logs for key, _ in SETTING.findall(log.name))])
    return [key for key in keys if key not in tuned and not _is_seed(key, seed)]


def _stems(names: Sequence[str]) -> list[str]:
    """Return names of runs without seeds, numbers of versions, and the folders that all have in common."""
    parts = []
    for name in names:
        bare = re.sub(r"[-_=:,. ]*(?=/|$)|(?<=/)[-_=:,. ]+|^[-_=:,. ]+", "", SEED.sub("", VERSION.sub("", name)))
        parts.append([part for part in bare.split("/") if part])
    most = max(min(map(len, parts)) - 1, 0)
    shared = next((k for k in range(most) if len({part[k] for part in parts}) > 1), most)
    return ["/".join(part[shared:]) or "run" for part in parts]


def _is_seed(column: str, asked: str | None) -> bool:
    return trackers.same(asked, column) if asked else re.split(r"[./]", column)[-1].casefold() in SEEDS


def _seed(log: Log, given: str | None) -> int | None:
    """Return the seed of a run, by its keys or else by its name; None if neither has one."""
    keys = [given] if given else [key for key in log.keys if _is_seed(key, None)]
    values = [log.keys[key] for key in keys if key in log.keys and log.keys[key] not in (None, "None")]
    if not values and not given:
        values = [int(next(filter(None, match.groups()))) for match in [*SEED.finditer(log.name)][-1:]]
    if not values:
        return None
    value = values[0]
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
        raise UserError(f"{log.path}: the seed should be a whole number but is {value!r}; --seed KEY names another")
    return int(value)


def _numbered(members: list[_Member], notes: list[str]) -> list[_Member]:
    """Return the same with seeds: where one has none, numbers that no two rows share, so that nothing is paired."""
    without = [member.log.name for member in members if member.seed is None]
    if not without:
        return members
    counts: dict[str, int] = defaultdict(int)
    for member in members:
        counts[member.same] += 1
    first, start = dict[str, int](), 0
    for row in dict.fromkeys(member.row for member in members):
        first[row] = start
        start += max(counts[member.same] for member in members if member.row == row)
    used: dict[str, int] = defaultdict(int)
    found = []
    for member in members:
        found.append(replace(member, seed=first[member.row] + used[member.same]))
        used[member.same] += 1
    notes.append(f"no seed known of {listed(without, 4)}: runs are numbered, and no test is paired (--seed KEY, or "
                 "--names '{optimizer}-{seed}')")  # fmt: skip
    return found


def _refuse_mixed(members: Sequence[_Member]) -> None:
    """Refuse runs of one row, trial and seed that have other hyperparameters: a row would be a mixture of them."""
    same: dict[tuple[str, int | None], list[_Member]] = defaultdict(list)
    for member in members:
        same[member.same, member.seed].append(member)
    for own in same.values():
        keys = [name for name in own[0].log.keys if all(name in member.log.keys for member in own)]
        differing = [name for name in keys if len({frozen(member.log.keys[name]) for member in own}) > 1]
        if differing := [name for name in differing if all(_setting(member.log.keys[name]) for member in own)]:
            raise UserError(
                f"{count(len(own), 'run')} of {own[0].label} with seed {own[0].seed} differ in {listed(differing, 6)}: "
                f"--group KEY,... makes a row of each value, --tuned KEY chooses the best"
            )


def _mixed(members: Sequence[_Member], seed: str | None) -> Iterator[str]:
    """Yield the keys in which runs of one row and trial differ. Values that do not recur are results."""
    values: dict[str, list[str]] = defaultdict(list)
    for member in members:
        for name, value in member.log.keys.items():
            if _setting(value) and not _is_seed(name, seed):
                values[name].append(frozen(value))
    known = [name for name, own in values.items() if 2 * len(set(own)) <= len(own)]
    found: dict[str, set[str]] = defaultdict(set)
    for name in known:
        seen: dict[str, set[str]] = defaultdict(set)
        for member in members:
            seen[member.same].add(frozen(member.log.keys.get(name)))
        found[name] = {member.label for member in members if len(seen[member.same]) > 1}
    for name, labels in found.items():
        if labels:
            yield f"{name} differs within {listed(sorted(labels), 4)} (--group KEY,... makes a row of each value)"


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
    higher = not LOWER.intersection(words) and bool(HIGHER.intersection(words))
    if not LOWER.intersection(words):
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


def _end(
    member: _Member, curve: Sequence[Point], longest: int, base: Mapping[str, Any], asked: Asked
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return status and result of a run: it failed if its log says so, or ends before the others of its trial."""
    last = curve[-1].step if curve else 0
    status = {"state": member.log.state or DONE, "step": last, "updated": member.log.updated}
    if isinstance(asked.at, int) and last < asked.at and status["state"] == DONE:
        status |= {"state": FAILED, "error": f"ends at step {last}"}
    if asked.at == "end" and member.log.state is None and last < longest:
        status |= {"state": FAILED, "error": f"ends at step {last} of {longest}"}
    if isinstance(asked.at, int) and curve and curve[0].step > asked.at:
        status |= {"state": FAILED, "error": f"begins at step {curve[0].step}"}
    if status["state"] != DONE:
        return status, {}
    chosen = curve[-1]
    if isinstance(asked.at, int):
        chosen = [point for point in curve if point.step <= asked.at][-1]
    elif asked.at == "best":
        sign = -1 if base["task.target.higher_is_better"] else 1
        chosen = min(curve, key=lambda point: (point.value is None, sign * (point.value or 0.0)))
    at = (
        f"at step {asked.at}"
        if isinstance(asked.at, int)
        else {"end": "at the end", "best": "at its best step"}[asked.at]
    )
    return status, {"steps": last, "final": {"step": chosen.step, base["task.target.metric"]: chosen.value}, "at": at}


def _about_ends(runs: Sequence[Run], asked: Asked) -> Iterator[str]:
    """Yield notes on runs that end at different steps."""
    if short := [run.path for run in runs if str(run.status.get("error", "")).startswith("ends at")]:
        yield (
            f"{listed(short, 4)}: end{'s' * (len(short) == 1)} too early and count{'s' * (len(short) == 1)} as failed "
            "(--at best or --at STEP, if that was meant)"
        )
    ends = sorted({run.result["steps"] for run in runs if run.result})
    if len(ends) > 1 and not isinstance(asked.at, int):
        yield f"runs end at different steps, from {ends[0]} to {ends[-1]} (--at {ends[0]} compares all there)"


def _read(kind: str, path: Path, wanted: trackers.Wanted, into: trackers.Logs) -> None:
    """Read all logs below a folder, or one file.

    Raises:
        UserError: the path holds none.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    reader, what = READERS[kind]
    before = len(into.warnings)
    if not sum(1 for _ in reader(path, wanted, into)):
        raise UserError(into.warnings[before] if into.warnings[before:] else f"{path}: {what}")
