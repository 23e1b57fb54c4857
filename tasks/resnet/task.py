"""Residual networks on images."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from caspr_cli.tasks.base import DataError
from caspr_cli.tasks.images.task import Classification
from caspr_cli.tasks.registry import ResNetConf
from caspr_cli.tasks.resnet.model import DEPTHS, ResNet

# From so many channels on, convolutions are channels last. With fewer, oneDNN (torch 2.14.1, on CPUs with AVX2 alone)
# writes beyond its memory in the backward pass of a 1 x 1 convolution with stride 2.
CHANNELS_LAST = 8


class ResNetTask(Classification):
    """A residual network. See :class:`caspr_cli.tasks.images.task.Classification` for data, loss and metrics."""

    heads: ClassVar[tuple[str, ...]] = ("fc",)
    conf: ResNetConf

    def __init__(self, conf: ResNetConf, seed: int) -> None:
        super().__init__(conf, seed)
        if conf.depth not in DEPTHS:
            raise DataError(f"task.depth: {conf.depth} is none of {', '.join(map(str, DEPTHS))}")
        if conf.stem not in (1, 2, 4):
            raise DataError(f"task.stem: {conf.stem} is none of 1, 2, 4")

    def model(self) -> ResNet:
        """Return a fresh network, its weights channels last in memory, as convolutions on most devices want them."""
        model = ResNet(self.conf.depth, self.data.classes, self.conf.width, stem=self.conf.stem)
        return model.to(memory_format=self._memory)

    def inputs(self, model: nn.Module, images: Tensor) -> Tensor:
        return super().inputs(model, images).contiguous(memory_format=self._memory)

    @property
    def _memory(self) -> torch.memory_format:
        return torch.channels_last if self.conf.width >= CHANNELS_LAST else torch.contiguous_format
