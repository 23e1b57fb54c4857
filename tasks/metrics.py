"""Means over validation and test batches, whatever batches and ranks the samples came in."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Means(Metric):
    """A metric of sums over batches and ranks, and their quotients.

    Attributes:
        means: name of each scalar of ``compute()``, of a sum, and of the sum that divides it. Sums are attributes.
    """

    full_state_update = False
    means: tuple[tuple[str, str, str], ...]

    def __init__(self) -> None:
        super().__init__()
        for name in dict.fromkeys(name for _, *sums in self.means for name in sums):  # in one order on all ranks
            # float64: a float32 sum stops counting single samples at 2^24
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, **terms: Tensor | int) -> None:
        """Add to sums, by their names."""
        for name, term in terms.items():
            setattr(self, name, getattr(self, name) + term)

    def compute(self) -> dict[str, Tensor]:
        """Return the scalars by name."""
        return {name: getattr(self, above) / getattr(self, below) for name, above, below in self.means}
