"""Ranks of tests: what one call leaves behind does not reach the next."""

import time

import pytest
from ranks import Ranks


def late(rank: int, seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_a_late_answer_is_not_that_of_the_next_call() -> None:
    ranks = Ranks(1)
    try:
        assert ranks(late, 0.0) == [0.0]
        with pytest.raises(AssertionError, match="rank 0 does not answer"):
            ranks(late, 3.0, timeout=0.1)
        assert ranks(late, 0.5) == [0.5]
    finally:
        ranks.close()
