"""Where the text comes from: the standard library of the running Python, C4's shards on disk, or C4 on the hub.

A source gives the documents of each split in a fixed order, and an *identity*: cheap strings that change when the
documents may have changed, so that a second start need not read any of them.
"""

import ast
import logging
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from platform import python_implementation, python_version
from typing import Protocol

from caspr_cli.recipe.schema import Source
from caspr_cli.tasks.c4_lm.own import KINDS, OwnText, kind_of, record_of
from caspr_cli.tasks.errors import DataError
from caspr_cli.tasks.files import data_files, entries_below, lines, reaching, reading, regular, root_of, stamps
from caspr_cli.tasks.names import SPLITS, Split, call_split, split_named, split_of
from caspr_cli.tasks.registry import C4LMConf

log = logging.getLogger("caspr")

HOLDS = f"{', '.join(KINDS)} files (also .gz), or c4-train.*.json.gz and c4-validation.*.json.gz"

# Parts of the standard library that are no English of its own: tests, and what was installed beside it.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
HELD_OUT = 0.05  # of the sample's documents, for validation and for test each
# Paragraphs at least this long (characters) are kept where they come first and left out where they are repeated.
LONG = 80


class Documents(Protocol):
    name: str

    def identity(self) -> list[str]:
        """Return strings that change whenever the documents may have changed. Reads no document."""

    def split(self, split: Split) -> Iterator[str]:
        """Return the documents of a split, in a fixed order."""


def documents(conf: C4LMConf) -> Documents:
    """Return the source that ``conf.data`` names. Raises :class:`DataError` where a key it needs is missing."""
    kinds: dict[Source, Callable[[C4LMConf], Documents]]
    kinds = {Source.sample: StandardLibrary, Source.files: files, Source.hub: Hub}
    return kinds[conf.data](conf)


def files(conf: C4LMConf) -> Documents:
    """Return C4's shards, if the directory has a file that is called as one, or else the user's own text."""
    root = Path(conf.root or "").expanduser()
    if conf.root is None or not root.exists():
        root_of(conf, HOLDS)  # which says so
    names = entries_below(root, deep=False) if root.is_dir() else []
    if any(SHARD.fullmatch(name.removesuffix("/")) or LIKE_SHARD.match(name) for name in names):
        return Shards(conf)
    if any(map(kind_of, data_files(root))):
        return OwnText(conf, root)
    raise DataError(f"task.root: no text in {conf.root}: it should hold {HOLDS}")


def samples(conf: C4LMConf) -> Iterator[None]:
    """Read the documents, one at each step. Raises :class:`DataError` as the sources."""
    source = documents(conf)
    for split in SPLITS:
        for _ in source.split(split):
            yield


def _halve(held_out: Iterable[str], conf: C4LMConf, split: Split) -> Iterator[str]:
    """Return every second document: C4 has no test split, so its validation split serves as both."""
    first = 0 if split == "validation" else 1
    return islice(held_out, first, None if conf.eval_documents is None else 2 * conf.eval_documents, 2)


# ---- sample: the standard library ------------------------------------------------------------------------------


class StandardLibrary:
    """The English of Python's standard library, read in place: one document a help topic, one a module.

    A module's document is its docstrings in the order of the source. A hash of its name puts a document into a
    split, 90 / 5 / 5. Topics quote each other and modules have twins, so a long paragraph counts only where it comes
    first: no long paragraph of one split is found in another.
    """

    name = "python-stdlib"

    def __init__(self, conf: C4LMConf) -> None:
        self._conf = conf

    def identity(self) -> list[str]:
        root = stdlib_root()
        stats = [(path.relative_to(root).as_posix(), path.stat()) for path in _python_files(root)]
        files = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
        limits = f"{self._conf.train_documents} {self._conf.eval_documents}"
        return [self.name, python_implementation(), python_version(), limits, *files]

    def split(self, split: Split) -> Iterator[str]:
        chosen = (text for name, text in self._documents.items() if split_of(name, HELD_OUT) == split)
        return islice(chosen, self._conf.train_documents if split == "train" else self._conf.eval_documents)

    @cached_property
    def _documents(self) -> dict[str, str]:  # takes seconds: it parses the whole library
        root = stdlib_root()
        log.info("reading the docstrings of %s", root)
        found = {f"topic:{name}": text for name, text in sorted(stdlib_topics().items())}
        for path in _python_files(root):
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            with reading(str(path)):
                found[f"module:{module}"] = docstrings(path.read_bytes())
        return {name: text for name, text in _without_repeats(found) if text}


def stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_topics() -> dict[str, str]:
    """Return the texts behind ``help("topics")``, by topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise _no_stdlib("the module pydoc_data.topics") from None
    return topics


def _python_files(root: Path) -> list[Path]:
    found: list[Path] = []
    for directory, below, files in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED]
        found += [Path(directory, name) for name in files if name.endswith(".py")]
    if not found:
        raise _no_stdlib(f"{root}/*.py")
    return sorted(found)


def _no_stdlib(missing: str) -> DataError:
    return DataError(
        f"task.data=sample: this Python comes without the sources of its standard library ({missing}); "
        "take another Python, or task.data=files task.root=DIR with C4's shards"
    )


def docstrings(source: bytes) -> str:
    """Return all docstrings of a module in the order of its source; empty where it cannot be parsed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules hold escapes that newer parsers warn of
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return ""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # ast.walk goes level by level
    text = "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
    return text.encode("utf-8", "replace").decode()  # a lone surrogate is no text


def _without_repeats(documents: dict[str, str]) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for name, text in documents.items():
        paragraphs = text.split("\n\n")
        yield name, "\n\n".join(part for part in paragraphs if len(part) < LONG or part not in seen)
        seen.update(paragraphs)


# ---- files: C4's shards -----------------------------------------------------------------------------------------


SHARD = re.compile(r"c4-([a-z]+)\..*\.json\.gz", re.IGNORECASE)
LIKE_SHARD = re.compile(r"c4-.*\.jsonl?\b", re.IGNORECASE)


class Shards:
    """C4 as it is published: gzipped files of one JSON object a line, its document in the field ``text``."""

    name = "c4"

    def __init__(self, conf: C4LMConf) -> None:
        self._conf = conf
        self._root = root_of(conf, HOLDS)
        self._shards: dict[Split, list[Path]] = {"train": [], "validation": []}
        called: dict[Split, str] = {}
        for name in entries_below(self._root, deep=False):
            match = SHARD.fullmatch(name.removesuffix("/"))
            split = split_named(match[1]) if match else None
            if match and split in self._shards:
                call_split(called, split, match[1], f"task.root: {conf.root}")
                self._shards[split].append(regular(self._root / name))
            elif LIKE_SHARD.match(name):
                raise DataError(
                    f"task.root: {name} in {conf.root} is no name of a shard of C4; rename or remove it "
                    "(c4-train.*.json.gz, c4-validation.*.json.gz)"
                )
        for split, shards in self._shards.items():
            if not shards:
                raise DataError(f"task.root: no c4-{split}.*.json.gz in {conf.root}")

    def identity(self) -> list[str]:
        limits = f"{self._conf.train_documents} {self._conf.eval_documents}"
        return [self.name, limits, *stamps([*self._shards["train"], *self._shards["validation"]])]

    def split(self, split: Split) -> Iterator[str]:
        log.info("reading the %s documents in %s", split, self._root)
        if split == "train":
            return islice(_read_shards(self._shards["train"]), self._conf.train_documents)
        return _halve(_read_shards(self._shards["validation"]), self._conf, split)


def _read_shards(shards: list[Path]) -> Iterator[str]:
    for shard in shards:
        for number, line in lines(shard):
            yield record_of(line, f"{shard.name}:{number}")


# ---- hub: C4 itself ---------------------------------------------------------------------------------------------


class Hub:
    """The first documents of ``allenai/c4``, configuration ``en``, streamed from the Hugging Face hub."""

    name = "allenai/c4 en"

    def __init__(self, conf: C4LMConf) -> None:
        self._conf = conf
        for key in ("train_documents", "eval_documents"):
            if getattr(conf, key) is None:
                raise DataError(f"task.{key}: task.data=hub needs a number of documents (C4 has 364 million)")

    def identity(self) -> list[str]:
        # what is asked for alone: data that were fetched once serve without a network
        return [self.name, f"{self._conf.train_documents} {self._conf.eval_documents}"]

    def split(self, split: Split) -> Iterator[str]:
        log.info("fetching the %s documents of %s", split, self.name)
        if split == "train":
            return islice(_stream("train"), self._conf.train_documents)
        return _halve(_stream("validation"), self._conf, split)


def _stream(split: str) -> Iterator[str]:
    import datasets  # takes a second, and only this source needs it

    instead = "take task.data=sample for the bundled text, or task.data=files task.root=DIR with C4's json.gz shards"
    with reaching("the Hugging Face hub", instead):
        for row in datasets.load_dataset("allenai/c4", "en", split=split, streaming=True):
            yield row["text"]
