"""Vision transformers on images."""

from typing import ClassVar

from torch import nn

from caspr_cli.tasks.base import DataError
from caspr_cli.tasks.images.task import Classification
from caspr_cli.tasks.registry import ViTConf
from caspr_cli.tasks.vit.model import VisionTransformer


class ViTTask(Classification):
    """A vision transformer. See :class:`caspr_cli.tasks.images.task.Classification` for data, loss and metrics."""

    heads: ClassVar[tuple[str, ...]] = ("head",)
    conf: ViTConf

    def __init__(self, conf: ViTConf, seed: int) -> None:
        super().__init__(conf, seed)
        if conf.size % conf.patch:
            raise DataError(f"task.patch: task.size={conf.size} must be a multiple of task.patch={conf.patch}")
        if conf.width % conf.heads:
            raise DataError(f"task.heads: task.width={conf.width} must be a multiple of task.heads={conf.heads}")

    def model(self) -> VisionTransformer:
        conf = self.conf
        return VisionTransformer(
            conf.size, conf.patch, self.data.classes, conf.layers, conf.width, conf.heads, conf.dropout
        )

    def plain(self, model: nn.Module) -> dict[str, str]:
        """Leave to AdamW also the two parameters that are added to activations and multiply nothing."""
        return super().plain(model) | {"class_token": "class token", "position": "position embedding"}
