"""What image classification is measured by."""

import torch.nn.functional as F
from torch import Tensor

from caspr_cli.tasks.metrics import Means


class Accuracy(Means):
    """Cross entropy and accuracy over all images.

    ``compute()`` gives ``loss`` (nats an image), ``accuracy`` and ``top5``, the share of images whose class is among
    the five likeliest.
    """

    means = (("loss", "nats", "images"), ("accuracy", "first", "images"), ("top5", "among", "images"))

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add ``logits`` ``[B, K]`` and ``labels`` ``[B]``."""
        logits = logits.float()
        nats = F.cross_entropy(logits, labels, reduction="none").double().sum()
        likeliest = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # [B, 5]
        self.add(nats=nats, first=likeliest[:, 0].sum(), among=likeliest.sum(), images=len(labels))
