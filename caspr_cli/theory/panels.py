"""Small pictures side by side: one panel a task, lines with bands over steps, one legend for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from caspr_cli.report import look
from caspr_cli.report.look import Style

WIDTH, HEIGHT = 6.4, 1.75  # inches: of the figure, and of one row of panels
COLUMNS = 2


@dataclass(frozen=True)
class Line:
    """A mean over steps, with a band of plus and minus one standard deviation."""

    label: str
    x: Sequence[float]
    mean: Sequence[float]
    sd: Sequence[float]


Panels = Mapping[str, Sequence[Line]]


def drawn(
    panels: Panels,
    styles: Mapping[str, Style],
    *,
    name: str,
    alt: str,
    y: str,
    x: str = "step",
    log: bool = True,
    finish: Callable[[Axes], object] = lambda axes: None,
    legend_columns: int = 3,
) -> str:
    """The SVG of some panels, by title.

    Args:
        log: whether x is logarithmic.
        finish: what else is done to each axes, as a limit or a scale.
    """
    rows = -(-len(panels) // COLUMNS)
    lines = -(-len(styles) // legend_columns)
    with look.drawing():
        figure = Figure(figsize=(WIDTH, HEIGHT * rows + 0.19 * lines + 0.2), layout="constrained")
        axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
        for place, (title, shown) in enumerate(panels.items()):
            panel(axes[place], title, shown, styles, log=log)
            finish(axes[place])
            if place % COLUMNS == 0:
                axes[place].set_ylabel(y)
            if place + COLUMNS >= len(panels):
                axes[place].set_xlabel(x)
        for spare in axes[len(panels) :]:
            spare.set_axis_off()
        handles = [Line2D([], [], color=s.colour, linestyle=cast(Any, s.dash), linewidth=1.6) for s in styles.values()]
        figure.legend(handles, list(styles), loc="outside lower left", ncols=legend_columns, fontsize=8, handlelength=3)
        return look.to_svg(figure, name, alt)


def logarithmic(axes: Axes) -> None:
    """The y axis, with numbers as people write them: powers with exponents need mathematics, which figures have not."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.minorticks_off()


def panel(axes: Axes, title: str, lines: Sequence[Line], styles: Mapping[str, Style], *, log: bool) -> None:
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_axisbelow(True)
    axes.grid(axis="y")
    for line in lines:
        style = styles[line.label]
        axes.plot(line.x, line.mean, color=style.colour, linestyle=style.dash, linewidth=1.5)
        if any(line.sd):
            low, high = ([m + k * s for m, s in zip(line.mean, line.sd, strict=True)] for k in (-1, 1))
            axes.fill_between(line.x, low, high, color=style.colour, alpha=0.1, linewidth=0)
    if log:
        axes.set_xscale("log")
        ticks = sorted({value for line in lines for value in line.x})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
