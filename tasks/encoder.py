"""The parts that the three transformers share."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6  # of all layer norms, as torchvision and Flax have it
Tables = tuple[Tensor, Tensor]  # cosines and sines, [T, D / 2] each


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[j], x[j + D/2]) by its position's angle; ``x`` is ``[..., T, D]``, the tables ``[T, D/2]``.

    The product of two vectors so turned depends on their positions' difference alone.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class SelfAttention(nn.Module):
    """Multi-head self-attention.

    Args:
        width: ``w``, a multiple of ``heads``.
        dropout: probability, on attention weights.
        bias: whether the four projections have one.
    """

    def __init__(self, width: int, heads: int, dropout: float, *, bias: bool) -> None:
        super().__init__()
        # Four square matrices and no packed [3 w, w]: a matrix optimizer keeps a factor for each axis, and should
        # not mix queries, keys and values in one, which costs 9 times the memory and 27 times the root of one of w.
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)
        self.heads = heads
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Tensor | None = None, *, causal: Tables | None = None) -> Tensor:
        """Return ``[B, T, w]`` for ``x`` of that shape.

        Args:
            mask: ``[B, T]``, True where there is something to attend to.
            causal: rotary tables; with them a position attends to itself and those before it.
        """
        B, T, W = x.shape
        q, k, v = (
            layer(x).view(B, T, self.heads, W // self.heads).transpose(1, 2)  # [B, H, T, D]
            for layer in (self.query, self.key, self.value)
        )
        if causal is not None:
            q, k = rotate(q, *causal).to(v.dtype), rotate(k, *causal).to(v.dtype)
        seen = None if mask is None else mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        # fused kernels never hold the T x T scores, and skip the half above the diagonal
        y = F.scaled_dot_product_attention(q, k, v, seen, dropout, is_causal=causal is not None)
        out: Tensor = self.output(y.transpose(1, 2).reshape(B, T, W))
        return out


class EncoderBlock(nn.Module):
    """Attention, then an MLP, each normalised before and added after (pre-norm)."""

    def __init__(
        self, width: int, heads: int, dropout: float, *, activation: Callable[[Tensor], Tensor], bias: bool = True
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = SelfAttention(width, heads, dropout, bias=bias)
        self.mlp_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask))
        hidden = self.dropout(self.activation(self.up(self.mlp_norm(x))))
        x = x + self.dropout(self.down(hidden))
        return x
