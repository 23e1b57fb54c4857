"""New roots for the blocks that are due, and whether they are taken.

A root is accepted if it is finite and its recomputed residual is small. Otherwise the old one stays, the block's
damping is ten times as large at its next turn (and falls again with each success), and a counter rises. Nothing raises.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from caspr_cli.optim.combine import root_exponent
from caspr_cli.optim.eigenbasis import turn
from caspr_cli.optim.options import Group
from caspr_cli.optim.roots import bound
from caspr_cli.optim.solve import Problem, Solution, solve_all
from caspr_cli.optim.stacks import RowIndex, Stack

ACCEPTED = 0.1  # residual of an accepted root, where rounding allows it
MOST_RETRIES = 24  # times that damping is raised
# Numbers in the statistics that are decomposed at once, for each thread of a CPU, and on another device: bounds the
# memory.
BATCH, BATCH_ON_DEVICE = 2**22, 2**25

Due = list[tuple[Stack, list[int]]]  # rows of a stack, ascending


def refresh(due: Due, group: Group) -> None:
    """Compute the roots of these rows from their statistics, in place."""
    on_cpu = due[0][0].scale.device.type == "cpu"
    room = most = torch.get_num_threads() * BATCH if on_cpu else BATCH_ON_DEVICE
    batch: Due = []
    for stack, rows in _apart(due):
        size = sum(d * d for d in stack.sizes)
        while rows:
            count = min(len(rows), max(1, room // size))
            batch.append((stack, rows[:count]))
            rows, room = rows[count:], room - count * size
            if rows or room < size:
                _refresh(batch, group)
                batch, room = [], most
    if batch:
        _refresh(batch, group)


def keep_roots_of(options: tuple[Any, ...], group: Group, stacks: list[Stack], state: Any) -> None:
    """Forget roots of other options; a group says which its roots are of.

    Those of parameters that are in no stack yet, as they have had no gradient since they were loaded, are in ``state``.
    """
    if tuple(group["roots_of"]) != options:
        for stack in stacks:
            stack.forget_roots()
        known = {p for stack in stacks for p in stack.members}
        for entries in (state[p] for p in group["params"] if p not in known and p in state):
            for name in [name for name in entries if name.startswith(("root_", "share_"))]:
                del entries[name]
    group["roots_of"] = options


def _apart(due: Due) -> Due:
    """Return the same, with rows that have eigenvectors, from which a solver may go on, apart from the others."""
    found = []
    for stack, rows in due:
        if not stack.storage.measured:
            found.append((stack, rows))
            continue
        parts = [[row for row in rows if (row in stack.based) is based] for based in (False, True)]
        found += [(stack, part) for part in parts if part]
    return found


def _refresh(due: Due, group: Group) -> None:
    work = [(stack, stack.index(rows), _problems(stack, rows, group)) for stack, rows in due]
    solutions = iter(solve_all([problem for *_, problems in work for problem in problems], group["solver"]))
    for stack, at, problems in work:
        _take(stack, at, problems, [next(solutions) for _ in problems], group)


def _take(stack: Stack, at: RowIndex, problems: list[Problem], solutions: list[Solution], group: Group) -> None:
    """Keep the roots of all axes of these blocks where those of all of them are good."""
    before = [stack.root(place, at, stack.storage.dtype).clone() for place in range(len(stack.values))]
    accepted = torch.stack(
        [solution.residual <= bound(solution.root.condition, solution.root.A.dtype, ACCEPTED) for solution in solutions]
    ).all(0)
    for place, (problem, solution) in enumerate(zip(problems, solutions, strict=True)):
        stack.store(place, at, solution.root, accepted)
        stack.remember_shares(place, at, problem.S, solution.root.shift, accepted)
    unit = problems[0].unit
    # Under relative damping a block without statistics has no scale yet; see Stack.input_scale().
    scale = torch.where(stack.scale[at] > 0, unit, 0) if group["damping"] == "relative" else unit
    stack.root_scale[at] = torch.where(accepted, scale, stack.root_scale[at])
    if stack.V is not None:
        turn(stack, at, before, group)
    retries = stack.retries[at]
    stack.retries[at] = torch.where(accepted, retries - 1, retries + 1).clamp(0, MOST_RETRIES)
    stack.rejected[at] += (~accepted).to(stack.rejected.dtype)


def _problems(stack: Stack, rows: list[int], group: Group) -> list[Problem]:
    """Return a problem for each axis of these rows."""
    at, p = stack.index(rows), root_exponent(group["order"], len(stack.axes), group["exponent"])
    places = range(len(stack.axes))
    last: list[Tensor | None] = [None for _ in places]
    if stack.storage.measured:
        p = 0
        if stack.based.issuperset(rows):
            last = [stack.root(place, at, stack.storage.dtype) for place in places]
        stack.based.update(rows)
    unit, eps = stack.unit(group)[at], damping_of(stack, group)[at]
    condition = 1 + 1 / group["eps"] if group["damping"] == "relative" else math.inf
    return [
        Problem(stack.statistics(place, at, group), unit, eps, group["damping"], p, condition, last[place])
        for place in places
    ]


def damping_of(stack: Stack, group: Group) -> Tensor:
    """Return ``[K]``, float64: eps of each block, ten times as large for each refusal in a row."""
    eps: Tensor = group["eps"] * torch.full_like(stack.retries, 10, dtype=torch.float64).pow(stack.retries)
    return eps.clamp(max=max(1.0, group["eps"])) if group["damping"] == "relative" else eps
