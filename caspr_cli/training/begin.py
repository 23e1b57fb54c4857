"""What a rank does before it imports Lightning, which takes longest: data and options are checked first."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from caspr_cli import tasks
from caspr_cli.common import plugins
from caspr_cli.optim.registry import build
from caspr_cli.recipe.compose import options
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs import fingerprint
from caspr_cli.runs.record import Record
from caspr_cli.tasks.base import Task
from caspr_cli.training.blame import blaming
from caspr_cli.training.describe import prepared
from caspr_cli.training.progress import Progress


@dataclass
class Begun:
    """A run whose data are there."""

    recipe: Recipe
    task: Task
    progress: Progress | None  # None on all ranks but the first
    files: fingerprint.Stamps | None  # files, described: see `caspr_cli.training.describe.prepared`
    described: dict[str, Any]


def begin(recipe: Recipe, record: Record, *, rank: int) -> Begun:
    """Load a recipe's task and prepare its data.

    Raises ConfigError if an option cannot be used, or the data have changed since the run began, and DataError if the
    data cannot be read.
    """
    with blaming(recipe, plugins.TASKS):
        task = tasks.load(recipe.task, recipe.seed)
    progress = Progress(recipe.trainer.max_steps, task.unit) if rank == 0 else None
    if progress:
        _show_log(progress)
    group = {"params": [torch.nn.Parameter(torch.zeros(2, 2))], "precondition": True}
    with naming_the_key(recipe):  # refuse now the options that no model could be trained with: data may take hours
        build(recipe.optim.name, [group], options(recipe.optim))
    files, described = prepared(recipe, task)  # safe on all ranks at once
    fingerprint.refuse_changed(recipe, record, described)
    if progress:
        size = ", ".join(f"{split} {sizes[task.unit]:,}" for split, sizes in described["splits"].items())
        progress.say(f"data     {described['name']} ({described['source']}): {task.unit} {size}")
        progress.say("start    importing Lightning takes some seconds")
    return Begun(recipe, task, progress, files, described)


@contextmanager
def naming_the_key(recipe: Recipe) -> Iterator[None]:
    """Name the key of an option that an optimizer refuses; of another package's optimizer, the package."""
    with blaming(recipe, plugins.OPTIMIZERS):
        try:
            yield
        except ValueError as error:
            if plugins.package(plugins.OPTIMIZERS, recipe.optim.name):
                raise
            raise ConfigError(f"optim.{error}") from error


def _show_log(progress: Progress) -> None:
    """Show the lines that tasks log, as "training the tokenizer ...", on the screen."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            progress.say(record.getMessage())

    logger = logging.getLogger("caspr")
    logger.setLevel(logging.INFO)
    logger.handlers = [Lines()]
