"""Small corpora."""

from functools import partial
from pathlib import Path

import pytest
from written import prose, recipe, write_shards

from caspr_cli.tasks.c4_lm import sources


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards")


@pytest.fixture
def conf(shards: Path) -> partial[object]:
    """Small recipes over ``shards``."""
    return partial(recipe, "c4_lm", shards)


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
