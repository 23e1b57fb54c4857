"""A cache of its own for each test, and small corpora."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from caspr_cli.recipe.schema import C4LMConf, Source
from tasks.c4_lm import sources

WORDS = "the of and a to in is you that it he was for on are as with his they at be this have from or one"


def write_shard(path: Path, texts: list[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text, "url": "http://example.org"}) + "\n")


def prose(count: int, seed: int) -> list[str]:
    """Documents of 40 words each."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS.split(), k=40)) + f" № {i}." for i in range(count)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's token files go."""
    monkeypatch.setenv("CASPR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "c4_lm"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A directory of two training shards (40 + 20 documents) and one of validation (21)."""
    root = tmp_path / "shards"
    root.mkdir()
    texts = prose(60, seed=0)
    write_shard(root / "c4-train.00000-of-00002.json.gz", texts[:40])
    write_shard(root / "c4-train.00001-of-00002.json.gz", texts[40:])
    write_shard(root / "c4-validation.00000-of-00001.json.gz", prose(21, seed=1))
    return root


@pytest.fixture
def conf(shards: Path) -> Callable[..., C4LMConf]:
    """Recipes over ``shards`` with a small vocabulary and model."""

    def make(**changes: object) -> C4LMConf:
        small = {"vocab_size": 300, "sequence": 16, "layers": 2, "width": 16, "heads": 2, "batch_size": 4}
        return C4LMConf(**{"data": Source.files, "root": str(shards), **small, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of 60 modules and 2 topics, in the place of Python's own."""
    root = tmp_path / "library"
    (root / "email").mkdir(parents=True)
    for i, text in enumerate(prose(60, seed=2)):
        folder = root / "email" if i % 2 else root
        (folder / f"module{i}.py").write_text(f'"""{text}"""\n', encoding="utf-8")
    monkeypatch.setattr(sources, "stdlib_root", lambda: root)
    monkeypatch.setattr(sources, "stdlib_topics", lambda: {"if": "The if statement.", "for": "The for statement."})
    return root
