"""Figures of all trials: the value at the end against the learning rate, and against each other tuned key."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from caspr_cli.report import format
from caspr_cli.report.figures import WIDTH, Styles, axes_of, drawn, legend, note, svg_of, window
from caspr_cli.report.model import Row, Table
from caspr_cli.report.selection import ALWAYS_TUNED
from caspr_cli.report.settings import plain, ranges, short
from caspr_cli.report.style import DASHDOT, DASHED, DOTTED, SOLID, Style, drawing
from caspr_cli.report.style import styles as styles_for
from caspr_cli.report.trials import number, outcomes, tried, varied, width

COLUMNS, PANEL = 2, 1.75  # of small multiples; inches of the height of each
DECADE = 10.0  # values over more than this factor stand on a logarithmic axis
DASHES = (SOLID, DASHED, DASHDOT, DOTTED)
MARKERS = (("o", True), ("o", False), ("s", True), ("s", False))  # shape, and whether it is filled, for each dash
BY_RATE = (
    "Each trial by its learning rate, at the seed that selects; star: the selected one. ×: the factor over which rates "
    "are within 1 % of the best value, interpolated along the line (≥: up to an end of what was tried). Crosses at "
    "the edge failed or diverged, triangles lie beyond it."
)
JOINT = (
    "Where other keys vary as well, the line joins the trials that none farther from the best on the same side "
    "surpasses: other values of these keys are part of what it shows."
)
BY_OTHERS = (
    "The same trials by each other tuned key. All keys vary at once, so a good trial beside a bad one may be so by "
    "another key: these are dots, not effects. Stars, crosses and triangles as before."
)


def about_rates(table: Table) -> str:
    """Return the caption of :func:`by_rate`."""
    return f"{BY_RATE} {JOINT}" if any(varied(row) != [ALWAYS_TUNED] for row in tried(table)) else BY_RATE


def by_rate(table: Table, styles: Styles | None = None) -> str:
    """Draw the value of each trial by its learning rate, one line a row, with the width of the range of good ones."""
    found = {row.label: wide for row in tried(table) if (wide := width(row))}
    rows = [row for row in table.rows if row.label in found]
    if not rows:
        return ""
    styles = styles or styles_for(row.label for row in table.rows)
    with drawing():
        figure, axes = axes_of(table.metric, "learning rate")
        axes.set_xscale("log")
        axes.set_ylim(_range(rows))
        for place, row in enumerate(rows):
            axes.plot(*zip(*found[row.label].line, strict=True), **drawn(styles[row.label]), zorder=1.9)
            dots(axes, row, ALWAYS_TUNED, place, styles[row.label], x_of=_rate)
        _ticks(axes)
        legend(figure, {label: f"{label}, {wide.factor}" for label, wide in found.items()}, styles)
        missing = [row.label for row in table.rows if row.label not in found and not row.untuned]
        note(axes, "fewer than two rates with a value", missing)
        ends = [
            f"{label} {format.number(wide.best[1])} at {plain(wide.best[0])}, within 1 % {wide.factor}"
            for label, wide in found.items()
        ]
        return svg_of(figure, table, "rates", f"{table.metric} on {table.task} by learning rate. {'; '.join(ends)}")


def by_others(table: Table, styles: Styles | None = None) -> str:
    """Draw the value of each trial by each tuned key but the learning rate, in panels with one vertical axis."""
    rows = tried(table)
    keys = sorted({key for row in rows for key in varied(row)} - {ALWAYS_TUNED})
    if not keys:
        return ""
    styles = styles or styles_for(row.label for row in table.rows)
    lines = math.ceil(len(keys) / COLUMNS)
    drawn_as = {key: kind for row in rows for run in row.records for key, (kind, _) in ranges(run.config).items()}
    with drawing():
        figure = Figure(figsize=(WIDTH, 0.2 + PANEL * lines), layout="constrained")
        panels = list(figure.subplots(lines, min(COLUMNS, len(keys)), sharey=True, squeeze=False).flat)
        for panel, key in zip(panels, keys, strict=False):
            name, logarithmic, x_of = _axis(rows, key, drawn_as.get(key))
            panel.set_xlabel(name)
            panel.set_xscale("log" if logarithmic else "linear")
            panel.set_ylim(_range(rows))
            for place, row in enumerate(rows):
                dots(panel, row, key, place, styles[row.label], x_of=x_of)
            if x_of is not plain:  # words have places of their own
                _ticks(panel)
        for panel in panels[len(keys) :]:
            panel.set_visible(False)
        figure.supylabel(table.metric, fontsize=9)
        legend(figure, {row.label: row.label for row in rows}, styles, _dot)
        what = ", ".join(short(key) for key in keys)
        return svg_of(figure, table, "keys", f"{table.metric} on {table.task} of all trials by {what}, each in a panel")


def _range(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the vertical range: from the best trial of all to the worst of the rows' median trials."""
    ends, higher = [], rows[0].higher_is_better
    for row in rows:
        values = sorted((value for value in row.scores.values() if value is not None), reverse=higher)
        ends += [values[0], values[len(values) // 2]]
    return window(ends, higher=higher)


def dots(axes: Axes, row: Row, key: str, place: int, style: Style, x_of: Callable[[Any], Any]) -> None:
    """Draw the trials of a row: those without a value, and those far off, at the edge where the worst would be.

    By the ``place`` of the row marks at the edge do not hide each other; ``x_of`` says where a value stands, if at all.
    """
    (low, high), inwards = axes.get_ylim(), 0.02 + 0.022 * (place % 8)
    at_edge = inwards if row.higher_is_better else 1 - inwards
    edge: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "zorder": 3}
    how = _dot(style)
    for one in outcomes(row):
        value = one.trial.values.get(key)
        if value is None or not one.trial.ended or (x := x_of(value)) is None:
            continue
        mark = "x" if one.value is None else "v" if one.value < low else "^"
        if one.value is not None and low <= one.value <= high:
            star = {"marker": "*", "markersize": 11, "zorder": 4} if one.best else {}
            axes.plot([x], [one.value], **how | {"zorder": 3} | star)
        else:
            axes.plot([x], [at_edge], **how | edge | {"marker": mark, "markersize": 4.5})


def _dot(style: Style) -> dict[str, Any]:
    """Return the marker of a row's trials; like the dashes of lines, it distinguishes rows of one hue."""
    marker, filled = MARKERS[DASHES.index(style.dash)]
    how: dict[str, Any] = {"color": style.colour, "linestyle": "none", "marker": marker, "markersize": 3.8}
    return how | {"markeredgewidth": 1.1} | ({} if filled else {"markerfacecolor": "none"})


def _rate(value: Any) -> float | None:
    return value if number(value) and value > 0 else None


def _axis(rows: Sequence[Row], key: str, kind: str | None) -> tuple[str, bool, Callable[[Any], Any]]:
    """Return the name of a key's axis, whether it is logarithmic, and where a value stands on it.

    ``kind``: how searches draw it. Without one, positive numbers over more than a decade are logarithmic.
    """
    name = short(key)
    values = [value for row in rows for trial in row.trials if (value := trial.values.get(key)) is not None]
    numbers = [value for value in values if number(value)]
    if len(numbers) < len(values):
        return name, False, plain
    if kind == "one_minus_log" and max(numbers) < 1:
        return f"1 - {name}", True, lambda value: 1 - value
    least, most = min(numbers), max(numbers)
    return name, least > 0 and (kind == "log" or most > DECADE * least), lambda value: value


def _ticks(axes: Axes) -> None:
    """Label 1, 2 and 5 of each decade of a logarithmic axis, in plain digits, where that is not too many."""
    if axes.get_xscale() != "log":
        axes.xaxis.set_major_locator(MaxNLocator(4))
        return
    low, high = axes.get_xlim()
    decades = math.log10(high / low)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.6 else (1, 3) if decades < 3 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
