"""Vision transformers on images."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from caspr_cli.recipe.schema import ViTConf
from tasks.base import DataError
from tasks.images.task import Classification
from tasks.vit.model import VisionTransformer


class ViTTask(Classification):
    """A vision transformer. See :class:`tasks.images.task.Classification` for data, loss and metrics."""

    heads: ClassVar[tuple[str, ...]] = ("head",)
    conf: ViTConf

    def __init__(self, conf: ViTConf, seed: int) -> None:
        super().__init__(conf, seed)
        for key in ("patch", "layers", "width", "heads"):
            if getattr(conf, key) < 1:
                raise DataError(f"task.{key}: {getattr(conf, key)} is too small, it must be at least 1")
        if conf.size % conf.patch:
            raise DataError(f"task.patch: task.size={conf.size} must be a multiple of task.patch={conf.patch}")
        if conf.width % conf.heads:
            raise DataError(f"task.heads: task.width={conf.width} must be a multiple of task.heads={conf.heads}")
        if not 0 <= conf.dropout < 1:
            raise DataError(f"task.dropout: {conf.dropout} is not in [0, 1)")

    def model(self) -> VisionTransformer:
        """A fresh transformer."""
        conf = self.conf
        return VisionTransformer(
            conf.size, conf.patch, self.gallery.classes, conf.layers, conf.width, conf.heads, conf.dropout
        )

    def plain(self, model: nn.Module) -> dict[str, str]:
        """As every task; and the two parameters that are added and multiply nothing."""
        return super().plain(model) | {"class_token": "class token", "position": "position embedding"}
