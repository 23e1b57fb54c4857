"""What an optimizer keeps of a parameter: begun, checked and adopted from a state_dict, and made whole for one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from caspr_cli.optim.blocks import Layout
from caspr_cli.optim.fsdp import distribute, is_sharded
from caspr_cli.optim.graft import graft_of, needs_second_moment
from caspr_cli.optim.options import Group, adopted, validate_again
from caspr_cli.optim.parts import Part
from caspr_cli.optim.plan import is_preconditioned, layout_of
from caspr_cli.optim.shard import Factors, collected
from caspr_cli.optim.stacks import check_factors, is_factor, shape_of

if TYPE_CHECKING:
    from caspr_cli.optim.divide import Division

# Entries of a state that count: steps, gradients since its statistics began, updates in the momentum of
# precondition="gradient", gradients that were not finite.
COUNTERS = ("step", "gradients", "updates", "skipped")

Content = dict[str, Any]  # a state_dict
State = dict[str, Any]  # of one parameter


def counter(value: Tensor | float = 0) -> Tensor:
    """Return a counter in float32 on the CPU, as in torch, where reading it does not wait for the device."""
    return torch.as_tensor(value, dtype=torch.float32, device="cpu")


def count_there(states: list[State], device: torch.device, group: Group, *, masked: bool) -> None:
    """Have the counters where the step changes them: on a GPU where it is not waited for (see `masked`)."""
    if device.type == "cpu" and not masked:
        return
    places = dict.fromkeys(COUNTERS, device if masked else torch.device("cpu"))
    if group["precondition"] != "gradient":
        places["updates"] = torch.device("cpu")  # no step adds to them, and here they are read without a wait
    for state in states:
        if masked:
            state.setdefault("skipped", counter())
        names = [name for name, where in places.items() if name in state and state[name].device != where]
        state |= {name: state[name].to(places[name]) for name in names}


def params_of(groups: list[Group]) -> Iterator[tuple[Tensor, Group]]:
    """Yield each parameter with its group, in the order of a state_dict."""
    return ((p, group) for group in groups for p in group["params"])


def begin(state: State, p: Tensor, group: Group) -> None:
    """Make the entries that every step needs, where they are not there."""
    asked = group["graft"] in ("rms", "none")
    graft = graft_of(group, preconditioned=is_preconditioned(p, group)) if asked else group["graft"]
    needed = ("exp_avg", "exp_avg_sq") if needs_second_moment(graft) else ("exp_avg",)
    if any(name not in state for name in ("step", *needed)):  # one counter: the moments begin together
        state["step"] = counter()
        state |= {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in needed}
        state.pop("updates", None)
    if "exp_avg_sq" not in needed:  # one that rests would be corrected for steps that it has not seen
        state.pop("exp_avg_sq", None)
    for name in ("exp_avg", "exp_avg_sq"):
        if (moment := state.get(name)) is not None and moment.dtype != p.dtype:  # the model was cast
            state[name] = moment.to(p.dtype)


def begin_counters(states: list[State], group: Group) -> None:
    """Make the counters of parameters that are preconditioned some day, where they are not there."""
    for name in ("gradients", "updates") if group["precondition"] == "gradient" else ("gradients",):
        for state in states:
            if name not in state:
                state[name] = counter()


def next_counts(states: dict[Tensor, State], name: str, given: dict[tuple[Tensor, str], int]) -> dict[Tensor, int]:
    """Return what this counter of each state will be after the step. All are read at once: there may be thousands.

    Those on a GPU are read once, and what was left out is added: from then on ``given`` counts.
    """
    if next((state[name].device.type for state in states.values()), "cpu") == "cpu":
        for p in states if given else ():  # which may have been on a GPU before
            given.pop((p, name), None)
        values = torch.stack([state[name] for state in states.values()]).tolist() if states else []
        return {p: int(value) + 1 for p, value in zip(states, values, strict=True)}
    if unread := {p: state for p, state in states.items() if (p, name) not in given}:
        used, skipped = (torch.stack([state[key] for state in unread.values()]) for key in (name, "skipped"))
        given |= {(p, name): int(n) for p, n in zip(unread, (used + skipped).cpu().tolist(), strict=True)}
    given |= {(p, name): given[p, name] + 1 for p in states}
    return {p: given[p, name] for p in states}


def count_as_before(state: State, group: Group, owned: bool) -> None:
    """Complete the counters of an older version, which had one: its runs had statistics from the first step on."""
    if "gradients" not in state and (owned or any(map(is_factor, state))):
        step = counter(state.get("step", 0))
        state["gradients"] = step.clone()
        if group["precondition"] == "gradient":
            state["updates"] = (step - group["start_step"] + 1).clamp(min=0)


def accepted(content: Content, groups: list[Group], fixed: Group, shares: dict[Tensor, Layout]) -> Content:
    """Return a state_dict as it is taken into ``groups``, of whose options some are not the state's to say.

    Args:
        fixed: options that make the class what it is.
        shares: the blocks that this rank owns.

    Raises:
        ValueError: an option that cannot be, or parameters of other shapes or blocks; names the option, or the
            parameter by its number in the groups.
    """
    saved = list(content["param_groups"])
    for i, (theirs, mine) in enumerate(zip(saved, groups, strict=False)):
        saved[i] = adopted(theirs, mine, fixed)
    content = content | {"param_groups": saved}
    _check(content, groups, shares)
    return with_own_rows(content, groups)


def _check(content: Content, groups: list[Group], shares: dict[Tensor, Layout]) -> None:
    saved = content["param_groups"]
    if [len(g["params"]) for g in saved] != [len(g["params"]) for g in groups]:
        return  # which torch refuses
    for group in saved:
        validate_again(group)
    for number, ((p, _), (i, group)) in enumerate(zip(params_of(groups), params_of(saved), strict=True)):
        state = content["state"].get(i, {})
        for shape in {tuple(state[name].shape) for name in ("exp_avg", "exp_avg_sq") if name in state}:
            if shape != tuple(p.shape):
                raise ValueError(
                    f"parameter {number} has shape {tuple(p.shape)} here and {shape} in the state: "
                    "param groups or their parameters were in another order when it was saved"
                )
        if is_preconditioned(p, group):
            check_factors(state, p, layout_of(p, group))
            _check_parts(state, number, layout_of(p, group), shares.get(p))


def _check_parts(state: State, number: int, layout: Layout, share: Layout | None) -> None:
    """Refuse parts of factors that are of other blocks than a rank owns."""
    for name, value in state.items():
        mine = share.indices.get(shape_of(name, layout)) if share and isinstance(value, Part) else None
        if isinstance(value, Part) and value.numbers != mine:
            raise ValueError(
                f"{name} of parameter {number} is a part, of other blocks than this rank owns: load into what this "
                "optimizer's own state_dict() gives (torch.distributed.checkpoint), and that into it"
            )


def with_own_rows(content: Content, groups: list[Group]) -> Content:
    """Return a state_dict with this rank's rows of moments that were saved whole; torch compares the groups later."""
    state = dict(content["state"])
    for (i, _), (p, _) in zip(params_of(content["param_groups"]), params_of(groups), strict=False):
        if is_sharded(p):
            entries = without_factors(state.get(i, {})).items()
            whole = {k: x for k, x in entries if isinstance(x, Tensor) and not is_sharded(x) and x.shape == p.shape}
            state[i] = state.get(i, {}) | {name: distribute(value, p) for name, value in whole.items()}
    return content | {"state": state}


