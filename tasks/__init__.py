"""The tasks: one folder each, with its data, its model and what is measured.

A task knows nothing of optimizers, Lightning or the command line. :func:`load` finds it by the name that the
recipe carries; importing this package alone imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from caspr_cli.recipe.schema import TaskConf
    from caspr_cli.tasks.base import Task

# name in conf/task -> "module:class"
TASKS = {
    "c4_lm": "caspr_cli.tasks.c4_lm.task:C4LM",
    "ogbg_molpcba": "caspr_cli.tasks.ogbg_molpcba.task:MolPCBA",
    "ud_pos": "caspr_cli.tasks.ud_pos.task:Tagging",
    "resnet": "caspr_cli.tasks.resnet.task:ResNetTask",
    "vit": "caspr_cli.tasks.vit.task:ViTTask",
}


def load(conf: TaskConf, seed: int) -> Task:
    """Build the task that ``conf.name`` names."""
    module, _, cls = TASKS[conf.name].partition(":")
    task: Task = getattr(import_module(module), cls)(conf, seed)
    return task
