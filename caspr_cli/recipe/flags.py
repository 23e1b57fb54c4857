"""Flags of the commands that are not Hydra's: what is wrong with one is said in one line."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from caspr_cli.recipe.errors import ConfigError, nearest


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like the other commands."""

    def error(self, message: str) -> NoReturn:
        match = re.fullmatch(r"argument (--\S+): (.*)", message.replace("'", ""))
        raise ConfigError(f"{match[1]}: {match[2]}" if match else message)


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
