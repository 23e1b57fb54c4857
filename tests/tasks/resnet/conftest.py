"""A cache of its own for each test, and few of the drawn shapes."""

from pathlib import Path

import pytest

from tasks.images import sources


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASPR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "SAMPLE", {"train": 60, "validation": 20, "test": 20})
