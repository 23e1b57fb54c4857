"""Many ranks of which one alone is there: what it sends and receives, and no numbers."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist


class Sent:
    """A collective whose numbers nobody reads."""

    calls = 0
    most_in_flight = in_flight = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        Sent.calls, Sent.in_flight = Sent.calls + 1, Sent.in_flight + 1
        Sent.most_in_flight = max(Sent.in_flight, Sent.most_in_flight)

    def wait(self) -> None:
        Sent.in_flight -= 1


@contextmanager
def many(ranks: int) -> Iterator[None]:
    """Be the first of so many ranks, of which the others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    Sent.calls = Sent.most_in_flight = Sent.in_flight = 0
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("caspr_cli.optim.divide.agree", lambda params, team: None)
            patch.setattr("caspr_cli.optim.shard.all_gather", Sent)
            patch.setattr("caspr_cli.optim.plan.AT_ONCE", math.inf)
            yield
    finally:
        dist.destroy_process_group()
