"""A vision transformer with torchvision's arithmetic."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caspr_cli.tasks.encoder import NORM_EPS, EncoderBlock


class VisionTransformer(nn.Module):
    """ViT of Dosovitskiy et al., ICLR 2021: learned positions, a class token, and one linear layer as head.

    It is ``torchvision.models.VisionTransformer`` but for queries, keys and values, which have a matrix each. Initial
    weights as there: patches normal by fan-in, Glorot's uniform in the blocks, positions normal of .02, head zero.
    ``patch`` divides ``size``, both pixels a side; ``width`` is a multiple of ``heads``. ``dropout`` is of embeddings,
    attention weights and whatever is added to the residual stream.
    """

    def __init__(
        self, size: int, patch: int, classes: int, layers: int, width: int, heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, (size // patch) ** 2 + 1, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, dropout, activation=F.gelu) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, classes)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.patches.weight, std=1 / math.sqrt(self.patches.weight[0].numel()))
        nn.init.zeros_(self.patches.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.position, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, classes]`` of ``images`` ``[B, 3, size, size]``."""
        x = self.patches(images).flatten(2).mT  # [B, T, w]
        x = torch.cat((self.class_token.expand(len(x), -1, -1), x), dim=1)
        x = self.dropout(x + self.position)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits
