"""The token files as data sets of windows."""

from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from caspr_cli.recipe.schema import Source
from caspr_cli.tasks.base import SPLITS, DataError, Split
from caspr_cli.tasks.c4_lm.sources import documents
from caspr_cli.tasks.c4_lm.tokens import byte_lengths, token_files
from caspr_cli.tasks.cache import META, Built, MappedData, damaged, whole
from caspr_cli.tasks.files import reading
from caspr_cli.tasks.registry import C4LMConf


class Windows(MappedData[Tensor]):
    """Consecutive windows of a token file.

    Item ``i`` holds the tokens ``[i T, i T + T]``, both ends included: a LongTensor ``[T + 1]`` whose first ``T``
    are inputs and whose last ``T`` are targets, so each token but the file's first is a target once. The
    remainder that fills no window is dropped, in every split: at most ``T`` tokens go unused. ``sequence`` is ``T``.
    """

    def __init__(self, path: Path, dtype: str, sequence: int) -> None:
        super().__init__(path, dtype, sequence)
        self._sequence = sequence
        self._tokens = np.memmap(path, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._sequence

    def __getitem__(self, index: int) -> Tensor:
        start = range(len(self))[index] * self._sequence  # IndexError beyond the end, which `for` relies on
        window = self._tokens[start : start + self._sequence + 1]
        return torch.from_numpy(window.astype(np.int64))


class Corpus(Built):
    """The text of one recipe, as token files, see :mod:`caspr_cli.tasks.c4_lm.tokens`."""

    def __init__(self, conf: C4LMConf) -> None:
        self._conf = conf

    @reading("task.data: the documents")
    def build(self) -> Path:
        return token_files(documents(self._conf), self._conf.vocab_size)

    @property
    def tokenizer(self) -> Tokenizer:
        path = self.directory / "tokenizer.json"
        with whole(path):
            return Tokenizer.from_file(str(path))

    def check(self) -> None:
        """Raise :class:`DataError` unless each split has a window, and its file the size it was written with."""
        with whole(self.directory / META):
            width = np.dtype(self.meta["dtype"]).itemsize
            sizes = {split: self.meta["splits"][split]["tokens"] for split in SPLITS}
        for split, tokens in sizes.items():
            path = self.directory / f"{split}.bin"
            if not path.is_file() or path.stat().st_size != tokens * width:
                raise damaged(path)
            if tokens < self._conf.sequence + 1:
                key = "train_documents" if split == "train" else "eval_documents"
                more = f", raise task.{key}" if getattr(self._conf, key) is not None else ""
                raise DataError(
                    f"task.sequence: a window of {self._conf.sequence} + 1 tokens does not fit the {tokens} tokens of "
                    f"the {split} split; lower task.sequence{more} or give more documents"
                )

    def dataset(self, split: Split) -> Windows:
        """Return the data set of a split; raises as :meth:`check`."""
        self.check()
        return Windows(self.directory / f"{split}.bin", self.meta["dtype"], self._conf.sequence)

    def byte_lengths(self) -> Tensor:
        """Return the number of UTF-8 bytes of each token id, LongTensor ``[vocab_size]``."""
        return torch.tensor(byte_lengths(self.tokenizer, self._conf.vocab_size))

    def describe(self) -> dict[str, Any]:
        """Return also the vocabulary; a split's sizes are documents, tokens and UTF-8 bytes."""
        meta, keys = self.meta, ("documents", "tokens", "bytes")
        sizes = {split: {key: meta["splits"][split][key] for key in keys} for split in SPLITS}
        described = {"name": meta["data"], "source": self._conf.data.value, "hash": meta["hash"]}
        described |= {"vocab_size": meta["vocabulary"], "tokenizers": meta["tokenizers"], "splits": sizes}
        return described | ({"python": python_version()} if self._conf.data is Source.sample else {})
