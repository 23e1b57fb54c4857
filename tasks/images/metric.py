"""What image classification is measured by."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from caspr_cli.tasks.metrics import Sums


class Accuracy(Sums):
    """Cross entropy and accuracy over all images.

    ``compute()`` gives ``loss`` (nats an image), ``accuracy`` and ``top5``, the share of images whose class is among
    the five likeliest.
    """

    sums = ("nats", "first", "among", "images")
    nats: Tensor
    first: Tensor
    among: Tensor
    images: Tensor

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add ``logits`` ``[B, K]`` and ``labels`` ``[B]``."""
        logits = logits.float()
        self.nats += F.cross_entropy(logits, labels, reduction="none").double().sum()
        likeliest = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # [B, 5]
        self.first += likeliest[:, 0].sum()
        self.among += likeliest.sum()
        self.images += len(labels)

    def compute(self) -> dict[str, Tensor]:
        """Return the scalars by name."""
        return {
            "loss": self.nats / self.images,
            "accuracy": self.first / self.images,
            "top5": self.among / self.images,
        }