def restore(state: Any, content: Content, groups: list[Group]) -> None:
    """Put the factors of a loaded state, which torch has not seen, and its counters, whose type torch has changed, into
    the optimizer's. Factors stay where they are."""
    for (i, _), (p, _) in zip(params_of(content["param_groups"]), params_of(groups), strict=True):
        for name, value in content["state"].get(i, {}).items():
            if is_factor(name):
                state[p][name] = value
            elif name in COUNTERS:
                state[p][name] = counter(value)


def without_factors(state: State) -> State:
    """Return the entries of a state that are no statistics or roots."""
    return {name: value for name, value in state.items() if not is_factor(name)}


def is_divided(content: Content, *, sharded: bool) -> bool:
    """Whether a state_dict has what one rank owns of the factors. With ``sharded`` that of some ranks is nothing."""
    factors = [v for state in content["state"].values() for name, v in state.items() if is_factor(name)]
    return any(isinstance(value, Part) for value in factors) if factors else sharded


def own_parts(state: Any, groups: list[Group], shares: dict[Tensor, Layout]) -> Factors:
    """Return the factors of the blocks that this rank owns, by the number of the parameter: views, which nobody else is
    asked for."""
    found = defaultdict[int, dict[str, Tensor]](dict)
    for i, (p, group) in enumerate(params_of(groups)):
        layout = layout_of(p, group)
        for name, value in state.get(p, {}).items() if p in shares else ():
            if is_factor(name):
                shape = shape_of(name, layout)
                found[i][name] = Part.of(value, shares[p].indices[shape], len(layout.blocks[shape]))
    return found


def whole_factors(state: Any, groups: list[Group], division: Division, to: int | None) -> Factors:
    """Return the factors of all ranks of each team, by the number of the parameter, in the memory of the CPU: a
    collective operation.

    Args:
        to: the rank that wants them; None: all do. Others get nothing.
    """
    everyone, whole = dict(enumerate(params_of(groups))), defaultdict[int, dict[str, Tensor]](dict)
    numbers = {p: i for i, (p, _) in everyone.items()}
    for team, params in division.teams().items():
        if to is not None and to not in team.everyone:
            continue
        theirs = sorted(numbers[p] for p in params if p in numbers)
        if not theirs:  # all of them were taken out of the groups
            continue
        mine = {i: {k: v for k, v in state.get(everyone[i][0], {}).items() if is_factor(k)} for i in theirs}
        for i, owner, named in collected(mine, {i: everyone[i][0].device for i in theirs}, team):
            if to not in (None, dist.get_rank()):
                continue
            p, group = everyone[i]
            for name, rows in named.items():
                ranks = division.owners[p][shape_of(name, layout_of(p, group))]
                if name not in whole[i]:
                    whole[i][name] = torch.empty(len(ranks), *rows.shape[1:], dtype=rows.dtype, device="cpu")
                whole[i][name][[j for j, r in enumerate(ranks) if r == owner]] = rows.cpu()
    return whole
