"""Small pictures side by side: one panel a title, lines with bands, one legend for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from pandas import DataFrame

from caspr_cli.report import style
from caspr_cli.report.answer import Figure
from caspr_cli.report.style import Style

WIDTH, HEIGHT = 6.4, 1.75  # inches: of the figure, and of one row of panels
COLUMNS = 2


@dataclass(frozen=True)
class Line:
    """A mean over x, with a band of plus and minus one standard deviation if there is one."""

    label: str
    x: Sequence[float]
    mean: Sequence[float]
    sd: Sequence[float] = ()


def over(frame: DataFrame, x: str, columns: Mapping[str, str]) -> list[Line]:
    """Return the mean and the standard deviation of columns at each value of ``x``.

    Args:
        columns: by label.
    """
    groups = frame.groupby(x, sort=True)
    found = []
    for label, column in columns.items():
        mean, sd = groups[column].mean(), groups[column].std().fillna(0.0)
        found.append(Line(label, mean.index.tolist(), mean.tolist(), sd.tolist()))
    return found


def figure(
    name: str,
    title: str,
    panels: Mapping[str, Sequence[Line]],
    styles: Mapping[str, Style],
    *,
    y: str,
    x: str = "step",
    form: str = ".3g",
    log: bool = True,
    finish: Callable[[Axes], object] = lambda axes: None,
    legend_columns: int = 3,
) -> Figure:
    """Return a figure of some panels, by their titles; what it shows is also said in words.

    Args:
        form: of numbers in words.
        log: whether x is logarithmic.
        finish: what else is done to each axes, as a limit or a scale.
    """
    ends = (
        f"{panel}: " + ", ".join(f"{line.label} from {line.mean[0]:{form}} to {line.mean[-1]:{form}}" for line in lines)
        for panel, lines in panels.items()
    )
    alt = f"{title} {'; '.join(ends)}."
    rows, lines = -(-len(panels) // COLUMNS), -(-len(styles) // legend_columns)
    with style.drawing():
        canvas = Canvas(figsize=(WIDTH, HEIGHT * rows + 0.19 * lines + 0.2), layout="constrained")
        axes = canvas.subplots(rows, COLUMNS, squeeze=False).flatten()
        for place, (panel, shown) in enumerate(panels.items()):
            _draw(axes[place], panel, shown, styles, log=log)
            finish(axes[place])
            if place % COLUMNS == 0:
                axes[place].set_ylabel(y)
            if place + COLUMNS >= len(panels):
                axes[place].set_xlabel(x)
        for unused in axes[len(panels) :]:
            unused.set_axis_off()
        handles = [Line2D([], [], color=s.colour, linestyle=cast(Any, s.dash), linewidth=1.6) for s in styles.values()]
        canvas.legend(handles, list(styles), loc="outside lower left", ncols=legend_columns, fontsize=8, handlelength=3)
        return Figure(name, title, style.to_svg(canvas, name, alt), alt)


def logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, without powers of ten, which need mathematical text that figures do not have."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.minorticks_off()


def _draw(axes: Axes, title: str, lines: Sequence[Line], styles: Mapping[str, Style], *, log: bool) -> None:
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_axisbelow(True)
    axes.grid(axis="y")
    for line in lines:
        colour = styles[line.label].colour
        axes.plot(line.x, line.mean, color=colour, linestyle=styles[line.label].dash, linewidth=1.5)
        if any(line.sd):
            low, high = ([m + k * s for m, s in zip(line.mean, line.sd, strict=True)] for k in (-1, 1))
            axes.fill_between(line.x, low, high, color=colour, alpha=0.1, linewidth=0)
    if log:
        axes.set_xscale("log")
        ticks = sorted({value for line in lines for value in line.x})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
