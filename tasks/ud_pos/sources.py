"""Where the sentences come from: a bundled Turkish treebank, any UD treebank on disk, or one from the hub."""

import re
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from caspr_cli.recipe.schema import Source
from caspr_cli.tasks.errors import DataError
from caspr_cli.tasks.files import entries_below, reaching, regular, root_of
from caspr_cli.tasks.names import SPLITS, Split, call_split, split_named, split_of
from caspr_cli.tasks.registry import TaggingConf, Tags
from caspr_cli.tasks.ud_pos.conllu import MISSING, Sentence, read

HELD_OUT = 0.1  # of the sentences of the sample and of one file, for validation and for test each


class Treebank(Protocol):
    name: str

    def split(self, split: Split) -> Iterable[Sentence]:
        """Return the sentences of a split, in a fixed order. Raises :class:`DataError` where they cannot be read."""


def treebank(conf: TaggingConf) -> Treebank:
    """Return the source that ``conf.data`` names. Raises :class:`DataError` where it is not to be found."""
    kinds: dict[Source, Callable[[TaggingConf], Treebank]]
    alone = conf.root is not None and Path(conf.root).expanduser().is_file()
    kinds = {Source.sample: Sample, Source.files: OneFile if alone else Files, Source.hub: Hub}
    return kinds[conf.data](conf)


def samples(conf: TaggingConf) -> Iterator[None]:
    """Read the sentences, one at each step. Raises :class:`DataError` as :func:`sentences`."""
    return sentences(treebank(conf), conf.tags)


