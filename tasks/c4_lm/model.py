"""A decoder-only transformer language model."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caspr_cli.tasks.encoder import SelfAttention, Tables


def rotary_tables(length: int, size: int) -> Tables:
    """Return cosines and sines of the rotary angles, ``[length, size / 2]`` each (Su et al., RoFormer, eq. 15)."""
    frequencies = 10_000.0 ** (-torch.arange(0, size, 2) / size)  # [size / 2]
    angles = torch.outer(torch.arange(length), frequencies)
    return angles.cos(), angles.sin()


class Block(nn.Module):
    """Attention, then a 4 times wider MLP, each normalised before and added after (pre-norm)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = SelfAttention(width, heads, dropout, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), causal=tables))
        x = x + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))))
        return x


class Decoder(nn.Module):
    """Pre-norm decoder with RoPE, RMSNorm, GELU and no biases; the output head is the embedding itself.

    It has ``V w + 12 w^2 layers + (2 layers + 1) w`` parameters. Initial weights as in GPT-2: normal of standard
    deviation .02, in what writes to the residual stream divided by ``sqrt(2 layers)``, so that the stream's
    variance does not grow with depth.

    Args:
        vocab_size: ``V``, types of token.
        sequence: longest input, in tokens.
        layers: blocks.
        width: of the residual stream; a multiple of ``2 heads`` (a head turns its columns in pairs).
        heads: of each attention.
        dropout: probability, on embeddings, attention weights and whatever is added to the residual stream.
    """

    def __init__(
        self, vocab_size: int, sequence: int, layers: int, width: int, heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        # shared by all blocks; not persistent: they follow from the shapes, so no checkpoint need hold them
        cos, sin = rotary_tables(sequence, width // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.cos: Tensor
        self.sin: Tensor
        self._init_weights()

    def _init_weights(self) -> None:
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * len(self.blocks)) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[B, T, V]`` of the token after each of ``tokens`` ``[B, T]``, ``T`` at most ``sequence``."""
        T = tokens.shape[1]
        x = self.dropout(self.embedding(tokens))  # [B, T, w]
        for block in self.blocks:
            x = block(x, (self.cos[:T], self.sin[:T]))
        # Most of a small model's time and memory goes here: V is much larger than w.
        return F.linear(self.norm(x), self.embedding.weight)
