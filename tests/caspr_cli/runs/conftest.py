from collections.abc import Iterator

import pytest
from running import Runner


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    made = Runner(tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("cache"))
    yield made
    made.end()
