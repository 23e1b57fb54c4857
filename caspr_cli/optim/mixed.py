"""Two rules as one optimizer: a matrix method for some parameters, AdamW for the rest.

Two optimizer objects would need two schedulers and two checkpoints, and Lightning would count each step twice.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import Optimizer

from caspr_cli.optim.closure import WithClosure


class MixedOptimizer(WithClosure):
    """Presents the param groups and the state of several optimizers as its own.

    Args:
        parts: optimizers over disjoint parameters. Their groups and state become views of this one's: a scheduler
            or ``load_state_dict`` on this object acts on them.
    """

    def __init__(self, parts: list[Optimizer]) -> None:
        self._parts = parts
        super().__init__([dict(g) for part in parts for g in part.param_groups], {})
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer stands: it cannot know which part is meant."""
        if sum(len(part.param_groups) for part in self._parts) == len(self.param_groups):
            raise ValueError("a MixedOptimizer takes no further param groups: give them to its parts when it is built")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return state | {"_parts": self._parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        start = 0
        for part in self._parts:
            stop = start + len(part.param_groups)
            part.param_groups = self.param_groups[start:stop]
            part.state = self.state
            start = stop

    def _step(self) -> None:
        for part in self._parts:
            part.step()
