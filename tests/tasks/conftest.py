"""A cache of its own for each test, and real data if they are available."""

from pathlib import Path

import pytest

from caspr_cli import tasks


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where this test's cache is."""
    monkeypatch.setenv("CASPR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shared():
    """Real data for development, beside the checkout."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared data beside the checkout")
    return folder


@pytest.fixture
def task(conf):
    """The task of the small recipe ``conf``, its data prepared."""
    made = tasks.load(conf(), seed=0)
    made.prepare()
    return made
