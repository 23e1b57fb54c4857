"""A cache of its own for each test, and real data if they are available."""

from collections.abc import Callable
from pathlib import Path

import pytest

from caspr_cli import tasks
from caspr_cli.recipe.schema import TaskConf
from caspr_cli.tasks.base import Task


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's cache is."""
    monkeypatch.setenv("CASPR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shared() -> Path:
    """Real data for development, beside the checkout."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared data beside the checkout")
    return folder


@pytest.fixture
def task(conf: Callable[[], TaskConf]) -> Task:
    """The task of the small recipe ``conf``, its data prepared."""
    made = tasks.load(conf(), seed=0)
    made.prepare()
    return made
