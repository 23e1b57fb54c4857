"""The options of a param group: their check, those of a loaded state, and the types that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import Tensor

from caspr_cli.optim.family import OF_OPTIMIZER, SMALLEST_EPS_FLOAT32, CASPROptions, options_of, without_removed, wrong
from caspr_cli.optim.precision import is_fast_in_bfloat16

Group = dict[str, Any]

OPTIONS = tuple(o for o in options_of(CASPROptions) if o not in OF_OPTIMIZER)  # keys of a param group, beside "params"
# Keys of a param group that are none: torch's, those of schedulers, and what programs keep there to find a group again.
LABELS = ("params", "param_names", "roots_of", "name", "names", "initial_lr", "max_lr", "min_lr", "base_lr",
          "base_momentum", "max_momentum", "swa_lr", "lr_scale")  # fmt: skip
AUTO = "auto"
UNSCHEDULED = tuple(o for o in OPTIONS if o not in ("lr", "betas", "weight_decay"))  # those that no schedule writes
OF_ROOTS = ("order", "exponent", "statistics", "damping", "eps")  # those that the roots depend on


def check(group: Group, fixed: Mapping[str, Any], of: str) -> None:
    """Check a new param group of the class ``of``, whose own options are ``fixed``.

    Raises:
        ValueError: as :func:`validate`; or for a key that would change nothing, with the nearest option.
    """
    for key in group:
        if key in OF_OPTIMIZER:
            raise ValueError(f"{key} is an option of the optimizer, not of a param group")
        if key not in OPTIONS and key not in LABELS:
            near = get_close_matches(key, OPTIONS, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ' (a label of your own goes under "name")'
            raise ValueError(f"{key} is not an option of {of}.{hint}")
    validate(group)
    _refuse_other_class(group, fixed, of)


def checked_again(group: Group, known: list[Any] | None, fixed: Mapping[str, Any], of: str) -> list[Any]:
    """Return the options of a group that no schedule writes, and check all if these are not as they were ``known``."""
    now = [group[name] for name in UNSCHEDULED]
    if now != known:
        validate_again(group)
        _refuse_other_class(group, fixed, of)
    return now


def _refuse_other_class(group: Group, fixed: Mapping[str, Any], of: str) -> None:
    for name, value in fixed.items():
        if group[name] != value:
            raise ValueError(f"{name} of {of} is {value} but is: {group[name]}")


def validate(options: Group) -> None:
    """Check the options of a param group.

    Raises:
        ValueError: names the option and the value.
    """
    for name in OPTIONS:
        option = options_of(CASPROptions)[name]
        choices = [as_dtype(c) if name.endswith("_dtype") else c for c in option.choices]
        value = options[name]
        known = any(value is c or (isinstance(c, str) and value == c) for c in choices)
        if choices and not known and (name, value) != ("merge", "flatten"):  # which FullAdagrad alone asks for
            raise ValueError(f"{name} should be one of {', '.join(map(str, choices))} but is: {value!r}")
    if found := wrong(CASPROptions, options):
        raise ValueError(f"{found.key} {found.should} but is: {found.value}")


def validate_again(options: Group) -> None:
    """Check the options of a group that has stepped, but lr: a schedule that ends at zero may be a rounding below."""
    validate(options | {"lr": 0.0})


def as_dtype(name: Any) -> Any:
    """Return the type of this name; None and ``"auto"`` stay."""
    return name if name in (None, AUTO) else getattr(torch, name)


def adopted(saved: Group, mine: Group, fixed: Group) -> Group:
    """Return a group of a loaded state, with the options that a state does not decide.

    Args:
        saved: the group in the state.
        mine: the group that it is loaded into. It has the options that the state lacks, as a state of AdamW does, and
            decides whether axes are combined by a sum or a product, and who shares the work.
        fixed: options that make the class what it is.

    Raises:
        ValueError: the state has an option that was removed, with another value than its default.
    """
    saved = without_removed(saved)
    group = {name: mine[name] for name in OPTIONS} | saved
    if "eps" in saved and "graft_eps" not in saved:  # a state of AdamW or another diagonal method
        group |= {"eps": mine["eps"], "graft_eps": saved["eps"]}
    else:
        group.setdefault("roots_of", root_options(group))
    for name, kind in (("order", math.inf), ("merge", "flatten")):
        if (group[name] == kind) != (mine[name] == kind):
            group[name] = mine[name]
    return group | {"shard": mine["shard"]} | fixed


def root_options(group: Group) -> tuple[Any, ...]:
    """Return the options that roots depend on; roots that were made with other ones are made again."""
    return (*(group[name] for name in OF_ROOTS), *(["eigenvectors"] if group["measured"] else []))


def is_float64_for_eps(p: Tensor, group: Group) -> bool:
    """Return whether statistics are float64 only because eps is small."""
    return group["factor_dtype"] is None and factor_dtype(p, group) != factor_dtype(p, group | {"eps": 1.0})


def factor_dtype(p: Tensor, group: Group) -> torch.dtype:
    """Return the type of statistics and roots: float64 if the parameter, the user or a small eps asks for it."""
    if group["factor_dtype"] is not None:
        return cast(torch.dtype, group["factor_dtype"])
    small = group["damping"] == "relative" and group["eps"] < SMALLEST_EPS_FLOAT32
    return torch.float64 if p.dtype == torch.float64 or small else torch.float32


def apply_dtype(statistics: torch.dtype, device: torch.device, group: Group) -> torch.dtype:
    """Return the type of the products with the roots and of the polar factor, by the type of the statistics."""
    if group["apply_dtype"] != AUTO:
        return cast(torch.dtype, group["apply_dtype"] or statistics)
    low = group["polar"] and not group["measured"] and statistics == torch.float32 and is_fast_in_bfloat16(device)
    return torch.bfloat16 if low else statistics


def travel_dtype(p: Tensor, group: Group) -> torch.dtype:
    """Return the type in which updates travel between ranks: where nothing is said, bfloat16 if p is of that type."""
    if group["gather_dtype"] is not None:
        return cast(torch.dtype, group["gather_dtype"])
    return torch.bfloat16 if p.dtype == torch.bfloat16 else factor_dtype(p, group)
