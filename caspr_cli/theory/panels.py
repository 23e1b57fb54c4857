"""Small pictures side by side: one panel a title, lines with bands, one legend for all."""

from collections.abc import Callable, Mapping
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


def figure(
    name: str,
    title: str,
    data: DataFrame,
    styles: Mapping[str, Style],
    columns: tuple[str, str, str, str],
    *,
    unit: str | None = None,
    form: str = ".3g",
    log: bool = True,
    finish: Callable[[Axes], object] = lambda axes: None,
    legend_columns: int = 3,
) -> Figure:
    """Return a figure with a panel for each value of the first column, in their order, and a line for each style.

    A line shows the mean over the rows with the same x, and a band of one standard deviation on both sides.

    Args:
        columns: of ``data``: the panel, the line, x and y. Rows whose line has no style are left out.
        unit: the label of the y axes, by default the name of that column.
        form: of the numbers in the alternative text, which says where each line begins and ends.
        log: whether x is logarithmic; ``finish`` is what else is done to each axes.
    """
    panel, line, x, y = columns
    data = data[data[line].isin(list(styles))]
    groups = dict(iter(data.groupby(panel, sort=False)))
    rows, lines = -(-len(groups) // COLUMNS), -(-len(styles) // legend_columns)
    ends = []
    with style.drawing():
        canvas = Canvas(figsize=(WIDTH, HEIGHT * rows + 0.19 * lines + 0.2), layout="constrained")
        places = canvas.subplots(rows, COLUMNS, squeeze=False).flatten()
        for k, (place, (text, own)) in enumerate(zip(places, groups.items(), strict=False)):
            by = own.groupby([x, line])[y]
            means, sds = (found.unstack().reindex(columns=list(styles)) for found in (by.mean(), by.std()))
            _draw(place, str(text), means, sds, styles, log=log)
            finish(place)
            place.set_ylabel((y if unit is None else unit) if k % COLUMNS == 0 else "")
            place.set_xlabel(x if k + COLUMNS >= len(groups) else "")
            drawn = ((label, mean.dropna()) for label, mean in means.items())
            said = [f"{label} from {v.iloc[0]:{form}} to {v.iloc[-1]:{form}}" for label, v in drawn if len(v)]
            ends.append(f"{text}: {', '.join(said)}")
        for unused in places[len(groups) :]:
            unused.set_axis_off()
        handles = [Line2D([], [], color=s.colour, linestyle=cast(Any, s.dash), linewidth=1.6) for s in styles.values()]
        canvas.legend(handles, list(styles), loc="outside lower left", ncols=legend_columns, fontsize=8, handlelength=3)
        alt = f"{title} {'; '.join(ends)}."
        return Figure(name, title, style.to_svg(canvas, name, alt), alt)


def logarithmic(**properties: Any) -> Callable[[Axes], None]:
    """Return what makes a y axis logarithmic, and sets properties of the axes, as ``ylim``.

    Ticks are no powers of ten, which need mathematical text that figures do not have.
    """

    def finish(axes: Axes) -> None:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.set(**properties)
        axes.minorticks_off()

    return finish


def _draw(axes: Axes, title: str, means: DataFrame, sds: DataFrame, styles: Mapping[str, Style], *, log: bool) -> None:
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_axisbelow(True)
    axes.grid(axis="y")
    for label, one in styles.items():
        mean = means[label].dropna()
        sd = sds.loc[mean.index, label].fillna(0.0)
        axes.plot(mean.index, mean, color=one.colour, linestyle=one.dash, linewidth=1.5)
        if sd.any():
            axes.fill_between(mean.index, mean - sd, mean + sd, color=one.colour, alpha=0.1, linewidth=0)
    if log:
        axes.set_xscale("log")
        axes.set_xticks(list(means.index), [f"{tick:g}" for tick in means.index])
        axes.minorticks_off()
