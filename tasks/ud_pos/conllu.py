"""Reading CoNLL-U: words and one column of tags (https://universaldependencies.org/format.html)."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from caspr_cli.tasks.errors import DataError
from caspr_cli.tasks.files import lines
from caspr_cli.tasks.registry import Tags

COLUMNS = 10
COLUMN = {Tags.upos: 3, Tags.xpos: 4}
MISSING = "_"  # what CoNLL-U writes where there is nothing
NO_WORD = re.compile(r"[1-9]\d*-[1-9]\d*|\d+\.[1-9]\d*")  # a multiword token's range, an empty node


class Sentence(NamedTuple):
    """Words and their tags, as many of the one as of the other."""

    words: list[str]
    tags: list[str]  # MISSING where the treebank gives none


def read(path: Path, tags: Tags) -> Iterator[Sentence]:
    """Yield the sentences of a file (``.conllu``, or gzipped).

    Words are the *syntactic* words, those with a whole number for ID: of a multiword token its parts are read, and
    empty nodes are not. Every word must have a UPOS, as the format demands; an XPOS is optional, and ``_`` is kept.
    Raises DataError, which names file and line, if the file is not CoNLL-U, or has no sentence.
    """
    words: list[str] = []
    found: list[str] = []
    empty = True
    for number, line in lines(path):
        if not line:
            if words:
                yield Sentence(words, found)
                words, found, empty = [], [], False
        elif line[0] != "#":
            columns = line.split("\t")
            where = f"{path.name}:{number}"
            if len(columns) != COLUMNS:
                raise DataError(f"{where}: {len(columns)} columns, not {COLUMNS} with one tab between each")
            if columns[0] != str(len(words) + 1):
                if NO_WORD.fullmatch(columns[0]):
                    continue
                raise DataError(f"{where}: ID is {columns[0]!r} where {len(words) + 1} comes next")
            word, tag = columns[1], columns[COLUMN[tags]]
            if not word.strip():
                raise DataError(f"{where}: FORM is empty")
            if not tag.strip() or (tag == MISSING and tags is Tags.upos):
                raise DataError(f"{where}: {word!r} has no {tags.name.upper()}")
            words.append(word)
            found.append(tag)
    if words:
        yield Sentence(words, found)
    elif empty:
        raise DataError(f"{path.name}: has no sentence")
