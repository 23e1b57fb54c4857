"""Schedule-Free AdamW whose training goes on from the very weights it had before an evaluation."""

from __future__ import annotations

import torch
from pytorch_optimizer import ScheduleFreeAdamW


class ScheduleFree(ScheduleFreeAdamW):
    """Schedule-Free AdamW (arXiv:2405.15682) in the form of its authors' code since version 1.3.

    The paper's Algorithm 1 has ``sqrt(1 - beta2**t)`` in the learning rate; here it corrects the second moment alone.
    The learning rate of a group may rise from step to step, but not fall: an average of the weights replaces the decay.

    :meth:`eval` puts the averaged weights into the parameters, :meth:`train` puts those of training back. The parent
    computes the latter from the average, and rounding makes them others: how often a run validates, or where it was cut
    off, would change it. Here they are kept until then, as ``y`` of their group, which is part of ``state_dict()``.
    """

    @torch.no_grad()
    def eval(self) -> None:
        """Put the averaged weights into the parameters."""
        for group in self.param_groups:
            if group["train_mode"]:
                group["y"] = [p.detach().clone() for p in group["params"]]
                for p in group["params"]:
                    if "z" in (state := self.state.get(p, {})):
                        p.lerp_(state["z"].to(p.device), 1 - 1 / group["betas"][0])
            group["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Put the weights of training back into the parameters."""
        for group in self.param_groups:
            if not group["train_mode"]:
                for p, y in zip(group["params"], group.pop("y"), strict=True):
                    p.copy_(y)
            group["train_mode"] = True
