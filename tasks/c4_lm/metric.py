"""What a language model is measured by."""

import math

import torch.nn.functional as F
from torch import Tensor

from caspr_cli.tasks.metrics import Means


class Perplexity(Means):
    """Cross entropy over all targets.

    ``compute()`` gives ``loss`` (log-perplexity, nats a token), ``perplexity`` (its exponential) and
    ``bits_per_byte`` (total bits by the UTF-8 bytes of the targets, which does not depend on the tokenizer).

    Args:
        byte_lengths: bytes of each token id, LongTensor ``[V]``.
    """

    means = (("loss", "nats", "tokens"), ("bits_per_byte", "nats", "bytes"))
    nats: Tensor
    bytes: Tensor
    byte_lengths: Tensor

    def __init__(self, byte_lengths: Tensor) -> None:
        super().__init__()
        self.register_buffer("byte_lengths", byte_lengths, persistent=False)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add ``logits`` ``[B, T, V]`` and the tokens that came, ``[B, T]``."""
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        self.add(nats=losses.double().sum(), tokens=targets.numel(), bytes=self.byte_lengths[targets].sum())

    def compute(self) -> dict[str, Tensor]:
        found = super().compute()
        return found | {"perplexity": found["loss"].exp(), "bits_per_byte": self.nats / math.log(2) / self.bytes}
