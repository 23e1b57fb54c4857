"""A step on a GPU that does not wait for it: which gradients are finite is known there alone.

Of a tensor whose gradient is not finite, moments, counters and weights stay as they are, by masks on the device. The
host counts gradients that were given, for the turns of roots; the device counts those that were used, for the bias.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from caspr_cli.optim.fsdp import local
from caspr_cli.optim.graft import are_alike, direction, look_ahead, needs_second_moment, rate
from caspr_cli.optim.options import Group
from caspr_cli.optim.scatter import Workspace, add


def is_masked(params: list[Tensor]) -> bool:
    """Whether a step of these parameters asks the device nothing: those of one GPU."""
    devices = {p.device for p in params}
    return len(devices) == 1 and next(iter(devices)).type == "cuda"


@dataclass(frozen=True)
class Mask:
    """Which gradients of a param group are finite, and how many of each tensor were; on the device."""

    place: dict[int, int]  # of a parameter, by its id
    finite: Tensor  # [n], bool
    broken: Tensor  # and the other way round
    used: list[Tensor]  # n times 0-d: 1 where it is finite, else 0
    skipped: list[Tensor]  # and the other way round
    bias: dict[float, Tensor]  # by beta, [n], float64: 1 - beta^t, where t counts gradients that were finite
    workspace: Workspace

    @classmethod
    def of(
        cls,
        finite: Tensor,
        params: list[Tensor],
        state: Any,
        counted: list[Tensor],
        betas: tuple[float, float],
        workspace: Workspace,
    ) -> Mask:
        """Count this step, and make a mask.

        Args:
            finite: ``[n]``, of the gradients of these parameters.
            counted: those that count gradients.
        """
        broken = ~finite
        used, skipped = list(finite.float().unbind()), list(broken.float().unbind())
        place = dict(zip(map(id, params), itertools.count(), strict=False))
        steps = [state[p]["step"] for p in params]
        torch._foreach_add_(steps, used)
        torch._foreach_add_([state[p]["skipped"] for p in params], skipped)
        if counted:
            torch._foreach_add_([state[p]["gradients"] for p in counted], [used[place[id(p)]] for p in counted])
        t = torch.stack(steps).double()
        bias = {beta: (1 - beta**t).masked_fill_(t == 0, 1) for beta in betas}
        return cls(place, finite, broken, used, skipped, bias, workspace)

    def of_params(self, values: Tensor, params: list[Tensor]) -> Tensor:
        """Return those of ``values`` ``[n]`` that are of these parameters."""
        return self.workspace.chosen(values, [self.place[id(p)] for p in params])

    def is_finite(self, params: list[Tensor]) -> Tensor:
        """Return ``[k]``, bool."""
        return self.of_params(self.finite, params)

    def bias_of(self, beta: float, params: list[Tensor]) -> Tensor:
        """Return 1 - beta^t ``[k]`` of these parameters, 1 where nothing has been counted yet."""
        return self.of_params(self.bias[beta], params)

    def count_updates(
        self, counters: list[Tensor], params: list[Tensor], beta: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Count the updates of these parameters, and return what multiplies their momentum, and its bias.

        Until the first update it was the diagonal method's, and is zero from then on. That of a broken one stays, and
        the infinite bias keeps the weights where they are.
        """
        finite = self.is_finite(params)
        torch._foreach_add_(counters, [self.used[self.place[id(p)]] for p in params])
        ages = torch.stack(counters).double()
        kept = torch.where(finite, (ages != 1).double() * beta, 1)
        bias = torch.where(finite, 1 - beta**ages, math.inf)
        return list(kept.unbind()), list(bias.unbind())

    def decay(self, group: Group, params: list[Tensor]) -> list[Tensor]:
        """Return what decay multiplies each of these parameters by."""
        return self._kept(1 - rate(group) * group["weight_decay"], params)

    def _kept(self, factor: float | Tensor, params: list[Tensor]) -> list[Tensor]:
        """Return the factor of each of these parameters, 0-d, and 1 for broken ones."""
        finite = self.is_finite(params)
        return list(torch.where(finite, factor, torch.ones_like(finite, dtype=torch.float64)).unbind())

    def _zero(self, dtype: torch.dtype) -> Tensor:
        """Return 0 as a 0-d tensor on the device. torch.where would make one of a number each time, a launch."""
        return self.workspace.constant([0.0], dtype, self.finite.device)[0]

    def update_moments(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avg: list[Tensor],
        exp_avg_sq: list[Tensor],
        betas: tuple[float, float],
    ) -> None:
        """Update momenta and second moments, where there are any."""
        finite = self.is_finite(params).unbind()
        if exp_avg:  # one that is averaged with itself stays as it is, to the last bit
            new = [torch.where(yes, G, M) for yes, G, M in zip(finite, grads, exp_avg, strict=True)]
            torch._foreach_lerp_(exp_avg, new, 1 - betas[0])
        if exp_avg_sq:
            zero = self._zero(grads[0].dtype)
            clean = [torch.where(yes, G, zero) for yes, G in zip(finite, grads, strict=True)]
            torch._foreach_mul_(exp_avg_sq, self._kept(betas[1], params))
            torch._foreach_addcmul_(exp_avg_sq, clean, clean, value=1 - betas[1])

    def fused_adamw(
        self,
        params: list[Tensor],
        into: list[Tensor],
        grads: list[Tensor],
        exp_avg: list[Tensor],
        exp_avg_sq: list[Tensor],
        state: Any,
        group: Group,
        *,
        lr: float | Tensor,
        weight_decay: float,
    ) -> None:
        """Take AdamW's step of these parameters on ``into``, one launch each, which leaves a broken one as it is.

        Args:
            into: what is here of them, as of the others.
        """
        for p, P, G, m, v in zip(params, into, grads, exp_avg, exp_avg_sq, strict=True):
            torch._fused_adamw_(
                [P], [G], [m], [v], [], [state[p]["step"]],
                lr=lr, beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=weight_decay,
                eps=group["graft_eps"], amsgrad=False, maximize=False, found_inf=self.skipped[self.place[id(p)]],
            )  # fmt: skip

    def diagonal_step(
        self, params: list[Tensor], grads: list[Tensor], state: Any, group: Group, graft: str, *, nesterov: bool
    ) -> None:
        """Do as :func:`caspr_cli.optim.graft.diagonal_step`."""
        (beta1, beta2), lr = group["betas"], rate(group)
        exp_avg = [local(state[p]["exp_avg"]) for p in params]
        exp_avg_sq = [local(state[p]["exp_avg_sq"]) for p in params] if needs_second_moment(graft) else []
        here = [local(p) for p in params]
        if graft == "adam" and not nesterov and are_alike(here, grads, exp_avg, exp_avg_sq):
            decay = group["weight_decay"]
            self.fused_adamw(params, here, grads, exp_avg, exp_avg_sq, state, group, lr=lr, weight_decay=decay)
            return
        self.update_moments(params, grads, exp_avg, exp_avg_sq, (beta1, beta2))
        ahead = look_ahead(exp_avg, grads, beta1) if nesterov else exp_avg
        D = self.direction(params, self.corrected(ahead, params, beta1), exp_avg_sq, group, graft)
        if group["weight_decay"]:
            torch._foreach_mul_(here, self.decay(group, params))
        finite, zero = self.is_finite(params).unbind(), self._zero(D[0].dtype)
        add(here, [torch.where(yes, d, zero) for yes, d in zip(finite, D, strict=True)], -lr)

    def corrected(self, moments: list[Tensor], params: list[Tensor], beta: float) -> list[Tensor]:
        """Return the moments of these parameters, their bias corrected."""
        return [M / b for M, b in zip(moments, self.bias_of(beta, params).unbind(), strict=True)]

    def direction(
        self, params: list[Tensor], ahead: list[Tensor], exp_avg_sq: list[Tensor], group: Group, graft: str
    ) -> list[Tensor]:
        """Return the graft's step over the learning rate, of momenta whose bias is corrected, or of gradients."""
        beta2 = group["betas"][1]
        if graft == "adam":  # whose moments' bias "rmsprop" leaves as it is
            exp_avg_sq = self.corrected(exp_avg_sq, params, beta2)
        return direction("rmsprop" if graft == "adam" else graft, ahead, exp_avg_sq, [], beta2, group["graft_eps"])
