"""What tagging is measured by."""

import torch.nn.functional as F
from torch import Tensor

from caspr_cli.tasks.metrics import Means
from caspr_cli.tasks.ud_pos.data import UNKNOWN, UNSEEN, UNTAGGED


class Accuracy(Means):
    """Cross entropy and accuracy over all tagged words.

    ``compute()`` gives ``loss`` (nats a word), ``accuracy``, and ``unknown_accuracy`` over the words that are not in
    the vocabulary alone (not a number where there are none). Padding and words without a tag are in none of them; a
    word whose tag training has not is wrong, and is not in the loss, where it would be infinite.
    """

    means = (
        ("loss", "nats", "scored"), ("accuracy", "right", "words"), ("unknown_accuracy", "unknown_right", "unknown"),
    )  # fmt: skip

    def update(self, logits: Tensor, tags: Tensor, words: Tensor) -> None:
        """Add ``logits`` ``[B, T, tags]`` for ``tags`` and ``words`` ``[B, T]`` of a batch."""
        tagged = tags != UNTAGGED
        logits, tags, unknown = logits[tagged].float(), tags[tagged], words[tagged] == UNKNOWN
        right = logits.argmax(-1) == tags
        seen = tags != UNSEEN
        nats = F.cross_entropy(logits[seen], tags[seen], reduction="none").double().sum()
        self.add(nats=nats, scored=seen.sum(), right=right.sum(), words=tags.numel())
        self.add(unknown_right=(right & unknown).sum(), unknown=unknown.sum())
