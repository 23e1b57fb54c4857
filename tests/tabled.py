"""Tables of records that were never run, for tests of what is said of them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from recorded import run

from caspr_cli.report import figures
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


def reaching(task: str, steps: dict[str, float | None], target: float | None = 1.0, second: float = 2.0) -> Table:
    """A table of runs that reach the target of 1 at these steps, or never."""
    return table([
        run(optim, 0, 2.0 if step is None else 0.5, curve=[(step or 9, second * (step or 9), 0.5 if step else 2.0)],
            task__name=task, task__target__value=target)
        for optim, step in steps.items()
    ])  # fmt: skip


def axes_drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Axes]]:
    """Return a function that draws a figure, and returns its axes as matplotlib has them."""
    made: list[Figure] = []
    monkeypatch.setattr(figures, "to_svg", lambda figure, name, alt: made.append(figure) or alt)

    def draw(figure: Callable[..., str], *args: object) -> list[Axes]:
        assert figure(*args)
        made[-1].draw_without_rendering()
        return made[-1].axes

    return draw
