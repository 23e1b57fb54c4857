"""The parameter groups that every optimizer gets."""

from __future__ import annotations

from typing import Any

from torch import nn

from caspr_cli.optim.groups import grouped
from caspr_cli.tasks.base import Task


def param_groups(task: Task, model: nn.Module) -> list[dict[str, Any]]:
    """Return the groups of :func:`caspr_cli.optim.groups.grouped`, each with ``precondition``."""
    return [{"precondition": True} | group for group in grouped(model, task.plain(model))]
