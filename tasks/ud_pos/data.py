"""From sentences to batches of word ids, tag ids and spellings."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from caspr_cli.tasks.base import SPLITS, Split
from caspr_cli.tasks.files import reading, result
from caspr_cli.tasks.registry import TaggingConf
from caspr_cli.tasks.ud_pos.conllu import MISSING, Sentence
from caspr_cli.tasks.ud_pos.sources import sentences, treebank

PADDING, UNKNOWN = 0, 1  # the first two word ids, and the first two of characters
BEGIN, END = 2, 3  # characters: a word's two ends
UNTAGGED = -100  # tag id of padding, and of a word that the treebank gives no tag: never counted
UNSEEN = -1  # tag id of a tag that the training split has not: counts as wrong, and has no loss
HALF = 12  # characters kept of each end of a word: longer ones lose their middle
COMMON = 2  # words of the training split that a character must be in; rarer ones are one unknown character

Sample = tuple[Tensor, Tensor]  # forms and tags of a sentence, LongTensors [T]
Batch = dict[str, Any]  # tensors, and one number


class Lexicon:
    """Numbers for what the training split holds, and a spelling for each form of any split.

    *Forms* are numbered so that the known words come first: ``form < known`` is the id of a known word, in the order
    of how common they are, and every other form has the word id UNKNOWN. The forms beyond are there for their
    spellings alone. Words, tags and characters are known from the training split alone, and at most ``vocab_size``
    words: the commonest, of equals those first in the alphabet.
    """

    def __init__(self, sentences: dict[Split, list[Sentence]], vocab_size: int) -> None:
        counts = Counter(word for sentence in sentences["train"] for word in sentence.words)
        words = sorted(counts, key=lambda word: (-counts[word], word))
        others = {word for split in SPLITS for sentence in sentences[split] for word in sentence.words} - counts.keys()
        forms = words + sorted(others)
        self.forms = {word: id for id, word in enumerate(forms, start=UNKNOWN + 1)}
        self.known = UNKNOWN + 1 + min(vocab_size, len(words))
        tags = {tag for sentence in sentences["train"] for tag in sentence.tags} - {MISSING}
        self.tags = {tag: id for id, tag in enumerate(sorted(tags))}
        #: how often training has each known word, LongTensor [known]; 0 for PADDING and UNKNOWN
        self.counts = torch.tensor([0, 0] + [counts[word] for word in words[: self.known - UNKNOWN - 1]])
        spread = Counter(c for word in words for c in set(word))
        common = sorted(c for c, number in spread.items() if number >= COMMON)
        self.characters = {c: id for id, c in enumerate(common, start=END + 1)}
        #: characters of each form, IntTensor [forms, <= 2 HALF + 2], padded
        self.spellings = _table([[], [], *map(self._spell, forms)])

    def _spell(self, word: str) -> list[int]:
        kept = word if len(word) <= 2 * HALF else word[:HALF] + word[-HALF:]
        return [BEGIN, *(self.characters.get(c, UNKNOWN) for c in kept), END]

    @property
    def alphabet(self) -> int:
        """The number of character ids."""
        return END + 1 + len(self.characters)

    def tag_id(self, tag: str) -> int:
        """Return the class of a tag, or UNTAGGED or UNSEEN."""
        return UNTAGGED if tag == MISSING else self.tags.get(tag, UNSEEN)


def _table(rows: list[list[int]]) -> Tensor:
    table = np.full((len(rows), max(map(len, rows))), PADDING, np.int32)
    for row, ids in zip(table, rows, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(table)


class Sentences(Dataset[Sample]):
    """Sentences as forms and tag ids, in samples of at most ``max_length`` words, of which each has a tag.

    With ``whole`` a longer sentence makes several samples, which hold each of its words once, and without the context
    of their neighbours; else it is cut off.
    """

    def __init__(self, sentences: Sequence[Sentence], lexicon: Lexicon, max_length: int, *, whole: bool) -> None:
        forms, tags, self._bounds = [], [], []
        start = 0
        for sentence in sentences:
            forms += [lexicon.forms[word] for word in sentence.words]
            tags += [lexicon.tag_id(tag) for tag in sentence.tags]
            end = len(forms)
            for first in range(start, end if whole else start + 1, max_length):
                last = min(first + max_length, end)
                if any(tag != UNTAGGED for tag in tags[first:last]):
                    self._bounds.append((first, last))
            start = end
        self._forms, self._tags = torch.tensor(forms), torch.tensor(tags)

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, index: int) -> Sample:
        first, last = self._bounds[index]  # IndexError beyond the end, which `for` relies on
        return self._forms[first:last], self._tags[first:last]


def batch_of(samples: Sequence[Sample], lexicon: Lexicon, *, characters: bool) -> Batch:
    """Return a batch ``[B, T]``, padded to its longest sample.

    Returns:
        ``words`` (PADDING, UNKNOWN or a known word), ``tags`` (a class, UNTAGGED or UNSEEN) and ``counts`` (how often
        training has the word), LongTensors ``[B, T]``. With ``characters`` also ``spellings``, ``[U, C]``: the
        characters of the ``U`` different forms of the batch, the longest of ``C``; and ``spelled``, ``[B, T]``: whose
        row of them a word is. And ``size``: how many words there are without the padding, a number and no tensor, so
        that asking for it waits for no device.
    """
    forms = torch.nn.utils.rnn.pad_sequence([forms for forms, _ in samples], True, PADDING)
    tags = torch.nn.utils.rnn.pad_sequence([tags for _, tags in samples], True, UNTAGGED)
    words = torch.where(forms < lexicon.known, forms, UNKNOWN)
    size = sum(len(forms) for forms, _ in samples)
    batch: Batch = {"words": words, "tags": tags, "counts": lexicon.counts[words], "size": size}
    if characters:
        different, batch["spelled"] = forms.unique(return_inverse=True)
        spellings = lexicon.spellings[different].long()
        batch["spellings"] = spellings[:, : int((spellings != PADDING).sum(1).max())]
    return batch


class Corpus:
    """The treebank of one recipe. Nothing is read before it is asked for.

    It is read anew at each start, and not cached: English-EWT (254,818 words) takes a second.
    """

    def __init__(self, conf: TaggingConf) -> None:
        self._conf = conf

    @cached_property
    def _source(self) -> Any:
        return treebank(self._conf)

    @cached_property
    @reading("task.data: the sentences")
    def sentences(self) -> dict[Split, list[Sentence]]:
        """All sentences. Raises :class:`DataError` where they cannot be read, or are nothing to train on."""
        return result(sentences(self._source, self._conf.tags))

    @cached_property
    def lexicon(self) -> Lexicon:
        return Lexicon(self.sentences, self._conf.vocab_size)

    def check(self) -> None:
        """Read the treebank: nothing is kept on disk."""
        _ = self.lexicon

    def dataset(self, split: Split) -> Sentences:
        """Return sentences of at most ``max_length`` words: cut off in training, else in pieces with every word."""
        return Sentences(self.sentences[split], self.lexicon, self._conf.max_length, whole=split != "train")

    def describe(self) -> dict[str, Any]:
        """Return also the numbers of tags and known words; ``unknown`` is the share of a split's words that are not."""
        sums, lexicon = hashlib.sha256(), self.lexicon
        splits = {}
        for split in SPLITS:
            for words, tags in self.sentences[split]:
                sums.update("\t".join([split, *words, *tags, "\n"]).encode())
            forms = [lexicon.forms[word] for sentence in self.sentences[split] for word in sentence.words]
            unknown = sum(form >= lexicon.known for form in forms)
            shares = {"words": len(forms), "unknown": round(unknown / len(forms), 4)}
            splits[split] = {"sentences": len(self.sentences[split]), **shares}
        found = {"name": self._source.name, "source": self._conf.data.value, "hash": sums.hexdigest()[:16]}
        return found | {"tags": len(lexicon.tags), "vocab_size": lexicon.known, "splits": splits}
