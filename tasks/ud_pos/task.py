"""Tagging words: cross entropy over words, reported as accuracy."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from caspr_cli.recipe.schema import TaggingConf
from tasks.base import DataError, Split, Task
from tasks.ud_pos.data import PADDING, UNKNOWN, UNSEEN, UNTAGGED, Batch, Corpus, Sample, Sentences, batch_of
from tasks.ud_pos.model import CHARACTER, REACH, Tagger


class Accuracy(Metric):
    """Cross entropy and accuracy over all tagged words seen, whatever the batches they came in.

    ``compute()`` gives ``loss`` (nats a word), ``accuracy``, and ``unknown_accuracy`` over the words that are not in
    the vocabulary alone (not a number where there are none). Padding and words without a tag are in none of them; a
    word whose tag training has not is wrong, and is not in the loss, where it would be infinite.
    """

    full_state_update = False
    nats: Tensor
    scored: Tensor
    right: Tensor
    words: Tensor
    unknown_right: Tensor
    unknown: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("nats", "scored", "right", "words", "unknown_right", "unknown"):
            # float64: a float32 sum stops counting single words at 2^24
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

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
        """Scalars by name."""
        return {
            "loss": self.nats / self.scored,
            "accuracy": self.right / self.words,
            "unknown_accuracy": self.unknown_right / self.unknown,
        }


class Tagging(Task):
    """Part-of-speech tags of a treebank, by a transformer encoder over word embeddings and spellings.

    Batches are those of :func:`tasks.ud_pos.data.batch_of`.

    Raises:
        DataError: a shape that no model has.
    """

    unit: ClassVar[str] = "words"
    heads: ClassVar[tuple[str, ...]] = ("head",)

    def __init__(self, conf: TaggingConf, seed: int) -> None:
        # ``seed`` is every task's second argument; here the splits hang on the data, and nothing is drawn.
        _check(conf)
        self.conf = conf
        self._corpus = Corpus(conf)

    def prepare(self) -> None:
        """Read the treebank: nothing is kept on disk."""
        _ = self._corpus.lexicon

    def dataset(self, split: Split) -> Sentences:
        """Sentences of at most ``max_length`` words: cut off in training, else in pieces that hold every word once."""
        return self._corpus.samples(split)

    def collate(self, samples: list[Sample]) -> Batch:
        """See :func:`tasks.ud_pos.data.batch_of`."""
        return batch_of(samples, self._corpus.lexicon, characters=self.conf.characters)

    def model(self) -> Tagger:
        """A fresh tagger."""
        conf, lexicon = self.conf, self._corpus.lexicon
        return Tagger(
            lexicon.known,
            len(lexicon.tags),
            conf.max_length,
            alphabet=lexicon.alphabet if conf.characters else None,
            layers=conf.layers,
            width=conf.width,
            heads=conf.heads,
            dropout=conf.dropout,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy, nats a tagged word of this batch.

        Each rank and accumulated part takes the mean over its own words, and a step the mean of those, so a word in a
        part of shorter sentences weighs more than one in a part of longer ones.

        In training a word is hidden (UNKNOWN, though its spelling stays) with probability a / (a + its count in the
        training split), a = ``task.word_dropout`` (Kiperwasser and Goldberg 2016): unknown words come up at all,
        and look like what is rare.
        """
        words = batch["words"]
        if model.training:
            a, counts = self.conf.word_dropout, batch["counts"]
            # with a probability of exactly 0 for a = 0, and padding stays what it is
            hidden = (torch.rand(words.shape, device=words.device) * (a + counts) < a) & (words != PADDING)
            words = words.masked_fill(hidden, UNKNOWN)
        logits = self._logits(model, batch, words)
        return F.cross_entropy(logits.float().flatten(0, 1), batch["tags"].flatten(), ignore_index=UNTAGGED)

    def _logits(self, model: nn.Module, batch: Batch, words: Tensor) -> Tensor:
        logits: Tensor = model(words, batch.get("spellings"), batch.get("spelled"))
        return logits

    def metrics(self) -> Accuracy:
        """An empty :class:`Accuracy`."""
        return Accuracy()

    def evaluate(self, model: nn.Module, batch: Batch, metrics: Metric) -> None:
        """Add a batch to ``metrics``."""
        metrics.update(self._logits(model, batch, batch["words"]), batch["tags"], batch["words"])

    def units(self, batch: Batch) -> int:
        """Words in a batch, padding left out."""
        size: int = batch["size"]
        return size

    def train_flops(self, model: nn.Module) -> float:
        """FLOPs of one global batch, the mean over batches of sentences spread evenly over the training split.

        Padding is counted, as it is computed.
        """
        data, size = self.dataset("train"), self.conf.batch_size
        count = min(10, len(data) // size) or 1
        batches = [[data[i] for i in range(k, len(data), len(data) // size or 1)][:size] for k in range(count)]
        return sum(self._batch_flops(self.collate(samples)) for samples in batches) / count

    def _batch_flops(self, batch: Batch) -> float:
        """2 a multiply-add, and as much again twice for the backward pass; look-ups of embeddings are not counted."""
        words: Tensor = batch["words"]
        (B, T), w, layers = words.shape, self.conf.width, self.conf.layers
        a_word = layers * (12 * w * w + 2 * T * w) + w * len(self._corpus.lexicon.tags)
        characters: int = batch["spellings"].numel() if self.conf.characters else 0
        return 6.0 * (B * T * a_word + characters * CHARACTER * REACH * w)

    def describe_data(self) -> dict[str, Any]:
        """See :meth:`tasks.ud_pos.data.Corpus.describe`."""
        return self._corpus.describe()


def _check(conf: TaggingConf) -> None:
    for key in ("batch_size", "max_length", "vocab_size", "layers", "width", "heads"):
        if getattr(conf, key) < 1:
            raise DataError(f"task.{key}: {getattr(conf, key)} is too small, it must be at least 1")
    if conf.width % conf.heads:
        raise DataError(f"task.heads: task.width={conf.width} must be a multiple of task.heads={conf.heads}")
    if conf.width % 2:
        raise DataError(f"task.width: {conf.width} is odd; positions are pairs of a sine and a cosine")
    if not 0 <= conf.dropout < 1:
        raise DataError(f"task.dropout: {conf.dropout} is not in [0, 1)")
    if conf.word_dropout < 0:
        raise DataError(f"task.word_dropout: {conf.word_dropout} is below 0")
