"""Which records belong together: rows, their labels, and the trials in each."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from caspr_cli.report.model import DONE, Run, Trial

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


def tuned_keys(runs: Iterable[Run], given: Sequence[str] | None = None) -> tuple[str, ...]:
    """The keys that a row is tuned over: the learning rate and those of its searches, or what the user says."""
    if given is not None:
        return tuple(given)
    searched = {
        key.removeprefix(SPACE).rpartition(".")[0] for run in runs for key in run.config if key.startswith(SPACE)
    }
    return tuple(sorted(searched | {ALWAYS_TUNED}))


def grouped(runs: Sequence[Run], tuned: Sequence[str]) -> dict[str, list[Run]]:
    """The rows of one optimizer, by label.

    A key that a config lacks (an older version made it) is that of the others, if they have one value or null there.
    """
    configs = _filled([_telling(run, tuned) for run in runs])
    found: dict[Hashable, list[Run]] = defaultdict(list)
    telling: dict[Hashable, Mapping[str, Any]] = {}
    for run, config in zip(runs, configs, strict=True):
        identity = frozen(config)
        found[identity].append(run)
        telling[identity] = config
    shown = differing(list(telling.values()))
    return {label(telling[identity], shown): group for identity, group in found.items()}


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
    """The same text for the same value."""
    return json.dumps(value, sort_keys=True, default=str)


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys with several values, in the order of the recipe; one that is missing somewhere is no other value."""
    values: dict[str, set[str]] = defaultdict(set)
    for config in configs:
        for key, value in config.items():
            values[key].add(frozen(value))
    return [key for key, seen in values.items() if len(seen) > 1]


def label(config: Mapping[str, Any], keys: Iterable[str]) -> str:
    """The optimizer's name, and ``key=value`` for each of the keys."""
    return " ".join([str(config["optim.name"]), *(setting(key, config.get(key)) for key in keys)])


def setting(key: str, value: Any) -> str:
    """``lr=0.003`` for optim.lr; keys of other groups are written in full."""
    return f"{key.removeprefix('optim.')}={plain(value)}"


def called(labels: Sequence[str], wanted: str) -> list[str]:
    """The labels that someone may mean: those with exactly these settings, else those that have them among others.

    Settings may come in any order, with or without ``optim.``, and numbers in any notation.
    """
    name, settings = _parts(wanted)
    fitting = [label for label in labels if _parts(label)[0] == name and settings <= _parts(label)[1]]
    return [label for label in fitting if _parts(label)[1] == settings] or fitting


def _parts(label: str) -> tuple[str, frozenset[str]]:
    name, *settings = label.split() or [""]
    return name, frozenset(map(_normal, settings))


def _normal(word: str) -> str:
    key, _, value = word.partition("=")
    try:
        return setting(key, float(value))
    except ValueError:
        return setting(key, value)


def plain(value: Any) -> str:
    """A value of the recipe as YAML and the command line have it, short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return ",".join(map(plain, value)) if isinstance(value, (list, tuple)) else str(value)


def ended(run: Run) -> bool:
    return run.state in (DONE, FAILED)


def trials(runs: Sequence[Run], tuned: Sequence[str]) -> tuple[tuple[Trial, ...], int]:
    """The trials of a row, in the order of their values, and how many records were there twice.

    Of two records with the same values and the same seed, the one that has come further counts, then the later one.
    """
    found: dict[str, dict[int, Run]] = defaultdict(dict)
    values: dict[str, dict[str, Any]] = {}
    for run in runs:
        config = expanded(run.config, tuned)
        own = {key: config[key] for key in tuned if key in config}
        kept = found[frozen(own)]
        kept[run.seed] = max(kept.get(run.seed, run), run, key=_further)
        values[frozen(own)] = own
    made = [
        Trial(values[name], tuple(seeds[seed] for seed in sorted(seeds)), _index(seeds.values()))
        for name, seeds in found.items()
    ]
    made.sort(key=lambda trial: [_sortable(trial.values.get(key)) for key in tuned])
    return tuple(made), len(runs) - sum(len(trial.runs) for trial in made)


def _further(run: Run) -> tuple[int, str]:
    return {DONE: 2, FAILED: 1}.get(run.state, 0), str(run.status.get("updated", ""))


def _index(runs: Iterable[Run]) -> int | None:
    return next((index for run in runs if isinstance(index := run.config.get("trial"), int)), None)


def _sortable(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, (int, float))
    return not number, float(value) if number else 0.0, plain(value)
