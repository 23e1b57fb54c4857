"""Every optimizer of the bench by name, built from the same param groups.

A group is ``{"params": [...], "precondition": bool, "weight_decay": float}``. Where ``precondition`` is False the
matrix methods leave the group to AdamW; for the diagonal methods it makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from caspr_cli.optim.caspr import CASPR, FullAdagrad, Shampoo
from caspr_cli.optim.mixed import MixedOptimizer
from caspr_cli.optim.options import Group

Builder = Callable[..., Optimizer]


def build(name: str, groups: list[Group], options: dict[str, Any]) -> Optimizer:
    """The optimizer ``name`` over ``groups``, with the keyword options of its config."""
    return BUILDERS[name]([dict(g) for g in groups if g["params"]], **options)


def _family(cls: Builder) -> Builder:
    """CASPR and its kin know ``precondition=False`` themselves; elsewhere the option says what is preconditioned."""

    def make(groups: list[Group], **options: Any) -> Optimizer:
        for group in groups:
            if group["precondition"]:
                del group["precondition"]
        dtypes = {k: getattr(torch, v) for k, v in options.items() if k.endswith("_dtype") and isinstance(v, str)}
        return cls(groups, **options | dtypes)

    return make


def _adamw(groups: list[Group], **options: Any) -> Optimizer:
    return torch.optim.AdamW(groups, **options)


def _nadamw(groups: list[Group], **options: Any) -> Optimizer:
    return torch.optim.NAdam(groups, decoupled_weight_decay=True, **options)


def _sgd(groups: list[Group], **options: Any) -> Optimizer:
    return torch.optim.SGD(groups, nesterov=True, **options)


# Which tensors of a preconditioned group each of these takes; AdamW gets the others.
TAKES: dict[str, Callable[[Tensor], bool]] = {"muon": lambda p: p.ndim >= 2, "soap": lambda p: p.ndim >= 2}


def _only(groups: list[Group], takes: Callable[[Group, Tensor], bool]) -> list[Group]:
    """The groups with those of their parameters alone that are taken, without what is then empty."""
    kept = [[p for p in group["params"] if takes(group, p)] for group in groups]
    return [group | {"params": params} for group, params in zip(groups, kept, strict=True) if params]


def _matrices_and_rest(
    name: str,
    groups: list[Group],
    matrix: Callable[..., list[Optimizer]],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> Optimizer:
    def taken(group: Group, p: Tensor) -> bool:
        return group["precondition"] and TAKES[name](p)

    matrices, rest = _only(groups, taken), _only(groups, lambda group, p: not taken(group, p))
    parts = matrix(matrices, lr=lr, weight_decay=weight_decay) if matrices else []
    if rest:
        parts.append(torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))
    return MixedOptimizer(parts)


def _muon(groups: list[Group], *, momentum: float, ns_steps: int, **options: Any) -> Optimizer:
    def matrix(groups: list[Group], **shared: Any) -> list[Optimizer]:
        # An orthogonalised update of the size of AdamW's ("match_rms_adamw"), so that one lr serves all parts.
        parts: list[Optimizer] = []
        if flat := _only(groups, lambda _, p: p.ndim == 2):
            parts.append(
                torch.optim.Muon(
                    flat, momentum=momentum, nesterov=True, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw", **shared
                )
            )
        if filters := _only(groups, lambda _, p: p.ndim > 2):
            from pytorch_optimizer import Muon  # torch's refuses them; this one sees one filter a row, [out, rest]

            filters = [group | {"use_muon": True} for group in filters]
            parts.append(Muon(filters, momentum=momentum, ns_steps=ns_steps, use_adjusted_lr=True, **shared))
        return parts

    return _matrices_and_rest("muon", groups, matrix, **options)


def _soap(groups: list[Group], *, interval: int, **options: Any) -> Optimizer:
    from pytorch_optimizer import SOAP  # here, because importing it takes a second

    def matrix(groups: list[Group], **shared: Any) -> list[Optimizer]:
        return [SOAP(groups, betas=options["betas"], eps=options["eps"], precondition_frequency=interval, **shared)]

    return _matrices_and_rest("soap", groups, matrix, **options)


BUILDERS: dict[str, Builder] = {
    "caspr": _family(CASPR),
    "caspr_paper": _family(CASPR),
    "shampoo": _family(Shampoo),
    "full_adagrad": _family(FullAdagrad),
    "adamw": _adamw,
    "nadamw": _nadamw,
    "sgd": _sgd,
    "muon": _muon,
    "soap": _soap,
}
