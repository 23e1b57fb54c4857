"""Recipes in tests: Hydra composes each set of choices once in a process, and values are merged into a copy of it."""

from functools import cache

from omegaconf import DictConfig

from caspr_cli.recipe import compose
from caspr_cli.recipe.composer import Composer
from caspr_cli.recipe.schema import Recipe

_composer = cache(Composer)


def composed(*words: str) -> DictConfig:
    """Return the config of a command line, as ``composed("optim=adamw", "seed=3")``; it may be changed."""
    return _composer().config(words)


def frozen(*words: str, trial: int | None = None) -> Recipe:
    """Return the checked recipe of a command line."""
    return compose.freeze(composed(*words), words, trial)
