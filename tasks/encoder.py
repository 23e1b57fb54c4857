"""The transformer encoder that tagger and vision transformer share."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head self-attention over all positions.

    Args:
        width: ``w``, a multiple of ``heads``.
        dropout: probability, on attention weights.
        bias: whether the four projections have one.
    """

    def __init__(self, width: int, heads: int, dropout: float, *, bias: bool) -> None:
        super().__init__()
        # Four square matrices and no packed [3 w, w]: a matrix optimizer keeps a factor for each axis, and should
        # not mix queries, keys and values in one.
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)
        self.heads = heads
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x`` is ``[B, T, w]``; ``mask`` ``[B, T]`` is True where there is something to attend to."""
        B, T, W = x.shape
        q, k, v = (
            layer(x).view(B, T, self.heads, W // self.heads).transpose(1, 2)  # [B, H, T, D]
            for layer in (self.query, self.key, self.value)
        )
        seen = None if mask is None else mask[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=self.dropout if self.training else 0.0)
        out: Tensor = self.output(y.transpose(1, 2).reshape(B, T, W))
        return out


class EncoderBlock(nn.Module):
    """Attention, then an MLP, each normalised before and added after (pre-norm)."""

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float,
        *,
        hidden: int,
        activation: Callable[[Tensor], Tensor],
        bias: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=norm_eps)
        self.attention = SelfAttention(width, heads, dropout, bias=bias)
        self.mlp_norm = nn.LayerNorm(width, eps=norm_eps)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See :meth:`SelfAttention.forward`."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask))
        hidden = self.dropout(self.activation(self.up(self.mlp_norm(x))))
        x = x + self.dropout(self.down(hidden))
        return x
