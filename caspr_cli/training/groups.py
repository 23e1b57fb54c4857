"""What every optimizer is built from: groups of parameters, and options."""

from typing import Any

from torch import nn

from caspr_cli.optim.groups import grouped
from caspr_cli.recipe.compose import options
from caspr_cli.recipe.schema import OptimConf
from caspr_cli.tasks.base import Task


def param_groups(task: Task, model: nn.Module) -> list[dict[str, Any]]:
    """Return the groups of :func:`caspr_cli.optim.groups.grouped`, each with ``precondition``."""
    return [{"precondition": True} | group for group in grouped(model, task.plain(model))]


def build_options(conf: OptimConf) -> dict[str, Any]:
    """Return the arguments of :func:`caspr_cli.optim.registry.build` beside the groups."""
    settings = options(conf)
    return settings | {"betas": tuple(settings["betas"])} if "betas" in settings else settings
