"""Which records belong together: rows, their labels, and the trials in each."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caspr_cli.report.model import DONE, Row, Run, Trial

FAILED = "failed"
ALWAYS_TUNED = "optim.lr"
SPACE = "search.space."
ABSENT = "-"  # a key that an older version did not have, where the others differ in it
# What tells no two rows apart: it changes no number, or the order of sums alone, or tables are told apart by it.
IGNORED = {
    "seed", "trial", "resume", "output_dir", "debug", "task.root", "trainer.timeout", "trainer.rendezvous",
    "trainer.workers", "trainer.log_every", "trainer.accelerator", "trainer.devices", "trainer.nodes",
    "trainer.accumulate", "trainer.compile", "trainer.val_every",
    "trainer.keep_checkpoints", "optim.shard",
}  # fmt: skip
IGNORED_GROUPS = ("task.target.", "search.")


@dataclass(frozen=True)
class Group:
    """The records of one row.

    Args:
        settings: of the keys by which rows are told apart, whether others differ in them or not.
    """

    label: str
    settings: dict[str, Any]
    runs: tuple[Run, ...]


def tuned_keys(runs: Iterable[Run], given: Sequence[str] | None = None) -> tuple[str, ...]:
    """The keys that a row is tuned over: the learning rate and those of its searches, or what the user says."""
    if given is not None:
        return tuple(given)
    searched = {
        key.removeprefix(SPACE).rpartition(".")[0] for run in runs for key in run.config if key.startswith(SPACE)
    }
    return tuple(sorted(searched | {ALWAYS_TUNED}))


def grouped(runs: Sequence[Run], tuned: Sequence[str]) -> list[Group]:
    """The rows of one optimizer, with labels that tell them apart.

    A key that a config lacks (an older version made it) is that of the others, if they have one value or null there.
    """
    configs = _filled([_telling(run, tuned) for run in runs])
    found: dict[Hashable, list[Run]] = defaultdict(list)
    telling: dict[Hashable, dict[str, Any]] = {}
    for run, config in zip(runs, configs, strict=True):
        identity = frozen(config)
        found[identity].append(run)
        telling.setdefault(identity, config)
    shown = differing(list(telling.values()))
    labels = numbered([label(config, shown) for config in telling.values()])
    return [
        Group(name, telling[identity], tuple(found[identity])) for name, identity in zip(labels, telling, strict=True)
    ]


def numbered(labels: Sequence[str]) -> list[str]:
    """The same, with a number where one is there already, as null and the word null read the same."""
    return [
        f"{label} ({before + 1})" if (before := labels[:k].count(label)) else label for k, label in enumerate(labels)
    ]


def _telling(run: Run, tuned: Sequence[str]) -> dict[str, Any]:
    config = expanded(run.config, tuned)
    return {
        key: value
        for key, value in config.items()
        if key not in IGNORED and key not in tuned and not key.startswith(IGNORED_GROUPS)
    }


def expanded(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The config, with lists in parts where a key names one, as optim.betas.0 does."""
    lists = {
        owner for key in keys if (owner := key.rpartition(".")[0]) and isinstance(config.get(owner), (list, tuple))
    }
    parts = {f"{owner}.{index}": value for owner in lists for index, value in enumerate(config[owner])}
    return {key: value for key, value in config.items() if key not in lists} | parts


