"""Classification of images: what the two image tasks share."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from caspr_cli.tasks.base import Task
from caspr_cli.tasks.images.augment import mixup, shift_and_mirror
from caspr_cli.tasks.images.data import Gallery
from caspr_cli.tasks.registry import Augment, ImagesConf

if TYPE_CHECKING:  # imported when a metric is made: torchmetrics takes seconds, and is not needed to check data
    from torchmetrics import Metric

Batch = tuple[Tensor, Tensor]  # uint8 [B, size, size, 3] and long [B]


class Classification(Task):
    """Classification of images. A task adds :meth:`model`.

    Batches are pairs of images, uint8 ``[B, size, size, 3]``, and labels, long ``[B]``.
    """

    unit: ClassVar[str] = "images"

    def __init__(self, conf: ImagesConf, seed: int) -> None:
        # ``seed`` is every task's second argument; here what is held out depends on labels, and nothing is drawn.
        self.conf = conf
        self.data: Gallery = Gallery(conf)

    def inputs(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the normalised images ``[B, 3, H, W]`` in the model's precision, channels last in memory."""
        mean, std = (part.to(images.device) for part in self.data.moments)
        x = (images / 255 - mean) / std  # [B, H, W, 3]
        return x.permute(0, 3, 1, 2).to(next(model.parameters()).dtype)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross entropy with augmentation, mixup and smoothed labels, in nats an image."""
        images, labels = batch
        if self.conf.augment is Augment.crop_flip:
            images = shift_and_mirror(images)
        x, targets = self.inputs(model, images), labels
        if self.conf.mixup:
            x, targets = mixup(x, F.one_hot(labels, self.data.classes).float(), self.conf.mixup)
        return F.cross_entropy(model(x).float(), targets, label_smoothing=self.conf.label_smoothing)

    def metrics(self) -> Metric:
        from caspr_cli.tasks.images.metric import Accuracy

        return Accuracy()

    def evaluate(self, model: nn.Module, batch: Batch, metrics: Metric) -> None:
        """Add a batch to ``metrics``: images as they are, labels not smoothed."""
        images, labels = batch
        metrics.update(model(self.inputs(model, images)), labels)

    def units(self, batch: Batch) -> int:
        return len(batch[1])

    def train_flops(self, model: nn.Module) -> float:
        """Return three times the FLOPs of the forward pass, as torch counts them of its products."""
        return 3 * self.conf.batch_size * self._forward_flops

    @cached_property
    def _forward_flops(self) -> float:
        """FLOPs for one image, counted on the meta device; of attention, only the unfused kernel can be counted."""
        size = self.conf.size
        with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.model().eval()(torch.empty(1, 3, size, size))
        return float(counter.get_total_flops())
