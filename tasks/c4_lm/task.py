"""Language modelling of English: next-token cross entropy, reported as log-perplexity."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from caspr_cli.tasks.base import DataError, Task
from caspr_cli.tasks.c4_lm.data import Corpus
from caspr_cli.tasks.c4_lm.model import Decoder
from caspr_cli.tasks.c4_lm.tokens import SMALLEST_VOCABULARY
from caspr_cli.tasks.registry import C4LMConf

if TYPE_CHECKING:  # imported when a metric is made: torchmetrics takes seconds, and is not needed to check data
    from torchmetrics import Metric


class C4LM(Task):
    """A decoder language model on the standard library's English, on C4's shards, or on C4 from the hub.

    Batches are LongTensors ``[B, T + 1]``: inputs are all tokens but the last, targets all but the first. Raises
    DataError for a shape that no model has.
    """

    unit: ClassVar[str] = "tokens"

    def __init__(self, conf: C4LMConf, seed: int) -> None:
        # ``seed`` is every task's second argument; here the splits depend on names, and nothing is drawn.
        if conf.vocab_size < SMALLEST_VOCABULARY:
            raise DataError(
                f"task.vocab_size: {conf.vocab_size} is too small, it must be at least {SMALLEST_VOCABULARY} "
                "(every byte, and the end of a document)"
            )
        if conf.width % (2 * conf.heads):
            raise DataError(f"task.heads: task.width={conf.width} must be a multiple of 2 x task.heads={conf.heads}")
        self.conf = conf
        self.data: Corpus = Corpus(conf)

    def model(self) -> Decoder:
        conf = self.conf
        return Decoder(conf.vocab_size, conf.sequence, conf.layers, conf.width, conf.heads, conf.dropout)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return the mean cross entropy, in nats a token."""
        logits = model(batch[:, :-1])  # [B, T, V]
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    def metrics(self) -> Metric:
        from caspr_cli.tasks.c4_lm.metric import Perplexity

        return Perplexity(self.data.byte_lengths())

    def evaluate(self, model: nn.Module, batch: Tensor, metrics: Metric) -> None:
        metrics.update(model(batch[:, :-1]), batch[:, 1:])

    def units(self, batch: Tensor) -> int:
        """Return the number of targets in a batch."""
        return batch[:, 1:].numel()

    def train_flops(self, model: nn.Module) -> float:
        """Return 6 FLOPs a token and weight of a matrix product, and 12 layers w T a token for attention.

        The head is counted (once, though its matrix is the embedding too), the look-up of embeddings is not.
        Attention is counted whole, as is usual, although a causal kernel needs only half of it.
        """
        weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        conf = self.conf
        attention = 12 * conf.layers * conf.width * conf.sequence
        return float((6 * weights + attention) * conf.batch_size * conf.sequence)
