"""At which step of an interval each block has new roots."""

from __future__ import annotations

from collections.abc import Sequence

# An eigendecomposition of n x n with its root takes about the time of this many n^3 FLOPs of matrix products
# (measured with `n` 128 to 512 on two cores: 48 to 17).
EIGH_FLOPS = 25

# First roots that together cost at most so many FLOPs, a second or two on one core, are computed in one step.
AT_ONCE = 1e11


def phases(costs: Sequence[float], interval: int) -> list[int]:
    """Return a step of the interval (0 ... interval - 1) for each item, such that all steps cost about the same.

    The longest item first, each to the step that has least so far: at most 4/3 of the best there is (Graham 1969).
    Fewer items than steps are spread evenly. The result is a pure function of the arguments: a run that was cut off
    finds the same turns.

    >>> phases([1, 4, 2, 3], 2)
    [0, 0, 1, 1]
    >>> phases([1, 1], 10)
    [0, 5]
    """
    turns = min(int(interval), len(costs))
    loads, result = [0.0] * turns, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        turn = loads.index(min(loads))
        loads[turn] += costs[item]
        result[item] = int(turn * interval // turns)
    return result
