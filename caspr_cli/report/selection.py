"""Which records belong to one row, which of its trials is selected, and which of its seeds are reported."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caspr_cli.common.errors import UserError, nearest
from caspr_cli.common.format import listed
from caspr_cli.common.selection import choose, reaches
from caspr_cli.common.shape import DONE, FAILED
from caspr_cli.report.model import Row, Run, Trial

ALWAYS_TUNED = "optim.lr"
SPACE = "search.space."
UNTUNED = ("trial", "default")  # runs of an optimizer's own values are a row of their own
ABSENT = "-"  # a key that an older version did not have, where the others differ in it
# Keys that make no rows of their own: they change no number, or only the order of sums, or make tables of their own.
IGNORED = {
    "seed", "trial", "resume", "output_dir", "logger", "debug", "horizon", "task.root", "trainer.timeout",
    "trainer.rendezvous", "trainer.workers", "trainer.log_every", "trainer.accelerator", "trainer.devices",
    "trainer.nodes", "trainer.strategy", "trainer.accumulate", "trainer.compile", "trainer.val_every",
    "trainer.keep_checkpoints", "optim.shard",
}  # fmt: skip
IGNORED_GROUPS = ("task.target.", "search.")
GROUPS = ("optim", "task", "trainer", "schedule", "search")  # whose keys may be named without them
HELD_OUT = 2  # with so many seeds that took no part in the selection, only these are reported


# ---- settings ----------------------------------------------------------------------------------------------------


def plain(value: Any) -> str:
    """Return a value of the recipe as YAML and the command line have it, short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return ",".join(map(plain, value)) if isinstance(value, (list, tuple)) else str(value)


def setting(key: str, value: Any) -> str:
    """Return ``lr=0.003`` for optim.lr; keys of other groups in full."""
    return f"{key.removeprefix('optim.')}={plain(value)}"


def settings(values: Mapping[str, Any]) -> str:
    return " ".join(setting(key, value) for key, value in values.items())


def frozen(value: Any) -> str:
    """Return the same text for the same value, also where a number is written as 0 and as 0.0."""
    return json.dumps(_numeric(value), sort_keys=True, default=str)


def _numeric(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) <= 2**53 else value
    if isinstance(value, (list, tuple)):
        return [_numeric(each) for each in value]
    return {key: _numeric(each) for key, each in value.items()} if isinstance(value, dict) else value


