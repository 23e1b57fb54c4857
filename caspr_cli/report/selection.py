"""Which records belong to one row of a table, and which row or records a user means."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from caspr_cli.common.errors import UserError, nearest
from caspr_cli.common.format import listed
from caspr_cli.report.model import Row, Run, Table
from caspr_cli.report.settings import differing, expanded, frozen, plain, setting, values_of

ALWAYS_TUNED = "optim.lr"
UNTUNED = ("trial", "default")  # runs of an optimizer's own values are a row of their own
DRAWN = {"optim.lr", "optim.adamw_lr_scale", "optim.betas", "optim.momentum", "optim.weight_decay"}  # by searches
ABSENT = "-"  # a key that an older version did not have, where the others differ in it
# Keys that make no rows of their own: they change no number, or only the order of sums, or make tables of their own.
IGNORED = {
    "seed", "trial", "resume", "output_dir", "logger", "debug", "horizon", "task.root", "trainer.timeout",
    "trainer.rendezvous", "trainer.workers", "trainer.log_every", "trainer.accelerator", "trainer.devices",
    "trainer.nodes", "trainer.strategy", "trainer.accumulate", "trainer.compile", "trainer.val_every",
    "trainer.keep_checkpoints", "optim.shard",
}  # fmt: skip
IGNORED_GROUPS = ("task.target.", "search.")
MANY = 2  # where rows differ in more keys than this, labels leave out the values that the optimizer has by itself
GROUPS = ("optim", "task", "trainer", "schedule", "search")  # whose keys may be named without them
BETWEEN = re.compile(r" +(?=[\w.]+=|untuned\b|\(\d+\)$)")  # the settings of a label, whose values may have blanks
SHORT = {"task": "task.name", "optim": "optim.name"}
OwnValue = tuple[str, str, str]  # an optimizer, one of its options, and the frozen value that it has by itself


def rows_of(
    runs: Sequence[Run], tuned: Sequence[str], named: Collection[str], own_of: Collection[OwnValue], **common: Any
) -> list[Row]:
    """Return the rows of one optimizer, tuned or untuned, with labels that have what distinguishes them, and ``named``.

    A key that a config lacks (an older version wrote it) gets the value of the others, if they have one value or null.

    Args:
        own_of: :func:`own_values`, which labels with many keys leave out.
        common: more fields of all rows.
    """

    def counts(key: str, value: Any) -> bool:
        ignored = key in IGNORED and (key, value) != UNTUNED
        return not (ignored or key in tuned or key.startswith(IGNORED_GROUPS))

    configs = [{k: v for k, v in expanded(run.config, tuned).items() if counts(k, v)} for run in runs]
    missing = {
        key: None if frozen(None) in seen else next(iter(seen.values())) if len(seen) == 1 else ABSENT
        for key, seen in values_of(configs).items()
    }
    found: dict[str, tuple[dict[str, Any], list[Run]]] = {}
    for run, config in zip(runs, configs, strict=True):
        found.setdefault(frozen(missing | config), (missing | config, []))[1].append(run)
    shown = differing(config for config, _ in found.values())
    omitted = _omitted([config for config, _ in found.values()], shown, own_of)
    labels: Counter[str] = Counter()
    rows = []
    for config, own in found.values():
        name = [config["optim.name"], *(["untuned"] if UNTUNED in config.items() else [])]
        keys = {*shown, *(key for key in named if key in config)}
        label = " ".join([*name, *sorted(_settings(config, keys, omitted))])
        labels[label] += 1
        number = f" ({labels[label]})" if labels[label] > 1 else ""  # null and the word null read the same
        rows.append(Row(f"{label}{number}", config, tuple(own), tuple(tuned), **common))
    return rows


def _omitted(configs: Sequence[Mapping[str, Any]], keys: Collection[str], own_of: Collection[OwnValue]) -> set[str]:
    """Return the settings that labels leave out, as ``axes=all``: an optimizer's own values, where there are many keys.

    So a table of one option at a time has ``caspr`` and ``caspr axes=first``. A key with two own values, of two
    versions, stays.
    """
    if len(keys) <= MANY:
        return set()
    seen, name = values_of(configs), str(configs[0]["optim.name"])
    own = {key: [value for text, value in seen[key].items() if (name, key, text) in own_of] for key in keys}
    return {setting(key, values[0]) for key, values in own.items() if len(values) == 1}


def _settings(config: Mapping[str, Any], keys: Iterable[str], omitted: Collection[str]) -> set[str]:
    return {setting(key, config.get(key)) for key in keys}.difference(omitted)


def own_values(runs: Iterable[Run]) -> set[OwnValue]:
    """Return (optimizer, option, value) of all options that the command of a run did not set."""
    found = set[OwnValue]()
    for run in runs:
        given, name = _given(run), str(run.config["optim.name"])
        options = {key: value for key, value in run.config.items() if key.startswith("optim.") and key not in given}
        found |= {(name, key, frozen(value)) for key, value in options.items()}
    return found


def _given(run: Run) -> set[str]:
    """Return the options of the optimizer that the command of a run set."""
    keys = (str(word).lstrip("+").partition("=")[0] for word in run.provenance.get("command") or ())
    return {key for key in keys if key.startswith("optim.")}


def set_by_hand(runs: Sequence[Run], own: Collection[OwnValue]) -> set[str]:
    """Return the options that a command set and that not all optimizers of a table share, as ``exponent=1`` of Shampoo.

    A label without them would promise the optimizer's own values. So all count where there is only one optimizer, and
    an option that another one lacks counts, too. What searches draw is left to the settings, and so is a value that
    the optimizer is known to have anyway: ``own``, see :func:`own_values`.
    """
    keys = {
        key
        for run in runs
        for key in _given(run) - DRAWN
        if (str(run.config["optim.name"]), key, frozen(run.config.get(key))) not in own
    }
    if len({run.config["optim.name"] for run in runs}) == 1:
        return keys
    return keys.intersection(differing({key: run.config.get(key, ABSENT) for key in keys} for run in runs))


def with_common_labels(tables: Sequence[Table]) -> list[Table]:
    """Return the tables with labels that mean the same row in each of them.

    They have all settings in which any table has variants: the only ``caspr`` of one table is the ``caspr eps=1e-06``
    of another, and not its ``caspr eps=0.0001``.
    """
    keys: dict[tuple[str, bool], set[str]] = defaultdict(set)
    settings: dict[tuple[str, bool], list[dict[str, Any]]] = defaultdict(list)
    for table in tables:
        for kind in {(row.optim, row.untuned) for row in table.rows}:
            own = [row.settings for row in table.rows if (row.optim, row.untuned) == kind]
            keys[kind].update(differing(own))
            settings[kind] += own
    own_of = own_values(run for table in tables for row in table.rows for run in row.records)
    omitted = {kind: _omitted(settings[kind], own, own_of) for kind, own in keys.items()}

    def labelled(row: Row) -> Row:
        kind = row.optim, row.untuned
        name, *own = BETWEEN.split(row.label)
        more = _settings(row.settings, keys[kind].intersection(row.settings), omitted[kind])
        return row.but(label=" ".join([name, *sorted(more.union(own).difference(omitted[kind]))]))

    return [replace(table, rows=tuple(map(labelled, table.rows))) for table in tables]


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
    words = BETWEEN.split(label.strip())
    name = "" if not words or "=" in words[0] else words.pop(0)
    return name, frozenset(map(_normal, words))


def _normal(word: str) -> str:
    key, _, value = word.partition("=")
    try:
        return setting(key, float(value))
    except ValueError:
        return setting(key, value.removeprefix("[").removesuffix("]"))


def where(runs: Sequence[Run], conditions: Iterable[str]) -> list[Run]:
    """Return the runs that meet all conditions, as ``optim=caspr,adamw``, ``lr=0.01`` or ``state=failed``.

    Raises UserError if no record has such a key, or none of those that are left this value.
    """
    found = list(runs)
    for condition in conditions:
        key, _, wanted = condition.partition("=")
        keys = {"state", *SHORT, *(each for run in runs for each in run.config)}
        full = next((k for k in (SHORT.get(key), key, *(f"{g}.{key}" for g in GROUPS)) if k in keys), None)
        if full is None:
            raise UserError(f"--where {condition}: no record has this key.{nearest(key, keys)}")
        values = [_normal(f"x={run.state if full == 'state' else plain(run.config.get(full))}") for run in found]
        whole = _normal(f"x={wanted}")
        either = {whole: wanted} if whole in values else {_normal(f"x={part}"): part for part in wanted.split(",")}
        lacking = [part for value, part in either.items() if value not in values]
        if len(lacking) == len(either) or (lacking and full != "state"):  # of states there may be some
            there = sorted({value.partition("=")[2] for value in values})
            raise UserError(f"--where {condition}: no record has {key}={lacking[0]} ({key} is {listed(there, 12)})")
        found = [run for run, value in zip(found, values, strict=True) if value in either]
    return found
