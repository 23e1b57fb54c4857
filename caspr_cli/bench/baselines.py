"""The optimizers that are compared, and their options."""

import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch.optim.optimizer import Optimizer

from caspr_cli.common.errors import nearest
from caspr_cli.optim import plan, registry
from caspr_cli.optim.family import Option, options_of
from caspr_cli.optim.options import Group
from caspr_cli.recipe.compose import options
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import OPTIMIZERS, KroneckerConf

NEVER = 10**9  # an interval that no run reaches
WARM_UP = 3  # steps before anything is timed: they build state and the first roots
OWN_FLAGS = {"interval": "--interval", "block_size": "--block-size"}
NOT_FOR_SET = {"start_step", "maximize", "process_group", "adamw_lr_scale"}  # the first step is preconditioned here


@dataclass(frozen=True)
class Settings:
    """Options of the optimizers from the command line."""

    interval: int = 10
    block_size: int = 1024
    given: dict[str, Any] = field(default_factory=dict)  # options of the Kronecker family


def entry_of(name: str) -> str:
    """Return the optimizer of a name, which may have options behind it, as in ``caspr:order=3:graft=rms``."""
    return name.partition(":")[0]


def has_interval(name: str) -> bool:
    """Whether an optimizer refreshes something at an interval that is chosen here."""
    return hasattr(OPTIMIZERS[entry_of(name)], "interval")


def is_kronecker(name: str) -> bool:
    return issubclass(OPTIMIZERS[entry_of(name)], KroneckerConf)


def known_options(name: str) -> dict[str, Option]:
    """Return the options of an optimizer of the Kronecker family that can be set here."""
    options = options_of(registry.OPTIMIZERS[entry_of(name)].keys)
    return {key: option for key, option in options.items() if key not in NOT_FOR_SET}


def parse_given(words: list[str], names: list[str], flag: str = "--set") -> dict[str, Any]:
    """Return the options in ``--set KEY=VALUE``, checked against those of the chosen optimizers.

    Raises ConfigError for an unknown option, a value that cannot be read, or an option that has a flag of its own.
    """
    known = {key: option for name in names if is_kronecker(name) for key, option in known_options(name).items()}
    given = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{flag} {word}: options are written KEY=VALUE")
        if key in OWN_FLAGS:
            raise ConfigError(f"{flag} {word}: write {OWN_FLAGS[key]} {value}, which is for all optimizers")
        if not known:
            raise ConfigError(f"{flag} {word}: none of {', '.join(names)} takes options; it is for caspr and shampoo")
        if key not in known:
            raise ConfigError(f"{flag} {word}: {key} is no option.{nearest(key, known)} (help(caspr_cli.optim.CASPR))")
        given[key], default = _value(key, value, known[key].choices), known[key].default
        if isinstance(default, (int, float)) and isinstance(given[key], str):
            raise ConfigError(f"{flag} {word}: {key} is {default} unless it is set; '{value}' is of another kind")
    return given


def _value(key: str, text: str, choices: tuple[Any, ...]) -> int | float | bool | str | None:
    if key.endswith("dtype"):
        names: dict[str, str | None] = {str(name or "null"): name for name in choices}
        if text not in names:
            raise ConfigError(f"--set {key}={text}: should be one of {', '.join(names)}.{nearest(text, names)}")
        return names[text]  # as it stands in recipes
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def make(name: str, groups: list[Group], settings: Settings) -> Optimizer:
    """Return the optimizer ``name`` over ``groups`` after ``WARM_UP`` steps. Raises ConfigError."""
    optimizer, usual = enter(name, groups, settings), plan.AT_ONCE
    if settings.interval == NEVER:
        # All first roots in one step: else they would be spread over an interval that never ends.
        plan.AT_ONCE = math.inf
    try:
        for _ in range(WARM_UP):
            optimizer.step()
    finally:
        plan.AT_ONCE = usual
    return optimizer


def enter(name: str, groups: list[Group], settings: Settings) -> Optimizer:
    """Return the optimizer ``name`` over ``groups``, before its first step."""
    try:
        return registry.build(entry_of(name), groups, _options(name, settings))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {str(error).splitlines()[0]}") from error


def _options(name: str, settings: Settings) -> dict[str, Any]:
    entry, *own = name.split(":")
    found = options(OPTIMIZERS[entry]())
    if is_kronecker(name):
        found |= {"start_step": 1, "block_size": settings.block_size}
        given = settings.given | parse_given(own, [entry], f"--optim {entry}:")
        found |= {key: value for key, value in given.items() if key in known_options(entry)}
    if has_interval(name):
        found["interval"] = settings.interval
    return found | ({"fused": True} if entry == "adamw" else {})
