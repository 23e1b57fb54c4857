"""Values of the commands' flags: what is wrong with one is said in one line."""

from __future__ import annotations

import argparse

from caspr_cli.common.errors import nearest
from caspr_cli.recipe.errors import ConfigError


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be a positive integer but is {text}")
    return value


def one_of(flag: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"{flag} {value}: no such choice.{nearest(value, choices)} (choices: {', '.join(choices)})")
    return value
