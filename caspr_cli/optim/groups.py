"""Which parameters of a model are preconditioned, and which are left to AdamW."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Literal, overload

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from caspr_cli.optim.blocks import is_vector
from caspr_cli.optim.options import Group

Heads = str | nn.Module | Iterable[str | nn.Module]

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
)  # fmt: skip


@overload
def param_groups(model: nn.Module, heads: Heads | None = ..., *, explain: Literal[False] = ...) -> list[Group]: ...
@overload
def param_groups(model: nn.Module, heads: Heads | None = ..., *, explain: Literal[True]) -> tuple[list[Group], str]: ...
def param_groups(
    model: nn.Module, heads: Heads | None = None, *, explain: bool = False
) -> list[Group] | tuple[list[Group], str]:
    """Return the groups for an optimizer: matrices to precondition, other matrices, and vectors.

    Embeddings, norms and biases are found by the type of their module; AdamW takes them, and the output layers. Vectors
    have no weight decay. Parameters that need no gradient are left out.

    >>> optimizer = CASPR(param_groups(model), lr=1e-3)  # doctest: +SKIP

    Args:
        heads: the output layers, as modules or by name, one or several; none: ``()``. If not given, the model's last
            ``nn.Linear``.
        explain: return also a table of what goes where and why.

    Raises:
        ValueError: the model has no module of that name.
    """
    left = left_to_adamw(model, last_linear(model) if heads is None else heads)
    groups = grouped(model, left)
    return (groups, _table(model, left)) if explain else groups


def last_linear(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layer that a model defines last, where it has one."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]


def left_to_adamw(model: nn.Module, heads: Heads = ()) -> dict[str, str]:
    """Return the parameters that AdamW takes, by name, with the reason for each.

    Raises:
        ValueError: the model has no module of that name.
    """
    modules = dict(model.named_modules())
    each: Iterable[str | nn.Module] = [heads] if isinstance(heads, (str, nn.Module)) else heads
    output = {id(inner) for head in each for inner in _module(head, modules).modules()}
    tables = [module for module in modules.values() if isinstance(module, EMBEDDINGS)]
    embedded = {id(module) for table in tables for module in [table, *_parametrizations(table)]}
    reasons: dict[int, str] = {}
    for module in modules.values():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, NORMS) or (p.ndim < 2 and type(module).__name__.endswith("Norm")):
                reasons[id(p)] = "norm"
            elif p.ndim < 2:
                reasons.setdefault(id(p), "bias" if name.endswith("bias") else "vector")
            elif id(module) in embedded:
                reasons[id(p)] = "embedding"  # a batch sees few of its rows
            elif id(module) in output:
                reasons.setdefault(id(p), "head")
    return {name: reasons[id(p)] for name, p in model.named_parameters() if id(p) in reasons}


def grouped(model: nn.Module, left: Mapping[str, str]) -> list[Group]:
    """Return the groups of a model, of which AdamW takes the parameters that ``left`` names."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[Group] = [
        {"params": [p for name, p in named if name not in left]},
        {"params": [p for name, p in named if name in left and p.ndim >= 2], "precondition": False},
        {"params": [p for name, p in named if name in left and p.ndim < 2], "precondition": False, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _module(head: str | nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    if isinstance(head, nn.Module):
        return head
    if head not in modules:
        near = get_close_matches(head, modules, n=1, cutoff=0.5)
        raise ValueError(f"heads: the model has no module {head!r}{f', but {near[0]!r}' if near else ''}")
    return modules[head]


def _parametrizations(module: nn.Module) -> Iterable[nn.Module]:
    """Return the modules that keep the tensors of a module, where it has parametrizations such as ``weight_norm``."""
    return module.parametrizations.modules() if is_parametrized(module) else ()  # type: ignore[union-attr]


def _table(model: nn.Module, left: Mapping[str, str]) -> str:
    """Return a row for each kind of tensor: layers that differ in a number alone share one."""
    rows = {("tensor", "shape", "goes to", "because it is"): 0}
    for name, p in model.named_parameters():
        one_axis = name not in left and is_vector(tuple(p.shape))  # such as (n, 1): the graft method takes it
        reason = left.get(name, "vector" if one_axis else "matrix" if p.ndim == 2 else "tensor")
        place = "AdamW" if name in left or one_axis else "preconditioned"
        if name in left and p.ndim < 2:
            place += ", no weight decay"
        kind = re.sub(r"\b\d+\b", "*", name), " x ".join(map(str, p.shape)), place, reason
        if not p.requires_grad:
            kind = (*kind[:2], "-", "frozen")
        rows[kind] = rows.get(kind, 0) + 1
    cells = [(*kind, f"{count} of them" if count > 1 else "") for kind, count in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)
