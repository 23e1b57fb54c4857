"""The parameter groups that every optimizer gets."""

from __future__ import annotations

from typing import Any

from torch import nn

from caspr_cli.tasks.base import Task


def param_groups(task: Task, model: nn.Module) -> list[dict[str, Any]]:
    """Return three groups: preconditioned tensors, other matrices, and vectors, which have no weight decay."""
    plain = task.plain(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if name not in plain], "precondition": True},
        {"params": [p for name, p in named if name in plain and p.ndim >= 2], "precondition": False},
        {
            "params": [p for name, p in named if name in plain and p.ndim < 2],
            "precondition": False,
            "weight_decay": 0.0,
        },
    ]
