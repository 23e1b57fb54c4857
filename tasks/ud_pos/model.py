"""A transformer encoder that tags the words of a sentence."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caspr_cli.tasks.encoder import NORM_EPS, EncoderBlock
from caspr_cli.tasks.ud_pos.data import PADDING

CHARACTER = 32  # width of a character's embedding
REACH = 5  # characters that one filter sees


def sinusoids(length: int, width: int) -> Tensor:
    """Return sines and cosines of geometric wavelengths, ``[length, width]`` (Vaswani et al. 2017, 3.5)."""
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2) / width)  # [width / 2]
    angles = torch.outer(torch.arange(length), frequencies)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class Spelling(nn.Module):
    """A vector from a word's characters: filters over neighbouring characters, and where each answers most.

    (Ma and Hovy 2016, 2.1.) The filters see the word's two ends, so one that ends in END is a suffix.
    """

    def __init__(self, alphabet: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, CHARACTER, padding_idx=PADDING)
        self.filters = nn.Conv1d(CHARACTER, width, REACH, padding=REACH // 2)

    def forward(self, characters: Tensor) -> Tensor:
        """Return ``[U, width]`` for ``characters`` ``[U, C]``, padded; the result does not depend on the padding."""
        answers = self.filters(self.embedding(characters).transpose(1, 2))  # [U, width, C]
        answers = answers.masked_fill((characters == PADDING)[:, None], -torch.inf)
        return F.relu(answers.amax(dim=2))  # a row of padding alone, which no word is, gives 0


class Tagger(nn.Module):
    """Pre-norm encoder with ELU, sinusoidal positions and no biases in attention.

    At 6 layers of 512 it has ``18,903,040 + 512 vocab_size + 513 tags`` parameters: the tagger of Flax's nlp_seq
    example. Initial weights as there: matrices Xavier-uniform, biases 0, embeddings normal with variance ``1 / width``.
    ``alphabet`` is the number of character ids; None: words have no spelling. ``width`` is even, and a multiple of
    ``heads``. ``dropout`` is of embeddings, attention weights and whatever is added to the residual stream.
    """

    def __init__(
        self,
        vocab_size: int,
        tags: int,
        max_length: int,
        *,
        alphabet: int | None,
        layers: int,
        width: int,
        heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=PADDING)
        self.spelling = None if alphabet is None else Spelling(alphabet, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            EncoderBlock(width, heads, dropout, activation=F.elu, bias=False) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, tags)
        # not persistent: they follow from the shapes, so no checkpoint need hold them
        self.register_buffer("positions", sinusoids(max_length, width), persistent=False)
        self.positions: Tensor
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
                with torch.no_grad():
                    module.weight[PADDING] = 0

    def forward(self, words: Tensor, spellings: Tensor | None = None, spelled: Tensor | None = None) -> Tensor:
        """Return logits ``[B, T, tags]``; the arguments are those of :func:`caspr_cli.tasks.ud_pos.data.batch_of`."""
        x = self.embedding(words)  # [B, T, w]
        if self.spelling is not None:
            assert spellings is not None
            assert spelled is not None
            x = x + F.embedding(spelled, self.spelling(spellings))
        x = self.dropout(x) + self.positions[: words.shape[1]]
        real = words != PADDING
        for block in self.blocks:
            x = block(x, real)
        logits: Tensor = self.head(self.norm(x))
        return logits
