"""Sums over validation and test batches, whatever batches and ranks the samples came in."""

from __future__ import annotations

from typing import ClassVar

import torch
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
