"""Checks that this machine has what a run needs. They come before torch is imported, which takes seconds."""

from functools import cache

from caspr_cli.common.errors import uninstalled
from caspr_cli.recipe import compose
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Accelerator, Logger, Recipe, Source
from caspr_cli.runs import fingerprint
from caspr_cli.runs.processes import has_gpu
from caspr_cli.runs.record import Record
from caspr_cli.tasks import own
from caspr_cli.tasks.errors import DataError


def refuse_here(recipe: Recipe) -> None:
    """Raise ConfigError if this machine lacks a GPU, data or a package, or own data are not as the task reads them."""
    if recipe.trainer.accelerator == Accelerator.gpu and not has_gpu():
        raise ConfigError("trainer.accelerator=gpu: this machine has no GPU; leave it out, or take cpu")
    if recipe.task.data == Source.files and recipe.task.root is None:
        raise ConfigError("task.root: task.data=files needs the directory of your data: add task.root=DIR")
    for logger in recipe.logger:
        if logger != Logger.csv and (missing := uninstalled(logger.name)):
            raise ConfigError(f"logger=[{logger.name}]: {missing}")
    root = fingerprint.root_of(recipe)
    if root is None:
        return
    if not root.exists():
        raise ConfigError(f"task.root: no such directory: {recipe.task.root}")
    if fingerprint.moved(Record.of(recipe), root) != []:  # else this run has read them before
        _refuse_data(compose.save(recipe))


@cache
def _refuse_data(recipe: str) -> None:
    """Raise :class:`ConfigError` for data that cannot be used; once for a recipe, as each job of a sweep asks twice."""
    try:
        own.check(compose.parse(recipe).task)
    except DataError as error:
        raise ConfigError(str(error)) from error
