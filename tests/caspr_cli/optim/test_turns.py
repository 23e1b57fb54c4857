"""Which step of an interval is whose turn."""

import itertools
import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from caspr_cli.optim.schedule import phases

COSTS = st.lists(st.integers(1, 1000), min_size=1, max_size=60)
INTERVALS = st.integers(1, 40)


def loads(costs: list[int], steps: list[int], interval: int) -> list[int]:
    """The cost of each step of the interval."""
    return [sum(cost for cost, s in zip(costs, steps, strict=True) if s == step) for step in range(interval)]


def least_possible(costs: list[int], interval: int) -> int:
    """The heaviest step of the best of all ways there are."""
    ways = itertools.product(range(interval), repeat=len(costs) - 1)  # the first item's step is as good as any
    return min(max(loads(costs, [0, *rest], interval)) for rest in ways)


@given(COSTS | st.just([]), INTERVALS)
def test_every_item_has_a_step_of_the_interval_and_always_the_same(costs: list[int], interval: int) -> None:
    before = list(costs)
    found = phases(costs, interval)
    assert len(found) == len(costs)
    assert all(0 <= step < interval for step in found)
    assert phases(tuple(costs), interval) == found
    assert costs == before


@given(COSTS, INTERVALS, st.randoms(use_true_random=False))
def test_the_order_of_items_does_not_matter(costs: list[int], interval: int, shuffle: random.Random) -> None:
    """Items of different costs keep their steps; those of the same cost may swap."""
    order = list(range(len(costs)))
    shuffle.shuffle(order)
    found, other = phases(costs, interval), phases([costs[i] for i in order], interval)
    assert sorted(zip(costs, found, strict=True)) == sorted(zip([costs[i] for i in order], other, strict=True))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_heaviest_step_is_at_most_four_thirds_of_the_best(costs: list[int], interval: int) -> None:
    """Graham (1969): (4 - 1/m) / 3 of it, for m steps."""
    heaviest = max(loads(costs, phases(costs, interval), interval))
    assert 3 * interval * heaviest <= (4 * interval - 1) * least_possible(costs, interval)


@given(st.integers(1, 60), INTERVALS)
def test_equal_items_are_dealt_like_cards(count: int, interval: int) -> None:
    counts = loads([1] * count, phases([1] * count, interval), interval)
    assert max(counts) == math.ceil(count / interval)
    if count >= interval:
        assert min(counts) == count // interval


@given(COSTS, INTERVALS)
def test_fewer_items_than_steps_are_spread_evenly(costs: list[int], interval: int) -> None:
    if len(costs) > interval:
        return
    steps = sorted(phases(costs, interval))
    gaps = [b - a for a, b in itertools.pairwise([*steps, steps[0] + interval])]
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) >= 1