def _filled(configs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    values: dict[str, dict[Hashable, Any]] = defaultdict(dict)
    for config in configs:
        for key, value in config.items():
            values[key][frozen(value)] = value
    missing = {
        key: None if frozen(None) in seen else next(iter(seen.values())) if len(seen) == 1 else ABSENT
        for key, seen in values.items()
    }
    return [missing | config for config in configs]


def frozen(value: Any) -> str:
    """The same text for the same value, also where a number is written as 0 and as 0.0."""
    return json.dumps(_numeric(value), sort_keys=True, default=str)


def _numeric(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) <= 2**53 else value
    if isinstance(value, (list, tuple)):
        return [_numeric(each) for each in value]
    return {key: _numeric(each) for key, each in value.items()} if isinstance(value, dict) else value


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys with several values; one that is missing somewhere is no other value."""
    values: dict[str, set[str]] = defaultdict(set)
    for config in configs:
        for key, value in config.items():
            values[key].add(frozen(value))
    return [key for key, seen in values.items() if len(seen) > 1]


def label(config: Mapping[str, Any], keys: Iterable[str]) -> str:
    """The optimizer's name, and ``key=value`` for each of the keys, in the order of the alphabet."""
    return " ".join([str(config["optim.name"]), *sorted(setting(key, config.get(key)) for key in keys)])


def setting(key: str, value: Any) -> str:
    """``lr=0.003`` for optim.lr; keys of other groups are written in full."""
    return f"{key.removeprefix('optim.')}={plain(value)}"


def called(rows: Iterable[Row], wanted: str) -> list[Row]:
    """The rows that someone may mean: those with exactly these settings, else those that have them among others.

    Settings may come in any order, with or without ``optim.``, numbers in any notation, and lists in brackets, as on
    the command line, or without. Without the name of an optimizer they mean rows of any.
    """
    name, settings = _parts(wanted)
    fitting = [row for row in rows if name in ("", _parts(row.label)[0]) and settings <= _all_settings(row)]
    return [row for row in fitting if _parts(row.label)[1] == settings] or fitting


def _all_settings(row: Row) -> frozenset[str]:
    return _parts(row.label)[1] | {_normal(setting(key, value)) for key, value in row.settings.items()}


def without_name(wanted: str) -> bool:
    """Whether these are settings alone, as ``statistics=ema``."""
    return not _parts(wanted)[0]


def _parts(label: str) -> tuple[str, frozenset[str]]:
    words = label.split()
    name, settings = ("", words) if words and "=" in words[0] else (words[0] if words else "", words[1:])
    return name, frozenset(map(_normal, settings))


def _normal(word: str) -> str:
    key, _, value = word.partition("=")
    try:
        return setting(key, float(value))
    except ValueError:
        return setting(key, value.removeprefix("[").removesuffix("]"))


def plain(value: Any) -> str:
    """A value of the recipe as YAML and the command line have it, short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return ",".join(map(plain, value)) if isinstance(value, (list, tuple)) else str(value)


@dataclass(frozen=True)
class Twice:
    """A record that is not counted, and the one of the same trial and seed that is."""

    left_out: Run
    kept: Run


def ended(run: Run) -> bool:
    return run.state in (DONE, FAILED)


def trials(runs: Sequence[Run], tuned: Sequence[str]) -> tuple[tuple[Trial, ...], tuple[Twice, ...]]:
    """The trials of a row, in the order of their values, and the records that were there twice.

    Of two records with the same values and the same seed, the one that has come further counts, then the later one.
    """
    found: dict[str, dict[int, list[Run]]] = defaultdict(lambda: defaultdict(list))
    values: dict[str, dict[str, Any]] = {}
    for run in runs:
        config = expanded(run.config, tuned)
        own = {key: config[key] for key in tuned if key in config}
        found[frozen(own)][run.seed].append(run)
        values.setdefault(frozen(own), own)
    made, twice = [], []
    for name, seeds in found.items():
        kept = {seed: max(same, key=_further) for seed, same in sorted(seeds.items())}
        made.append(Trial(values[name], tuple(kept.values()), _index(kept.values())))
        twice += [Twice(run, kept[seed]) for seed, same in seeds.items() for run in same if run is not kept[seed]]
    made.sort(key=lambda trial: [_sortable(trial.values.get(key)) for key in tuned])
    return tuple(made), tuple(twice)


def _further(run: Run) -> tuple[int, str, str, str]:
    """In the end by what is in them, as the order in which records are read is nobody's choice."""
    rank = {DONE: 2, FAILED: 1}.get(run.state, 0)
    return rank, str(run.status.get("updated", "")), frozen([run.result, run.config]), run.path


def _index(runs: Iterable[Run]) -> int | None:
    return next((index for run in runs if isinstance(index := run.config.get("trial"), int)), None)


def _sortable(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, (int, float))
    return not number, float(value) if number else 0.0, plain(value)
