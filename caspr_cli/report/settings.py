"""Values of recipes as text, and what differs among recipes."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

SPACE = "search.space."


def plain(value: Any) -> str:
    """Return a value of the recipe as YAML and the command line have it, short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return ",".join(map(plain, value)) if isinstance(value, (list, tuple)) else str(value)


def short(key: str) -> str:
    """Return the name that a key has in labels and tables: ``lr`` for ``optim.lr``; keys of other groups in full."""
    return key.removeprefix("optim.")


def setting(key: str, value: Any) -> str:
    """Return ``lr=0.003`` for ``optim.lr``."""
    return f"{short(key)}={plain(value)}"


def joined(values: Mapping[str, Any]) -> str:
    """Return ``lr=0.003 eps=1e-08``."""
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
    """Return the keys that have several values; a key that is missing in one config has no value there."""
    return [key for key, values in values_of(configs).items() if len(values) > 1]


def expanded(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Return the config, with lists in parts where a key names a part, as ``optim.betas.0`` does."""
    owners = (key.rpartition(".")[0] for key in keys)
    lists = {owner for owner in owners if isinstance(config.get(owner), (list, tuple))}
    parts = {f"{owner}.{index}": value for owner in lists for index, value in enumerate(config[owner])}
    return {key: value for key, value in config.items() if key not in lists} | parts


def ranges(config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return the range of each key that a search varies: its kind (``log``, ``choice``, ...) and its numbers."""
    names = [name for name in config if name.startswith(SPACE)]
    parts = [(name, *name.removeprefix(SPACE).rpartition(".")[::2]) for name in sorted(names)]
    return {key: (kind, config[name]) for name, key, kind in parts}
