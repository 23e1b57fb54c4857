"""Classification of images: what the two image tasks share."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import Metric

from caspr_cli.recipe.schema import Augment, ImagesConf
from tasks.base import DataError, Split, Task
from tasks.images.augment import mixup, one_hot, shift_and_mirror
from tasks.images.data import Gallery, Sample

Batch = tuple[Tensor, Tensor]  # uint8 [B, size, size, 3] and long [B]


class Accuracy(Metric):
    """``loss`` (cross entropy, nats an image), ``accuracy`` and ``top5``, over all images seen.

    ``top5`` is the share of images whose class is among the five likeliest.
    """

    full_state_update = False
    nats: Tensor
    first: Tensor
    among: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("first", "among", "images"):
            self.add_state(state, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add ``logits`` ``[B, K]`` and ``labels`` ``[B]``."""
        logits = logits.float()
        self.nats += F.cross_entropy(logits, labels, reduction="none").double().sum()
        likeliest = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # [B, 5]
        self.first += likeliest[:, 0].sum()
        self.among += likeliest.sum()
        self.images += len(labels)

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name."""
        return {
            "loss": self.nats / self.images,
            "accuracy": self.first.double() / self.images,
            "top5": self.among.double() / self.images,
        }


class Classification(Task):
    """Images to classes. A task adds :meth:`model`.

    Batches are pairs of images, uint8 ``[B, size, size, 3]``, and labels, long ``[B]``.

    Raises:
        DataError: a key that cannot be.
    """

    unit: ClassVar[str] = "images"

    def __init__(self, conf: ImagesConf, seed: int) -> None:
        # ``seed`` is every task's second argument; here what is held out hangs on the labels, and nothing is drawn.
        _check(conf)
        self.conf = conf
        self.gallery = Gallery(conf)

    def prepare(self) -> None:
        """Decode the images, or find them in the cache."""
        self.gallery.check()

    def dataset(self, split: Split) -> Dataset[Sample]:
        """Images with labels, of a split."""
        return self.gallery.dataset(split)

    def inputs(self, model: nn.Module, images: Tensor) -> Tensor:
        """The normalised images ``[B, 3, H, W]`` in the model's precision, channels last in memory."""
        mean, std = (part.to(images.device) for part in self._moments)
        x = (images / 255 - mean) / std  # [B, H, W, 3]
        return x.permute(0, 3, 1, 2).to(next(model.parameters()).dtype)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        return self.gallery.mean, self.gallery.std

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy with augmentation, mixup and smoothed labels, nats an image."""
        images, labels = batch
        if self.conf.augment is Augment.crop_flip:
            images = shift_and_mirror(images)
        x, targets = self.inputs(model, images), labels
        if self.conf.mixup:
            x, targets = mixup(x, one_hot(labels, self.gallery.classes), self.conf.mixup)
        return F.cross_entropy(model(x).float(), targets, label_smoothing=self.conf.label_smoothing)

    def metrics(self) -> Accuracy:
        """An empty :class:`Accuracy`."""
        return Accuracy()

    def evaluate(self, model: nn.Module, batch: Batch, metrics: Metric) -> None:
        """Add a batch to ``metrics``: images as they are, labels not smoothed."""
        images, labels = batch
        metrics.update(model(self.inputs(model, images)), labels)

    def units(self, batch: Batch) -> int:
        """Images in a batch."""
        return len(batch[1])

    def train_flops(self, model: nn.Module) -> float:
        """FLOPs of one global batch: three times those of the forward pass, as torch counts them of its products."""
        return 3 * self.conf.batch_size * self._forward_flops

    @cached_property
    def _forward_flops(self) -> float:
        """Of one image. Counted on a model without memory; only the kernel that spells attention out is counted."""
        size = self.conf.size
        with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.model().eval()(torch.empty(1, 3, size, size))
        return float(counter.get_total_flops())

    def describe_data(self) -> dict[str, Any]:
        """See :meth:`tasks.images.data.Gallery.describe`."""
        return self.gallery.describe()


def _check(conf: ImagesConf) -> None:
    for key in ("batch_size", "size"):
        if getattr(conf, key) < 1:
            raise DataError(f"task.{key}: {getattr(conf, key)} is too small, it must be at least 1")
    if not conf.mixup >= 0:
        raise DataError(f"task.mixup: {conf.mixup} is negative")
    if not 0 <= conf.label_smoothing < 1:
        raise DataError(f"task.label_smoothing: {conf.label_smoothing} is not in [0, 1)")
