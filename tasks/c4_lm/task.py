"""Language modelling of English: next-token cross entropy, reported as log-perplexity."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from caspr_cli.recipe.schema import C4LMConf
from tasks.base import DataError, Split, Task
from tasks.c4_lm.data import Corpus, Windows
from tasks.c4_lm.model import Decoder
from tasks.c4_lm.tokens import SMALLEST_VOCABULARY


class Perplexity(Metric):
    """Cross entropy over all targets seen, whatever the batches they came in.

    ``compute()`` gives ``loss`` (log-perplexity, nats a token), ``perplexity`` (its exponential) and
    ``bits_per_byte`` (total bits by the UTF-8 bytes of the targets, which does not depend on the tokenizer).

    Args:
        byte_lengths: bytes of each token id, LongTensor ``[V]``.
    """

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor
    byte_lengths: Tensor

    def __init__(self, byte_lengths: Tensor) -> None:
        super().__init__()
        self.register_buffer("byte_lengths", byte_lengths, persistent=False)
        for state in ("nats", "tokens", "bytes"):
            # float64: a float32 sum stops counting single tokens at 2^24
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add ``logits`` ``[B, T, V]`` and the tokens that came, ``[B, T]``."""
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        self.nats += losses.double().sum()
        self.tokens += targets.numel()
        self.bytes += self.byte_lengths[targets].sum()

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name."""
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "perplexity": loss.exp(),
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
        }


class C4LM(Task):
    """A decoder language model on the standard library's English, on C4's shards, or on C4 from the hub.

    Batches are LongTensors ``[B, T + 1]``: inputs are all tokens but the last, targets all but the first.

    Raises:
        DataError: a shape that no model has.
    """

    unit: ClassVar[str] = "tokens"

    def __init__(self, conf: C4LMConf, seed: int) -> None:
        # ``seed`` is every task's second argument; here the splits hang on names, and nothing is drawn.
        _check(conf)
        self.conf = conf
        self._corpus = Corpus(conf)

    def prepare(self) -> None:
        """Build the tokenizer and the token files, or find them in the cache."""
        self._corpus.check()

    def dataset(self, split: Split) -> Windows:
        """Windows of ``T + 1`` tokens of a split."""
        return self._corpus.windows(split)

    def model(self) -> Decoder:
        """A fresh decoder."""
        conf = self.conf
        return Decoder(conf.vocab_size, conf.sequence, conf.layers, conf.width, conf.heads, conf.dropout)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean cross entropy, nats a token."""
        logits = model(batch[:, :-1])  # [B, T, V]
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    def metrics(self) -> Perplexity:
        """An empty :class:`Perplexity`."""
        return Perplexity(self._corpus.byte_lengths())

    def evaluate(self, model: nn.Module, batch: Tensor, metrics: Metric) -> None:
        """Add a batch to ``metrics``."""
        metrics.update(model(batch[:, :-1]), batch[:, 1:])

    def units(self, batch: Tensor) -> int:
        """Targets in a batch."""
        return batch[:, 1:].numel()

    def train_flops(self, model: nn.Module) -> float:
        """FLOPs of one global batch: 6 a token and weight of a matrix product, and 12 layers w T a token for attention.

        The head is counted (once, though its matrix is the embedding too), the look-up of embeddings is not.
        Attention is counted whole, as is usual, although a causal kernel needs only half of it.
        """
        weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        conf = self.conf
        attention = 12 * conf.layers * conf.width * conf.sequence
        return float((6 * weights + attention) * conf.batch_size * conf.sequence)

    def describe_data(self) -> dict[str, Any]:
        """See :meth:`tasks.c4_lm.data.Corpus.describe`."""
        return self._corpus.describe()


def _check(conf: C4LMConf) -> None:
    for key in ("sequence", "layers", "width", "heads", "batch_size"):
        if getattr(conf, key) < 1:
            raise DataError(f"task.{key}: {getattr(conf, key)} is too small, it must be at least 1")
    for key in ("train_documents", "eval_documents"):
        if getattr(conf, key) is not None and getattr(conf, key) < 1:
            raise DataError(f"task.{key}: {getattr(conf, key)} is too small, it must be at least 1, or null for all")
    if conf.vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"task.vocab_size: {conf.vocab_size} is too small, it must be at least {SMALLEST_VOCABULARY} "
            "(every byte, and the end of a document)"
        )
    if conf.width % (2 * conf.heads):
        raise DataError(f"task.heads: task.width={conf.width} must be a multiple of 2 x task.heads={conf.heads}")
    if not 0 <= conf.dropout < 1:
        raise DataError(f"task.dropout: {conf.dropout} is not in [0, 1)")
