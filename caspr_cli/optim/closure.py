"""The part of ``step()`` that is the same in every optimizer here: a closure, as torch's optimizers take it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import overload

import torch
from torch.optim.optimizer import Optimizer


class WithClosure(Optimizer, ABC):
    """An optimizer whose step is in ``_step``, which is called without autograd."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform a single optimization step.

        Args:
            closure: re-evaluates the model and returns the loss; called once.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @abstractmethod
    def _step(self) -> None:
        """Take the step that the gradients say."""
