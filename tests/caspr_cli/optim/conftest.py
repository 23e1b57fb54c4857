from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    processes = Ranks(2)
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    processes = Ranks(4)
    yield processes
    processes.close()


@pytest.fixture(params=["two", pytest.param("four", marks=pytest.mark.release)])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    processes: Ranks = request.getfixturevalue(request.param)
    return processes
