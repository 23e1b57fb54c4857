"""The tasks: one folder each, with its data, its model and what is measured.

A task knows nothing of optimizers, Lightning or the command line. :func:`load` finds it by the name that the
recipe carries; importing this package alone imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from caspr_cli.recipe.task import Target, TaskConf

if TYPE_CHECKING:
    from caspr_cli.tasks.base import Task

__all__ = ["Entry", "Target", "TaskConf", "load"]


class Entry(NamedTuple):
    about: str
    keys: type[TaskConf]
    task: str  # "module:class", imported when a run starts; called as ``Task(conf, seed)``
    # "module:function" that imports no torch; called as ``samples(conf)``, it reads own data a sample at each step
    samples: str | None = None


def load(conf: TaskConf, seed: int) -> Task:
    """Build the task that ``conf.name`` names."""
    from caspr_cli.tasks.registry import TASKS  # here: it imports packages that import this one

    module, _, cls = TASKS[conf.name].task.partition(":")
    task: Task = getattr(import_module(module), cls)(conf, seed)
    return task
