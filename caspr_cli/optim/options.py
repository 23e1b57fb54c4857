"""Options of a param group, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from caspr_cli.common.ranges import SMALLEST_EPS_FLOAT32, without_removed, wrong
from caspr_cli.optim.blocks import AXES, MERGES
from caspr_cli.optim.graft import GRAFTS
from caspr_cli.optim.shard import SHARDS

Group = dict[str, Any]

# The keys of a param group, beside "params".
OPTIONS = (
    "lr", "betas", "eps", "weight_decay", "order", "exponent", "statistics", "damping", "interval", "start_step",
    "block_size", "merge", "axes", "batch_axes", "precondition_1d", "graft", "graft_eps", "precondition", "solver",
    "factor_dtype", "root_dtype", "pack_roots", "apply_dtype", "shard",
    "gather_dtype", "maximize",
)  # fmt: skip

# Of these, what a root is of, beside its statistics.
OF_ROOTS = ("order", "exponent", "statistics", "damping", "eps")

SOLVERS = ("auto", "eigh", "newton")


def _one_of(name: str, value: object, choices: Iterable[object]) -> None:
    if not any(value is c or (isinstance(c, str) and value == c) for c in choices):
        raise ValueError(f"{name} should be one of {', '.join(map(str, choices))} but is: {value!r}")


def validate(options: Group) -> None:
    """Check the options of a param group.

    Raises:
        ValueError: names the option and the value.
    """
    _one_of("statistics", options["statistics"], ("ema", "accumulate"))
    _one_of("damping", options["damping"], ("relative", "absolute"))
    if options["merge"] != "flatten":  # which FullAdagrad alone asks for
        _one_of("merge", options["merge"], MERGES)
    _one_of("axes", options["axes"], AXES)
    _one_of("graft", options["graft"], GRAFTS)
    _one_of("precondition", options["precondition"], ("momentum", "gradient", False))
    _one_of("solver", options["solver"], SOLVERS)
    _one_of("factor_dtype", options["factor_dtype"], (None, torch.float32, torch.float64))
    _one_of("pack_roots", options["pack_roots"], (True, False))
    _one_of("shard", options["shard"], SHARDS)
    for name in ("root_dtype", "apply_dtype", "gather_dtype"):
        _one_of(name, options[name], (None, torch.bfloat16))
    if found := wrong(options):
        raise ValueError(f"{found.key} {found.should} but is: {found.value}")


def adopted(saved: Group, mine: Group, fixed: Group) -> Group:
    """A group of a loaded state, with the options that are not the state's to say.

    Args:
        saved: the group in the state.
        mine: the group that it is loaded into. It says what the state does not, as that of AdamW does not, and whether
            axes are combined by a sum or a product.
        fixed: options that make the class what it is.

    Raises:
        ValueError: the state has an option that was removed, with another value than its default.
    """
    saved = without_removed(saved)
    group = {name: mine[name] for name in OPTIONS} | saved
    if "eps" in saved and "graft_eps" not in saved:  # of AdamW or another diagonal method: graft_eps here
        group |= {"eps": mine["eps"], "graft_eps": saved["eps"]}
    else:
        group.setdefault("roots_of", root_options(group))
    for name, kind in (("order", math.inf), ("merge", "flatten")):
        if (group[name] == kind) != (mine[name] == kind):
            group[name] = mine[name]
    return group | fixed


def root_options(group: Group) -> tuple[Any, ...]:
    """The options that roots belong to: those of others are made anew."""
    return tuple(group[name] for name in OF_ROOTS)


def is_float64_for_eps(p: Tensor, group: Group) -> bool:
    """Whether statistics are float64 for no other reason than a small eps."""
    return group["factor_dtype"] is None and factor_dtype(p, group) != factor_dtype(p, group | {"eps": 1.0})


def factor_dtype(p: Tensor, group: Group) -> torch.dtype:
    """The type of statistics and roots: float64 where the parameter, the user or a small eps asks for it."""
    if group["factor_dtype"] is not None:
        return cast(torch.dtype, group["factor_dtype"])
    small = group["damping"] == "relative" and group["eps"] < SMALLEST_EPS_FLOAT32
    return torch.float64 if p.dtype == torch.float64 or small else torch.float32
