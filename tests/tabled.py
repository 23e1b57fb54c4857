"""Tables of records that were never run, for tests of what is said of them."""

from collections.abc import Sequence
from typing import Any

from recorded import run

from caspr_cli.report.compare import tables
from caspr_cli.report.model import Row, Run, Table


def table(runs: Sequence[Run], **how: Any) -> Table:
    (made,) = tables(runs, **how)
    return made


def row(made: Table, label: str) -> Row:
    (found,) = [each for each in made.rows if each.label == label]
    return found


def seeds(optim: str, values: Sequence[float | None], first: int = 0, **keys: Any) -> list[Run]:
    return [run(optim, first + k, value, **keys) for k, value in enumerate(values)]


def warned(made: Table, *words: str) -> bool:
    return any(all(word in line for word in words) for line in made.warnings)


def searched(optim: str, values: Sequence[float | None], seed: int = 0, **keys: Any) -> list[Run]:
    """A trial for each value, at learning rates that grow; None: failed."""
    return [
        run(optim, seed, v, "failed" if v is None else "done", optim__lr=10.0 ** (k - 4), **keys)
        for k, v in enumerate(values)
    ]
