"""Few of the drawn shapes."""

import pytest

from caspr_cli.tasks.images import sources


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SAMPLE", {"train": 60, "validation": 20, "test": 20})
