"""Small molecule files in OGB's layout."""

from collections.abc import Callable
from pathlib import Path

import pytest
from written import Tables, molecule_tables, recipe, write_molecules

from caspr_cli.recipe.schema import TaskConf


@pytest.fixture
def tables() -> Tables:
    """Lines of each file, to be changed before they are written."""
    return molecule_tables()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Tables], Path]:
    """Write tables as the data set ``tmp_path/pcba``."""
    return lambda tables: write_molecules(tmp_path / "pcba", tables)


@pytest.fixture
def conf(write: Callable[[Tables], Path], tables: Tables) -> Callable[..., TaskConf]:
    """Recipes with a small model over files written from ``tables``."""
    return lambda **changes: recipe("ogbg_molpcba", write(tables), **changes)
