"""The tasks: one folder each, with its data, its model and what is measured.

A task knows nothing of optimizers, Lightning or the command line. :func:`load` finds it by the name that the
recipe carries; importing this package alone imports no torch.
"""

from caspr_cli.recipe.schema import Target, TaskConf
from caspr_cli.tasks.registry import Entry, load

__all__ = ["Entry", "Target", "TaskConf", "load"]
