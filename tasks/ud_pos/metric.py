"""What tagging is measured by."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from caspr_cli.tasks.metrics import Sums
from caspr_cli.tasks.ud_pos.data import UNKNOWN, UNSEEN, UNTAGGED


class Accuracy(Sums):
    """Cross entropy and accuracy over all tagged words.

    ``compute()`` gives ``loss`` (nats a word), ``accuracy``, and ``unknown_accuracy`` over the words that are not in
    the vocabulary alone (not a number where there are none). Padding and words without a tag are in none of them; a
    word whose tag training has not is wrong, and is not in the loss, where it would be infinite.
    """

    sums = ("nats", "scored", "right", "words", "unknown_right", "unknown")
    nats: Tensor
    scored: Tensor
    right: Tensor
    words: Tensor
    unknown_right: Tensor
    unknown: Tensor

    def update(self, logits: Tensor, tags: Tensor, words: Tensor) -> None:
        """Add ``logits`` ``[B, T, tags]`` for ``tags`` and ``words`` ``[B, T]`` of a batch."""
        tagged = tags != UNTAGGED
        logits, tags, unknown = logits[tagged].float(), tags[tagged], words[tagged] == UNKNOWN
        right = logits.argmax(-1) == tags
        seen = tags != UNSEEN
        self.nats += F.cross_entropy(logits[seen], tags[seen], reduction="none").double().sum()
        self.scored += seen.sum()
        self.right += right.sum()
        self.words += tags.numel()
        self.unknown_right += (right & unknown).sum()
        self.unknown += unknown.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the scalars by name."""
        return {
            "loss": self.nats / self.scored,
            "accuracy": self.right / self.words,
            "unknown_accuracy": self.unknown_right / self.unknown,
        }
