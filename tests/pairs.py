"""Tables of options that are much shorter than all combinations."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def pairs(grid: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of options in which any two values of any two options stand together at least once.

    Most faults need one option or two that interact; for those, these rows find what all combinations would find.
    """
    choose = random.Random(seed)
    places = {name: range(len(values)) for name, values in grid.items()}
    open_pairs = {
        ((a, i), (b, j)): None for a, b in itertools.combinations(grid, 2) for i in places[a] for j in places[b]
    }

    def new_pairs(row: Mapping[str, int], name: str, i: int) -> int:
        order = list(grid)
        sides = (sorted(((name, i), (other, j)), key=lambda side: order.index(side[0])) for other, j in row.items())
        return sum(tuple(pair) in open_pairs for pair in sides)

    rows = []
    while open_pairs:
        row = dict(next(iter(open_pairs)))
        for name in choose.sample(list(grid), len(grid)):
            if name not in row:
                row[name] = max(choose.sample(places[name], len(places[name])), key=lambda i: new_pairs(row, name, i))
        row = {name: row[name] for name in grid}
        for pair in itertools.combinations(row.items(), 2):
            open_pairs.pop(pair, None)
        rows.append({name: grid[name][i] for name, i in row.items()})
    return rows