def sentences(source: Treebank, tags: Tags) -> Generator[None, None, dict[Split, list[Sentence]]]:
    """Read the sentences of each split, one at each step, and return them.

    Raises DataError if they cannot be read, or are nothing to train on.
    """
    found: dict[Split, list[Sentence]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for sentence in source.split(split):
            found[split].append(sentence)
            yield
    name = source.name
    for split in SPLITS:
        if not found[split]:
            raise DataError(f"{name}: no sentence in the {split} split")
        if all(tag == MISSING for sentence in found[split] for tag in sentence.tags):
            other = "try the other of upos and xpos"
            raise DataError(f"task.tags: {name} has no {tags.name} in its {split} split; {other}")
        if all(word == MISSING for sentence in found[split] for word in sentence.words):
            raise DataError(f"{name}: every word is '_': its text is withheld; ask its makers for it")
    seen = {tag for sentence in found["train"] for tag in sentence.tags} - {MISSING}
    for split in SPLITS:
        if not any(tag in seen for sentence in found[split] for tag in sentence.tags):
            raise DataError(f"{name}: no tag of the {split} split is found in the training split")
    return found


# ---- sample: Turkish, from a package --------------------------------------------------------------------------------


class Sample:
    """The hand-annotated Turkish sentences of the package ``turkish-treebanks``: 4,851 of the web and of Wikipedia.

    The package is found by its metadata and never imported: its modules need protobuf, its CoNLL-U files nothing.
    A hash of its text puts a sentence into a split, 80 / 10 / 10, so none is found in two. UPOS are 14 coarse
    tags, some older than UD's (PRT, CONJ, AFFIX, ONOM); words are often parts of a written word.
    """

    package = "turkish-treebanks"

    def __init__(self, conf: TaggingConf) -> None:
        self._tags = conf.tags
        self._files = sample_files(self.package)
        self.name = f"{self.package} {metadata.version(self.package)}"

    @cached_property
    def _sentences(self) -> list[Sentence]:
        return [sentence for path in self._files for sentence in read(path, self._tags)]

    def split(self, split: Split) -> Iterator[Sentence]:
        return (sentence for sentence in self._sentences if split_of("".join(sentence.words), HELD_OUT) == split)


def sample_files(package: str) -> list[Path]:
    """Return the CoNLL-U files of an installed package, sorted by name."""
    try:
        found = sorted(Path(str(f.locate())) for f in metadata.files(package) or [] if f.suffix == ".conllu")
    except metadata.PackageNotFoundError:
        found = []
    if not found or not all(path.is_file() for path in found):
        raise DataError(
            f"task.data=sample: the package {package} is not installed, or not whole: pip install {package}\n"
            "or take task.data=files task.root=DIR with a treebank of Universal Dependencies"
        )
    return found


# ---- files: a treebank of Universal Dependencies --------------------------------------------------------------------

# Large treebanks have several files a split: de_hdt-ud-train-a-1.conllu
FILE = re.compile(r"(?P<code>.+)-ud-(?P<split>[^-.]+)(-.+)?\.conllu(\.gz)?", re.IGNORECASE)
# UD's name of each split
PARTS: dict[Split, str] = {"train": "train", "validation": "dev", "test": "test"}


class Files:
    """The files ``CODE-ud-{train,dev,test}.conllu`` of one treebank, plain or gzipped, in the directory ``task.root``.

    A split in several files (``CODE-ud-train-a.conllu``, ...) is read in the order of their names.
    """

    def __init__(self, conf: TaggingConf) -> None:
        root = root_of(conf, "a UD treebank, CODE-ud-{train,dev,test}.conllu or .conllu.gz")
        self._tags = conf.tags
        self._files: dict[Split, list[Path]] = {split: [] for split in PARTS}
        codes: set[str] = set()
        called: dict[Split, str] = {}
        names = entries_below(root, deep=False)
        for name in names:
            match = FILE.fullmatch(name.removesuffix("/"))
            split = split_named(match["split"]) if match else None
            if match and split:
                codes.add(match["code"])
                call_split(called, split, match["split"], f"task.root: {conf.root}")
                self._files[split].append(regular(root / name))
            elif re.search(r"\.conllu\b", name, re.IGNORECASE):
                raise DataError(
                    f"task.root: {name} in {conf.root} is no name of a part of a treebank; rename or remove it "
                    "(CODE-ud-{train,dev,test}.conllu or .conllu.gz)"
                )
            if f"{name}.gz" in names:
                raise DataError(f"task.root: both {name} and {name}.gz in {conf.root}; remove one of them")
        if not codes:
            alone = "or task.root can be one .conllu file"
            raise DataError(f"task.root: no *-ud-train.conllu (or .conllu.gz) in {conf.root}; {alone}")
        if len(codes) > 1:
            some = ", ".join(sorted(codes)[:4]) + (", ..." if len(codes) > 4 else "")
            raise DataError(f"task.root: {len(codes)} treebanks in {conf.root} ({some}); give each its own directory")
        (self.name,) = codes
        for split, part in PARTS.items():
            if not self._files[split]:
                raise DataError(f"task.root: no {self.name}-ud-{part}.conllu (or .conllu.gz) in {conf.root}")

    def split(self, split: Split) -> Iterator[Sentence]:
        for path in self._files[split]:
            yield from read(path, self._tags)


class OneFile:
    """A CoNLL-U file that is given as ``task.root``. Which split a sentence is in depends on its words alone."""

    def __init__(self, conf: TaggingConf) -> None:
        self._file, self._tags = Path(conf.root or "").expanduser(), conf.tags
        if not re.search(r"\.conllu(\.gz)?$", self._file.name, re.IGNORECASE):
            raise DataError(f"task.root: {self._file.name} is neither a .conllu(.gz) file nor a treebank's directory")
        self.name = self._file.name

    def split(self, split: Split) -> Iterator[Sentence]:
        for sentence in read(self._file, self._tags):
            if split_of(" ".join(sentence.words), HELD_OUT) == split:
                yield sentence


# ---- hub ------------------------------------------------------------------------------------------------------------


class Hub:
    """A treebank of ``universal-dependencies/universal_dependencies`` on the Hugging Face hub, by its code."""

    repository = "universal-dependencies/universal_dependencies"

    def __init__(self, conf: TaggingConf) -> None:
        self._code, self._tags = conf.treebank, conf.tags
        self.name = f"{self.repository} {conf.treebank}"

    @cached_property
    def _dataset(self) -> Any:
        import datasets  # takes a second, and only this source needs it

        instead = (
            "take task.data=sample for the bundled Turkish, or task.data=files task.root=DIR with a treebank of\n"
            "Universal Dependencies (CODE-ud-{train,dev,test}.conllu, from https://universaldependencies.org)"
        )
        with reaching("the Hugging Face hub", instead):
            try:
                return datasets.load_dataset(self.repository, self._code)
            except ValueError as error:
                if "Couldn't find cache" in str(error):  # without a network, and with another treebank in the cache
                    raise ConnectionError(error) from None
                if "BuilderConfig" in str(error):
                    known = "codes are like en_ewt, grc_proiel"
                    raise DataError(f"task.treebank: {self.repository} has no {self._code!r} ({known})") from None
                raise

    def split(self, split: Split) -> Iterator[Sentence]:
        names = ("dev", "validation") if split == "validation" else (split,)  # the older releases' name comes second
        name = next((name for name in names if name in self._dataset), None)
        if name is None:
            raise DataError(f"task.treebank: {self._code} has no {names[0]} split; take one that has all three")
        column = self._tags.name
        data = self._dataset[name]
        if missing := [c for c in ("tokens", column) if c not in data.column_names]:
            raise DataError(f"{self.name}, {name}: no column {missing[0]!r}, only {', '.join(data.column_names)}")
        rows = data.select_columns(["tokens", column])
        labels = getattr(getattr(rows.features[column], "feature", None), "names", None)  # else the tags are strings
        for number, row in enumerate(rows):
            where = f"{self.name}, {name}, row {number}"
            words, tags = row["tokens"], row[column]
            if len(words) != len(tags):
                raise DataError(f"{where}: {len(words)} words and {len(tags)} tags")
            if not all(words):
                raise DataError(f"{where}: a word is empty")
            if words:
                yield Sentence(words, [self._tag(tag, labels, where) for tag in tags])

    def _tag(self, tag: Any, labels: list[str] | None, where: str) -> str:
        if labels is not None and tag is not None:
            if not 0 <= tag < len(labels):
                raise DataError(f"{where}: label {tag} of {self._tags.name}, which has {len(labels)} names")
            tag = labels[tag]
        if tag in (None, "", MISSING):
            if self._tags is Tags.upos:
                raise DataError(f"{where}: a word has no UPOS")
            return MISSING
        return str(tag)
