"""Sums over validation and test batches, whatever batches and ranks the samples came in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric


class Sums(Metric):
    """A metric of scalars that are added up over batches and ranks. A class names them in :attr:`sums`."""

    full_state_update = False
    sums: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        super().__init__()
        for name in self.sums:
            # float64: a float32 sum stops counting single samples at 2^24
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")


class Means(Metric):
    """Means over all samples, whatever batches and ranks they came in."""

    full_state_update = False
    sum_samples: Tensor

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        for name in (*names, "samples"):
            self.add_state(f"sum_{name}", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, means: Mapping[str, Tensor], samples: int) -> None:
        """Add the means over a batch."""
        for name in self.names:
            setattr(self, f"sum_{name}", getattr(self, f"sum_{name}") + means[name].detach().double() * samples)
        self.sum_samples += samples

    def compute(self) -> dict[str, Tensor]:
        """Return the scalars by name."""
        return {name: getattr(self, f"sum_{name}") / self.sum_samples for name in self.names}
