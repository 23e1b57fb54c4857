"""Means over validation and test batches, whatever batches and ranks the samples came in."""

from collections.abc import Mapping

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
        return {name: getattr(self, above) / getattr(self, below) for name, above, below in self.means}


class Measures(Means):
    """The mean of each measure over all samples."""

    def __init__(self, names: tuple[str, ...]) -> None:
        # prefixed: a measure may have the name of a method
        self.means = tuple((name, f"sum_{name}", "sum_samples") for name in names)
        super().__init__()

    def update(self, means: Mapping[str, Tensor], samples: int) -> None:
        """Add the means over a batch."""
        self.add(sum_samples=samples)
        self.add(**{total: means[name].detach().double() * samples for name, total, _ in self.means})
