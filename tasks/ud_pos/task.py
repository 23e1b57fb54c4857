"""Tagging words: cross entropy over words, reported as accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caspr_cli.tasks.base import DataError, Task
from caspr_cli.tasks.registry import TaggingConf
from caspr_cli.tasks.ud_pos.data import PADDING, UNKNOWN, UNTAGGED, Batch, Corpus, Sample, batch_of
from caspr_cli.tasks.ud_pos.model import CHARACTER, REACH, Tagger

if TYPE_CHECKING:  # imported when a metric is made: torchmetrics takes seconds, and is not needed to check data
    from torchmetrics import Metric


class Tagging(Task):
    """Part-of-speech tags of a treebank, by a transformer encoder over word embeddings and spellings.

    Batches are those of :func:`caspr_cli.tasks.ud_pos.data.batch_of`. Raises DataError for a shape that no model has.
    """

    unit: ClassVar[str] = "words"
    heads: ClassVar[tuple[str, ...]] = ("head",)

    def __init__(self, conf: TaggingConf, seed: int) -> None:
        # ``seed`` is every task's second argument; here the splits depend on the data, and nothing is drawn.
        if conf.width % conf.heads:
            raise DataError(f"task.heads: task.width={conf.width} must be a multiple of task.heads={conf.heads}")
        if conf.width % 2:
            raise DataError(f"task.width: {conf.width} is odd; positions are pairs of a sine and a cosine")
        self.conf = conf
        self.data: Corpus = Corpus(conf)

    def collate(self, samples: list[Sample]) -> Batch:
        return batch_of(samples, self.data.lexicon, characters=self.conf.characters)

    def model(self) -> Tagger:
        conf, lexicon = self.conf, self.data.lexicon
        shape = {"layers": conf.layers, "width": conf.width, "heads": conf.heads}
        alphabet = lexicon.alphabet if conf.characters else None
        known = lexicon.known, len(lexicon.tags), conf.max_length
        return Tagger(*known, alphabet=alphabet, **shape, dropout=conf.dropout)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross entropy, in nats a tagged word of this batch.

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

    def metrics(self) -> Metric:
        from caspr_cli.tasks.ud_pos.metric import Accuracy

        return Accuracy()

    def evaluate(self, model: nn.Module, batch: Batch, metrics: Metric) -> None:
        metrics.update(self._logits(model, batch, batch["words"]), batch["tags"], batch["words"])

    def units(self, batch: Batch) -> int:
        """Return the number of words in a batch, padding left out."""
        size: int = batch["size"]
        return size

    def train_flops(self, model: nn.Module) -> float:
        """Return the mean FLOPs over batches of sentences that are spread evenly over the training split.

        Padding is counted, as it is computed.
        """
        data, size = self.data.dataset("train"), self.conf.batch_size
        count = min(10, len(data) // size) or 1
        batches = [[data[i] for i in range(k, len(data), len(data) // size or 1)][:size] for k in range(count)]
        return sum(self._batch_flops(self.collate(samples)) for samples in batches) / count

    def _batch_flops(self, batch: Batch) -> float:
        """Return the FLOPs of one batch, backward pass included; look-ups of embeddings are not counted."""
        words: Tensor = batch["words"]
        (B, T), w, layers = words.shape, self.conf.width, self.conf.layers
        a_word = layers * (12 * w * w + 2 * T * w) + w * len(self.data.lexicon.tags)
        characters: int = batch["spellings"].numel() if self.conf.characters else 0
        return 6.0 * (B * T * a_word + characters * CHARACTER * REACH * w)
