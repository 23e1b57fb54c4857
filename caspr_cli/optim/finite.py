"""Which gradients a step can use."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import torch
from torch import Tensor

from caspr_cli.optim.device import Question
from caspr_cli.optim.fsdp import is_sharded
from caspr_cli.optim.graft import frobenius, graft_of, needs_second_moment
from caspr_cli.optim.options import Group, factor_dtype
from caspr_cli.optim.scatter import Workspace
from caspr_cli.optim.shard import summed


class Finite:
    """Which of some gradients are finite. The device is asked at once, and the answer is read later.

    Reading waits for what was queued before the question, and not for what came after it.

    A gradient counts with those that are not if it is infinite in the type of the statistics, or its square in that of
    a second moment, which would be so for ever after. That holds for a whole group, also for a tensor without one
    (``graft="rms"``), as its momentum would remember such a gradient for hundreds of steps. (But in float16, of which
    the latter is true of any gradient above 256.)
    """

    def __init__(
        self, grads: dict[Tensor, Tensor], group: Group, known: dict[Tensor, Tensor], workspace: Workspace, *, ask: bool
    ) -> None:
        """
        Args:
            known: the norms of gradients of which only some rows are on this rank.
            ask: whether :meth:`others` will be called.
        """
        self._norms: dict[torch.device, list[Tensor]] = {}  # Frobenius, float64; infinite or NaN where it is not finite
        self._place: dict[int, int] = {}  # of a parameter's norm among those of its device, by its id
        self._answers: list[tuple[list[Tensor], Question]] = []
        self._workspace = workspace
        kinds: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = defaultdict(list)
        for p in grads:
            kinds[p.device, p.dtype, bool(known) and p in known].append(p)
        for (device, dtype, is_known), params in kinds.items():
            norms = torch.stack([known[p] for p in params]) if is_known else frobenius([grads[p] for p in params])
            limit = torch.finfo(factor_dtype(params[0], group)).max
            if needs_second_moment(graft_of(group, preconditioned=False)) and dtype != torch.float16:
                limit = min(limit, math.sqrt(torch.finfo(dtype).max))
            norms = norms.masked_fill(norms > limit, torch.inf)
            earlier = self._norms.setdefault(device, [])
            self._place |= zip(map(id, params), itertools.count(sum(map(len, earlier))), strict=False)
            earlier.append(norms)
            if ask and device.type != "meta":  # which has shapes and no numbers
                self._answers.append((params, Question(~torch.isfinite(norms))))

    def norms(self, params: list[Tensor]) -> Tensor:
        """Return the norms ``[n]`` of the gradients of these parameters, which are on one device."""
        device = params[0].device
        if len(self._norms[device]) > 1:
            self._norms[device] = [torch.cat(self._norms[device])]
        return self._workspace.chosen(self._norms[device][0], [self._place[id(p)] for p in params])

    def others(self) -> list[Tensor]:
        """Return the parameters whose gradient is not finite. Waits for the device."""
        return [p for params, asked in self._answers for p, yes in zip(params, asked.answer(), strict=True) if yes]


def norms_of_rows(rows: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Return the Frobenius norms of tensors of which each rank has some rows: a collective operation."""
    squares = {p: frobenius([G])[0].square() for p, G in rows.items() if is_sharded(p)}
    return {p: total.sqrt() for p, total in summed(squares).items()}
