"""From documents to token files: a byte-level BPE, and one flat file of token ids a split, cached on disk.

In the cache (see :mod:`caspr_cli.tasks.cache`) are

    c4_lm/<hash>/             tokenizer.json, train.bin, validation.bin, test.bin, meta.json
    c4_lm/sources/<identity>  the <hash> that a source of this identity came to

``<hash>`` covers the documents, the vocabulary size and the version of `tokenizers`. The identity is cheap (sizes
and times of files, or what was asked of the hub), so a second start reads no document at all; where only times
have changed, the documents are read again but nothing is trained.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from caspr_cli.tasks.base import SPLITS, Split
from caspr_cli.tasks.c4_lm.sources import Documents
from caspr_cli.tasks.cache import META, build_once, building, cache_root, digest

log = logging.getLogger("caspr")

END = "<|endoftext|>"  # closes each document
SMALLEST_VOCABULARY = 257  # every byte, and END
FORMAT = 1  # of the files; raised when they change
COUNTED = 1_000_000  # documents the tokenizer is trained on, at most: more cost memory and move no merge that matters
KIND = "c4_lm"  # folder of the cache
LONGEST_WORD = 1000  # characters: BPE takes time with the square of a word's length
RUN = re.compile(r"[^\W\d_]+|\d+|\s+|(?:[^\w\s]|_)+")
LONG_SPACE = re.compile(rf"\s{{{LONGEST_WORD + 1}}}")
BATCH = 1000  # documents encoded at once, over the tokenizer's own threads


def token_files(documents: Documents, vocab_size: int) -> Path:
    """Return the directory of the token files of ``documents``, built now if it is not there.

    Raises as :func:`caspr_cli.tasks.cache.building`, and :class:`DataError` where the source does.
    """
    root = cache_root(KIND)
    pointer = root / "sources" / digest([*documents.identity(), *_settings(vocab_size)])
    if pointer.is_file():
        built = root / pointer.read_text()
        if (built / META).is_file():
            return built
    with building(root) as aside:
        splits = {split: _spool(documents.split(split), aside / f"{split}.jsonl") for split in SPLITS}
        texts = [f"{split} {splits[split]['sha256']}" for split in SPLITS]
        name = digest([*texts, *_settings(vocab_size)])
        about = {"data": documents.name, "hash": name}
        built = build_once(root / name, lambda whole: about | _write(whole, aside, splits, vocab_size))
        (aside / "pointer").write_text(built.name)
        pointer.parent.mkdir(exist_ok=True)
        os.replace(aside / "pointer", pointer)
    return built


def _write(whole: Path, spools: Path, splits: dict[Split, dict[str, Any]], vocab_size: int) -> dict[str, Any]:
    """Write tokenizer and tokens of the spooled documents into ``whole``, and return what ``meta.json`` is to hold."""
    # A process that forks later (a DataLoader's workers) draws a warning from `tokenizers` unless this is set.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    log.info("training the tokenizer (%d types)", vocab_size)
    tokenizer = train_tokenizer(map(shortened, islice(_spooled(spools / "train.jsonl"), COUNTED)), vocab_size)
    tokenizer.save(str(whole / "tokenizer.json"))
    dtype = np.dtype(np.uint16 if vocab_size <= 65535 else np.uint32)
    tokens = {}
    for split in SPLITS:
        log.info("encoding the %s documents", split)
        tokens[split] = _encode(tokenizer, _spooled(spools / f"{split}.jsonl"), whole / f"{split}.bin", dtype)
    return {
        "vocabulary": tokenizer.get_vocab_size(),
        "dtype": dtype.name,
        "tokenizers": tokenizers.__version__,
        "splits": {split: splits[split] | {"tokens": tokens[split]} for split in SPLITS},
    }


def _settings(vocab_size: int) -> list[str]:
    return [f"format {FORMAT}", f"vocabulary {vocab_size}", f"tokenizers {tokenizers.__version__}"]


def _spool(texts: Iterable[str], path: Path) -> dict[str, Any]:
    """Write documents to a file of one JSON string a line: they are gone through twice, and may not fit in memory."""
    digest, count, size = hashlib.sha256(), 0, 0
    with path.open("wb") as file:
        for text in texts:
            line = json.dumps(text).encode() + b"\n"
            file.write(line)
            digest.update(line)
            count += 1
            size += len(text.encode())
    return {"documents": count, "bytes": size, "sha256": digest.hexdigest()}


def _spooled(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        yield from map(json.loads, file)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE of at most ``vocab_size`` types. Deterministic; any text comes back whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _encode(tokenizer: Tokenizer, texts: Iterator[str], path: Path, dtype: np.dtype[Any]) -> int:
    """Write the ids of all documents, each closed by END, and return how many."""
    tokenizer.encode_special_tokens = True  # a document that spells out END is text like any other
    end = tokenizer.token_to_id(END)
    count = 0
    with path.open("wb") as file:
        while batch := list(islice(texts, BATCH)):
            cut = [pieces(text) for text in batch]
            encodings = iter(tokenizer.encode_batch_fast([piece for text in cut for piece in text]))
            for text in cut:
                ids = np.array([*chain.from_iterable(next(encodings).ids for _ in text), end], dtype)
                file.write(ids.tobytes())
                count += len(ids)
    return count


def pieces(text: str) -> list[str]:
    """Return the text, cut within each word of more than LONGEST_WORD characters; in one piece if it has none."""
    if not _has_long_word(text):
        return [text]
    found = [""]
    for word in _words(text):
        for start in range(0, len(word), LONGEST_WORD):
            if start:
                found.append("")
            found[-1] += word[start : start + LONGEST_WORD]
    return found


def shortened(text: str) -> str:
    """Return the text with the first LONGEST_WORD characters of each word."""
    return "".join(word[:LONGEST_WORD] for word in _words(text)) if _has_long_word(text) else text


def _has_long_word(text: str) -> bool:
    """Return whether there may be one: quick, as it is asked of every document."""
    if len(text) <= LONGEST_WORD:
        return False
    return max(map(len, text.split()), default=0) > LONGEST_WORD or LONG_SPACE.search(text) is not None


def _words(text: str) -> list[str]:
    """Return the runs of letters, digits, spaces, and the rest: a byte-level BPE joins nothing beyond these."""
    return RUN.findall(text)


def byte_lengths(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Return the UTF-8 bytes that each id stands for: 0 for END and for ids the vocabulary does not reach."""
    # The byte-level alphabet writes each byte as one character.
    names = (tokenizer.id_to_token(i) for i in range(vocab_size))
    return [0 if name is None or name == END else len(name) for name in names]
