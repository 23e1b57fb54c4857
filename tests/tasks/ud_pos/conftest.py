"""A small treebank, and the real one if it is available."""

from functools import partial
from pathlib import Path

import pytest
from written import recipe, write_treebank


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_treebank(tmp_path / "treebank")


@pytest.fixture
def conf(root: Path) -> partial[object]:
    """Small recipes over ``root``."""
    return partial(recipe, "ud_pos", root)


@pytest.fixture
def ewt(shared: Path) -> Path:
    return shared / "ud" / "UD_English-EWT"
