"""Text of the user: plain, JSON or Parquet files, in a directory or alone, with splits of their own or by content."""

import json
import logging
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from caspr_cli.tasks.errors import DataError
from caspr_cli.tasks.files import data_files, lines, reading, stamps
from caspr_cli.tasks.names import Split, split_named, split_of
from caspr_cli.tasks.registry import C4LMConf

log = logging.getLogger("caspr")

KINDS = (".txt", ".jsonl", ".json", ".parquet")  # all but the last also with .gz
HELD_OUT = 0.05  # of the documents, for validation and for test each, where files name no splits
SHORT = 1000  # characters that a document of a plain file has at least, but for the last
RECORD = 'a record is a string, or an object with a "text"'


def kind_of(file: Path) -> str | None:
    """Return the ending that says how a file is read; None if it is not read."""
    name = file.name.lower().removesuffix(".gz")
    return next((kind for kind in KINDS if name.endswith(kind)), None)


class OwnText:
    """Documents of the user's files. Each goes to a split by its content alone, unless the names of files say which.

    A plain file is cut at blank lines into documents of at least 1,000 characters.
    """

    def __init__(self, conf: C4LMConf, root: Path) -> None:
        self._conf, self._root = conf, root
        self.name = root.name
        self._files = [file for file in data_files(root) if kind_of(file)]

    @cached_property
    def _splits(self) -> dict[Path, Split] | None:
        """The split of each file, as train.txt or wiki.valid.jsonl name it; None where no name does."""
        named = {file: self._named(file) for file in self._files}
        found = {file: split for file, split in named.items() if split}
        if not found:
            return None
        if other := next((file for file in named if file not in found), None):
            one = next(iter(found))
            raise DataError(f"task.root: {other.name} names no split, but {one.name} does; rename or remove one")
        for split in ("train", "validation"):
            if split not in found.values():
                raise DataError(f"task.root: files in {self._root} name splits, but none names {split}")
        return found

    def _named(self, file: Path) -> Split | None:
        below = file.relative_to(self._root).as_posix() if file != self._root else ""  # a file alone is cut in splits
        return next(filter(None, map(split_named, re.split(r"[^a-zA-Z]+", below))), None)

    def identity(self) -> list[str]:
        return ["own text", f"{self._conf.train_documents} {self._conf.eval_documents}", *stamps(self._files)]

    def split(self, split: Split) -> Iterator[str]:
        log.info("reading the %s documents in %s", split, self._root)
        limit = self._conf.train_documents if split == "train" else self._conf.eval_documents
        return islice(self._of(split), limit)

    def _of(self, split: Split) -> Iterator[str]:
        splits = self._splits
        if splits is None:
            return (text for file in self._files for text in documents_of(file) if split_of(text, HELD_OUT) == split)
        if split == "train" or "test" in splits.values():
            return (text for file in self._files if splits[file] == split for text in documents_of(file))
        held_out = (text for file in self._files if splits[file] == "validation" for text in documents_of(file))
        return (text for text in held_out if split_of(text, 1 / 2) == split)


def documents_of(file: Path) -> Iterator[str]:
    """Yield the documents of a file but empty ones. Raises DataError, which names file, line or row, and the form."""
    read = {".txt": _paragraphs, ".parquet": _rows}.get(kind_of(file) or "", _records)
    return filter(str.strip, read(file))


def _paragraphs(file: Path) -> Iterator[str]:
    kept: list[str] = []
    size = 0
    for _, line in lines(file):
        if not line.strip() and size >= SHORT:
            yield "\n".join(kept)
            kept, size = [], 0
        elif kept or line.strip():
            kept.append(line)
            size += len(line)
    yield "\n".join(kept)


def _records(file: Path) -> Iterator[str]:
    """Yield the records of a file: one a line, or all in one list."""
    for number, line in lines(file):
        if number == 1 and line.lstrip().startswith("["):
            yield from _listed(file)
            return
        if line.strip():
            yield record_of(line, f"{file.name}:{number}")


def _listed(file: Path) -> Iterator[str]:
    whole = _parsed("\n".join(line for _, line in lines(file)), file.name)
    for number, record in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield _text(record, f"{file.name}: record {number}")


def _rows(file: Path) -> Iterator[str]:
    import pyarrow.parquet  # comes with `datasets`

    with reading(file.name, "is no Parquet file that can be read"):
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
    if "text" not in names:
        raise DataError(f'{file.name}: has no column "text" (it has {", ".join(names[:8])})')
    number = 0
    with reading(lambda: f"{file.name}: row {number}", "cannot be read from here on"):
        for batch in table.iter_batches(columns=["text"]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _text(value, f"{file.name}: row {number}")


def record_of(line: str, where: str) -> str:
    """Return the text of a JSON record. Raises :class:`DataError` where it has none; ``where`` begins the message."""
    return _text(_parsed(line, where), where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{where}: brackets nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); {RECORD}") from None


def _text(record: Any, where: str) -> str:
    text = record.get("text") if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise DataError(f"{where}: has no text; {RECORD}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: not text (a lone surrogate)") from None
    return text
