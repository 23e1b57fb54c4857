"""A small treebank, and the real one if it is available."""

from functools import partial

import pytest
from written import recipe, write_treebank


@pytest.fixture
def root(tmp_path):
    return write_treebank(tmp_path / "treebank")


@pytest.fixture
def conf(root):
    """Small recipes over ``root``."""
    return partial(recipe, "ud_pos", root)


@pytest.fixture
def ewt(shared):
    return shared / "ud" / "UD_English-EWT"
