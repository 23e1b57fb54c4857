from collections.abc import Iterator
from pathlib import Path

import pytest
from running import Runner


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    made = Runner(tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("cache"))
    yield made
    made.end()


@pytest.fixture(scope="session")
def whole(runner: Runner) -> Path:
    """The record of a run that nothing befell."""
    assert "Traceback" not in runner("output_dir=whole")
    return runner.record("whole")
