"""Search spaces: a trial is a pure function of its index, so that any can be run alone, again, or on another machine.

A space maps keys of the recipe to a range: ``log: [low, high]`` (uniform in the logarithm), ``linear: [low, high]``,
``one_minus_log: [low, high]`` (1 - x is log-uniform, as suits decay rates), or ``choice: [a, b, c]``.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from caspr_cli.common.errors import nearest
from caspr_cli.recipe.errors import ConfigError

Range = Mapping[str, list[Any]]
Space = Mapping[str, Range]
KINDS = ("log", "linear", "one_minus_log", "choice")
SCRAMBLE = 1766  # among the best of 3,000 seeds: its first 4 to 20 points are even in one to five dimensions
RATE = "optim.lr"  # refined first
MOST = 2**20  # trials; reaching a point takes time in proportion to its index


def draw(space: Space, trial: int) -> dict[str, Any]:
    """Return the values of a trial: point ``trial`` (from 0) of a scrambled Sobol sequence over the sorted keys.

    The scrambling is the same for all searches. Trials of optimizers with the same keys therefore lie at the same
    places of their ranges. Numbers have four significant digits. Raises ConfigError if a range is malformed, or there
    is no such trial.
    """
    from scipy.stats import qmc  # slow to import, and needed by searches alone

    if not 0 <= trial < MOST:
        raise ConfigError(f"trial should be from 0 to {MOST - 1} but is {trial}")
    if not space:
        raise ConfigError("search.space is empty: there is nothing to draw")
    ranges = {key: _range(key, kinds) for key, kinds in sorted(space.items())}
    engine = qmc.Sobol(len(ranges), scramble=True, rng=SCRAMBLE)
    if trial:
        engine.fast_forward(trial)
    point = engine.random(1)[0].tolist()
    return {key: _value(*ranges[key], u) for key, u in zip(ranges, point, strict=True)}


def _range(key: str, kinds: Mapping[str, list[Any]]) -> tuple[str, list[Any]]:
    """Return the kind and the numbers of a range, checked."""
    where = f"search.space: {key}"
    if len(kinds) != 1 or next(iter(kinds)) not in KINDS:
        given = ", ".join(kinds)
        raise ConfigError(f"{where} should have one of {', '.join(KINDS)} but has {given}.{nearest(given, KINDS)}")
    kind, values = next(iter(kinds.items()))
    if kind == "choice":
        if not values:
            raise ConfigError(f"{where}: choice is empty")
        return kind, list(values)
    try:
        low, high = (float(value) for value in values)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: {kind} should be two numbers, [low, high], but is {list(values)}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{where}: {kind} should be [low, high] with low < high but is {list(values)}")
    if kind != "linear" and not low > 0:
        raise ConfigError(f"{where}: {kind} should begin above 0 but begins at {low:g}")
    if kind == "one_minus_log" and high > 1:
        raise ConfigError(f"{where}: {kind} should end at 1 or below but ends at {high:g}")
    return kind, [low, high]


def _value(kind: str, values: list[Any], u: float) -> Any:
    """Return the value at ``u`` in [0, 1) of a range."""
    if kind == "choice":
        return values[int(u * len(values))]
    low, high = values
    if kind == "linear":
        return _short(low + u * (high - low))
    x = _short(low * (high / low) ** u)
    return x if kind == "log" else round(1 - x, 15)  # keeps the digits of x, the distance from 1


def turns(space: Space) -> list[str]:
    """Return the keys with a range of numbers, in the order in which they are refined: the learning rate first."""
    numbers = [key for key, kinds in space.items() if "choice" not in kinds]
    return sorted(numbers, key=lambda key: (key != RATE, key))


def beside(key: str, kinds: Range, values: Mapping[str, Any], tried: Iterable[Mapping[str, Any]]) -> list[float]:
    """Return values of a key to try next to that of ``values``: one below, one above, and one nearer on each side.

    They are a factor of two away (of the distance from 1 where that is drawn; in a linear range, a quarter of its
    width), or half-way to the next value that was tried if that is nearer. ``tried``: the values of all trials so far;
    those count that have all other keys as here.
    """
    kind, (low, high) = _range(key, kinds)

    def place(value: float) -> float:
        x = 1 - value if kind == "one_minus_log" else value
        return 4 * x / (high - low) if kind == "linear" else math.log2(x)

    def value(place: float) -> float:
        x = _short(place * (high - low) / 4 if kind == "linear" else 2**place)
        return round(1 - x, 15) if kind == "one_minus_log" else x

    here = place(values[key])
    gaps = [place(each[key]) - here for each in tried if {**each, key: None} == {**values, key: None}]
    below, above = max([-1.0, *(gap / 2 for gap in gaps if gap < 0)]), min([1.0, *(gap / 2 for gap in gaps if gap > 0)])
    return [value(here + step) for step in (below, above, below / 2, above / 2)]


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def drawn(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe's values at the keys of its search space."""
    return {key: _at(plain, key) for key in sorted(plain["search"]["space"])}


def put(plain: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Set dotted keys of a config in place; a number names an element of a list, as in ``optim.betas.0``.

    Raises ConfigError if there is no such key.
    """
    for key, value in values.items():
        group, _, last = key.rpartition(".")
        if not has(plain, key):
            names = [str(name) for name in _at(plain, group)] if has(plain, group) else []
            raise ConfigError(f"search.space: {key} is not a key.{nearest(last, names, f'{group}.')}")
        node = _at(plain, group)
        node[_index(node, last)] = value


def has(plain: Mapping[str, Any], key: str) -> bool:
    try:
        _at(plain, key)
    except (KeyError, IndexError, TypeError, ValueError):
        return False
    return True


def _at(plain: Mapping[str, Any], key: str) -> Any:
    node: Any = plain
    for word in filter(None, key.split(".")):
        node = node[_index(node, word)]
    return node


def _index(node: Any, word: str) -> Any:
    return int(word) if isinstance(node, list) else word


def fixed(space: Space, given: Iterable[str]) -> set[str]:
    """Return the keys of the space that the user has set. They are the same in every trial."""
    # a word without a dot chooses a file, as in optim=adamw
    keys = [key for word in given if "." in (key := word.lstrip("+").partition("=")[0])]
    return {name for name in space for key in keys if name == key or name.startswith(f"{key}.")}