def values_of(configs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the different values of each key, by their frozen text."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for config in configs:
        for key, value in config.items():
            found[key][frozen(value)] = value
    return found


def differing(configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys with several values; one that is missing somewhere is no other value."""
    return [key for key, values in values_of(configs).items() if len(values) > 1]


# ---- rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The records of one row; ``settings`` are the keys that distinguish rows, whether others differ or not."""

    label: str
    settings: dict[str, Any]
    runs: tuple[Run, ...]


def searched_keys(runs: Iterable[Run]) -> set[str]:
    """Return the keys that searches vary."""
    return {key.removeprefix(SPACE).rpartition(".")[0] for run in runs for key in run.config if key.startswith(SPACE)}


def grouped(runs: Sequence[Run], tuned: Sequence[str]) -> list[Group]:
    """Return the rows of one optimizer, tuned or untuned, with labels that distinguish them.

    A key that a config lacks (an older version wrote it) gets the value of the others, if they have one value or null.
    """
    configs = [
        {
            key: value
            for key, value in expanded(run.config, tuned).items()
            if (key not in IGNORED or (key, value) == UNTUNED)
            and key not in tuned
            and not key.startswith(IGNORED_GROUPS)
        }
        for run in runs
    ]
    missing = {
        key: None if frozen(None) in seen else next(iter(seen.values())) if len(seen) == 1 else ABSENT
        for key, seen in values_of(configs).items()
    }
    found: dict[str, list[Run]] = defaultdict(list)
    own: dict[str, dict[str, Any]] = {}
    for run, config in zip(runs, configs, strict=True):
        identity = frozen(missing | config)
        found[identity].append(run)
        own.setdefault(identity, missing | config)
    shown = differing(own.values())
    labels: Counter[str] = Counter()
    groups = []
    for identity, config in own.items():
        name = [config["optim.name"], *(["untuned"] if UNTUNED in config.items() else [])]
        label = " ".join([*name, *sorted(setting(key, config.get(key)) for key in shown)])
        labels[label] += 1
        number = f" ({labels[label]})" if labels[label] > 1 else ""  # null and the word null read the same
        groups.append(Group(f"{label}{number}", config, tuple(found[identity])))
    return groups


def expanded(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Return the config, with lists in parts where a key names a part, as optim.betas.0 does."""
    owners = (key.rpartition(".")[0] for key in keys)
    lists = {owner for owner in owners if isinstance(config.get(owner), (list, tuple))}
    parts = {f"{owner}.{index}": value for owner in lists for index, value in enumerate(config[owner])}
    return {key: value for key, value in config.items() if key not in lists} | parts


def labels_across(tables: Sequence[Sequence[Row]]) -> list[list[str]]:
    """Return labels that mean the same row in each of several tables.

    They have all settings in which any table has variants: the only ``caspr`` of one table is the ``caspr eps=1e-06``
    of another, and not its ``caspr eps=0.0001``.
    """
    keys: dict[tuple[str, bool], set[str]] = defaultdict(set)
    for rows in tables:
        for kind in {(row.optim, row.untuned) for row in rows}:
            keys[kind].update(differing(row.settings for row in rows if (row.optim, row.untuned) == kind))

    def label(row: Row) -> str:
        name, *own = row.label.split(" ")
        more = {setting(key, row.settings[key]) for key in keys[row.optim, row.untuned] if key in row.settings}
        return " ".join([name, *sorted({*own, *more})])

    return [[label(row) for row in rows] for rows in tables]


# ---- what a user calls a row -------------------------------------------------------------------------------------


def matching(rows: Iterable[Row], wanted: str) -> list[Row]:
    """Return the rows with exactly these settings, or else those that have them among others.

    Settings may come in any order, with or without ``optim.``, numbers in any notation, lists with or without brackets.
    Without the name of an optimizer they mean rows of any.
    """
    name, wanted_settings = _parts(wanted)

    def known(row: Row) -> frozenset[str]:
        return _parts(row.label)[1] | {_normal(setting(key, value)) for key, value in row.settings.items()}

    fitting = [row for row in rows if name in ("", _parts(row.label)[0]) and wanted_settings <= known(row)]
    return [row for row in fitting if _parts(row.label)[1] == wanted_settings] or fitting


def without_name(wanted: str) -> bool:
    """Return whether these are settings alone, as ``statistics=ema``."""
    return not _parts(wanted)[0]


def _parts(label: str) -> tuple[str, frozenset[str]]:
    words = label.split()
    name = "" if not words or "=" in words[0] else words.pop(0)
    return name, frozenset(map(_normal, words))


def _normal(word: str) -> str:
    key, _, value = word.partition("=")
    try:
        return setting(key, float(value))
    except ValueError:
        return setting(key, value.removeprefix("[").removesuffix("]"))


SHORT = {"task": "task.name", "optim": "optim.name"}


def where(runs: Sequence[Run], conditions: Iterable[str]) -> list[Run]:
    """Return the runs that meet all conditions, as ``optim=caspr,adamw``, ``lr=0.01`` or ``state=failed``.

    Raises:
        UserError: no record has such a key, or none of those that are left this value.
    """
    found = list(runs)
    for condition in conditions:
        key, _, wanted = condition.partition("=")
        keys = {"state", *SHORT, *(each for run in runs for each in run.config)}
        full = next((k for k in (SHORT.get(key), key, *(f"{g}.{key}" for g in GROUPS)) if k in keys), None)
        if full is None:
            raise UserError(f"--where {condition}: no record has this key.{nearest(key, keys)}")
        values = [_normal(f"x={run.state if full == 'state' else plain(run.config.get(full))}") for run in found]
        either = {_normal(f"x={value}") for value in (wanted, *wanted.split(","))}
        if not either.intersection(values):
            there = sorted({value.partition("=")[2] for value in values})
            raise UserError(f"--where {condition}: no record has it ({key} is {listed(there, 12)})")
        found = [run for run, value in zip(found, values, strict=True) if value in either]
    return found


# ---- trials ------------------------------------------------------------------------------------------------------


def trials(runs: Sequence[Run], tuned: Sequence[str]) -> tuple[tuple[Trial, ...], tuple[tuple[Run, Run], ...]]:
    """Return the trials of a row, in the order of a search or of their values, and the duplicates.

    A duplicate is a run that does not count, and the one of the same values and seed that does: the one that has come
    further, then the later one.
    """
    found: dict[str, dict[int, list[Run]]] = defaultdict(lambda: defaultdict(list))
    values: dict[str, dict[str, Any]] = {}
    for run in runs:
        config = expanded(run.config, tuned)
        own = {key: config[key] for key in tuned if key in config}
        found[frozen(own)][run.seed].append(run)
        values.setdefault(frozen(own), own)
    made, duplicates = [], []
    for name, seeds in found.items():
        kept = {seed: max(same, key=_progress) for seed, same in sorted(seeds.items())}
        index = next((k for run in kept.values() if isinstance(k := run.config.get("trial"), int)), None)
        made.append(Trial(values[name], tuple(kept.values()), index))
        duplicates += [(run, kept[s]) for s, same in seeds.items() for run in same if run is not kept[s]]
    made.sort(key=lambda trial: [_sortable(trial.index), *(_sortable(trial.values.get(key)) for key in tuned)])
    return tuple(made), tuple(duplicates)


def _progress(run: Run) -> tuple[int, str, str, str]:
    """Return a key to sort by, at last by content, so that the order in which records are read does not matter."""
    rank = {DONE: 2, FAILED: 1}.get(run.state, 0)
    return rank, str(run.status.get("updated", "")), frozen([run.result, run.config]), run.path


def _sortable(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, (int, float))
    return not number, float(value) if number else 0.0, plain(value)


def further(run: Run) -> bool:
    """Return whether a trial is one of those that come after a best value at the edge."""
    trial, planned = run.config.get("trial"), run.config.get("search.trials")
    return bool(run.config.get("search.extend")) and isinstance(trial, int) and planned is not None and trial >= planned


def planned(trials: Sequence[Trial], scores: Mapping[int, float | None]) -> list[float | None]:
    """Return the scores of the trials of a search without further ones, which are drawn around the best of the others.

    These alone are exchangeable, so that any k of them say what a search of k trials comes to.
    """
    return [score for k, score in scores.items() if not any(map(further, trials[k].runs))]


@dataclass(frozen=True)
class Selection:
    """The trial that was chosen for a row, and how.

    Args:
        trial: None if no trial has a run that is done.
        seeds: those by which it was chosen; empty if there was one trial, and nothing to choose.
        scores: the mean of each trial that was compared, by index, over the seeds that all of them share; None if one
            failed or is not finite.
        left_out: how many trials that ended have no run with these seeds.
        runs: those that are reported.
        held_out: whether these took no part in the selection.
    """

    trial: Trial | None
    seeds: frozenset[int]
    scores: dict[int, float | None]
    left_out: int
    runs: tuple[Run, ...]
    held_out: bool


def select(trials: Sequence[Trial], *, higher_is_better: bool) -> Selection:
    """Return the trial with the best validation at the end, and its runs with held-out seeds, if there are enough."""
    finals = [{run.seed: run.final for run in trial.runs if run.ended} for trial in trials]
    rerank = max((run.config.get("search.rerank") or 0 for trial in trials for run in trial.runs), default=0)
    choice, ended = choose(finals, higher_is_better=higher_is_better, rerank=rerank), sum(map(bool, finals))
    trial = None if choice.best is None else trials[choice.best]
    seeds = choice.seeds if ended > 1 else frozenset[int]()
    runs = tuple(run for run in trial.runs if run.ended) if trial else ()
    fresh = tuple(run for run in runs if run.seed not in seeds)
    held_out = trial is not None and (not seeds or len(fresh) >= HELD_OUT)
    left_out = ended - len(choice.scores)
    return Selection(trial, seeds, choice.scores, left_out, fresh if held_out else runs, held_out)


# ---- targets -----------------------------------------------------------------------------------------------------


def common_target(runs: Iterable[Run], *, higher_is_better: bool) -> float | None:
    """Return the target of most runs, of equally many the hardest; None if none has one."""
    counts = Counter(value for run in runs if (value := run.config.get("task.target.value")) is not None)
    sign = 1 if higher_is_better else -1
    return float(max(counts, key=lambda value: (counts[value], sign * value))) if counts else None


def time_to(target: float, run: Run, *, higher_is_better: bool) -> tuple[float, float | None]:
    """Return step and seconds of the first validation that reaches it: infinite if none does; None if not known."""
    own = run.result.get("target") or {}
    if run.state == DONE and own.get("value") == target:
        return (math.inf, math.inf) if own.get("step") is None else (own["step"], own.get("seconds"))
    for point in run.curve:
        if point.value is not None and reaches(point.value, target, higher_is_better=higher_is_better):
            return point.step, point.seconds
    return math.inf, math.inf


def median(times: Sequence[float | None]) -> float | None:
    """Return the median; None if it is infinite, or a time is not known."""
    known = [time for time in times if time is not None]
    middle = statistics.median(known) if known and len(known) == len(times) else math.inf
    return middle if math.isfinite(middle) else None
