"""Residual networks on images."""

from __future__ import annotations

from typing import ClassVar

import torch

from caspr_cli.recipe.schema import ResNetConf
from tasks.base import DataError
from tasks.images.task import Classification
from tasks.resnet.model import DEPTHS, ResNet

# Channels of the first stage. Below this, oneDNN writes beyond its memory in the backward pass of 1 x 1 convolutions of
# stride 2, channels last, on a CPU with AVX2 and no AVX-512 (torch 2.14.1).
NARROWEST = 8


class ResNetTask(Classification):
    """A residual network. See :class:`tasks.images.task.Classification` for data, loss and metrics."""

    heads: ClassVar[tuple[str, ...]] = ("fc",)
    conf: ResNetConf

    def __init__(self, conf: ResNetConf, seed: int) -> None:
        super().__init__(conf, seed)
        if conf.depth not in DEPTHS:
            raise DataError(f"task.depth: {conf.depth} is none of {', '.join(map(str, DEPTHS))}")
        if conf.stem not in (1, 2, 4):
            raise DataError(f"task.stem: {conf.stem} is none of 1, 2, 4")
        if conf.width < NARROWEST:
            raise DataError(f"task.width: {conf.width} is too small, it must be at least {NARROWEST}")

    def model(self) -> ResNet:
        """A fresh network, its weights channels last in memory, as convolutions on GPUs (and most CPUs) want them."""
        conf = self.conf
        model = ResNet(conf.depth, self.gallery.classes, conf.width, stem=conf.stem)
        return model.to(memory_format=torch.channels_last)
