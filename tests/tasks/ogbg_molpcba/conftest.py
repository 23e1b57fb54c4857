"""Small molecule files in OGB's layout."""

import pytest
from written import molecule_tables, recipe, write_molecules


@pytest.fixture
def tables():
    """Lines of each file, to be changed before they are written."""
    return molecule_tables()


@pytest.fixture
def write(tmp_path):
    """Write tables as the data set ``tmp_path/pcba``."""
    return lambda tables: write_molecules(tmp_path / "pcba", tables)


@pytest.fixture
def conf(write, tables):
    """Recipes with a small model over files written from ``tables``."""
    return lambda **changes: recipe("ogbg_molpcba", write(tables), **changes)
