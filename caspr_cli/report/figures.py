"""The figures of a report, as SVG text; empty where there is nothing to draw."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from caspr_cli.common.format import count, listed
from caspr_cli.report.format import interval as interval_text
from caspr_cli.report.format import number
from caspr_cli.report.model import Row, Table
from caspr_cli.report.profile import LONGEST, Profile, names, rho
from caspr_cli.report.selection import with_common_labels
from caspr_cli.report.stats import summary
from caspr_cli.report.style import INK, MUTED, Style, drawing, to_svg
from caspr_cli.report.style import styles as styles_for

WIDTH, HEIGHT = 5.6, 3.6  # inches; small, so that text stays readable where a page is narrow
LABELLED, LONGEST_LABEL = 9, 22  # so many lines at most are labelled at their ends, with so many characters
FAR = 8.0  # times the distance of the median end from the best: too far for an axis that others share
PANELS = 3  # side by side, in one figure of several tables
SETTLED = 0.4  # share of the training after which the best row should be seen
BAND = 3  # seeds from which on a curve has a band: at two the interval is nine standard deviations to each side
Styles = Mapping[str, Style]
Ends = Sequence[tuple[str, float, float]]  # label, x and y


# ---- curves ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """The mean of a row over its validations."""

    label: str
    n: int  # runs that are averaged: the finished ones, or those there are if none is
    finished: bool  # whether `n` counts finished runs
    steps: tuple[int, ...]
    seconds: tuple[float, ...] | None  # the median at each step; None if a run has no times
    mean: tuple[float, ...]
    band: tuple[tuple[float, ...], ...] = ()  # the lower and the upper ends of its 95 % intervals, from `BAND` seeds on
    singles: tuple[tuple[float, ...], ...] = ()  # the values of each run, where there are two


def curve(row: Row) -> Curve | None:
    """Return the mean of a row at the steps where all its runs have a finite value; None if there is none."""
    done = [run for run in row.runs if run.final is not None]
    runs = done or [run for run in row.runs if run.curve]
    by_step = [{point.step: point for point in run.curve if point.value is not None} for run in runs]
    steps = sorted(set.intersection(*map(set, by_step))) if runs else []
    if not steps:
        return None
    values = [[float(points[step].value or 0.0) for points in by_step] for step in steps]
    times = [[time for points in by_step if (time := points[step].seconds) is not None] for step in steps]
    mean = tuple(map(fmean, values))
    edges = [summary(own).ends or (m, m) for own, m in zip(values, mean, strict=True)]  # no band where all are equal
    band = tuple(zip(*edges, strict=True)) if len(runs) >= BAND else ()
    singles = tuple(zip(*values, strict=True)) if 1 < len(runs) < BAND else ()
    seconds = tuple(map(median, times)) if all(len(own) == len(runs) for own in times) else None
    return Curve(row.label, len(runs), bool(done), tuple(steps), seconds, mean, band, singles)


def curves(table: Table, over: str = "steps", styles: Styles | None = None) -> str:
    """Draw the mean of each row at each validation, with its 95 % interval (of two seeds: both lines), and the target.

    ``over``: ``steps``, or ``seconds`` of training, the median of the runs; then without rows that lack times.
    """
    shown = _shown(table, over)
    if not shown:
        return ""
    styles = styles or styles_for(row.label for row in table.rows)
    with drawing():
        figure, axes = axes_of(table.metric, "")
        ends = _draw(axes, table, shown, styles, over)
        more = {c.label: ", not finished" if not c.finished else f", n = {c.n}" if c.n < BAND else "" for c in shown}
        _labelled(figure, axes, ends, styles, more)
        missing = [row.label for row in table.rows if row.label not in {c.label for c in shown}]
        note(axes, "no curve" if over == "steps" else "times unknown", missing)
        return svg_of(figure, table, f"curves {over}", _alt(table, shown, over))


def together(tables: Sequence[Table], over: str = "steps") -> str:
    """Draw the curves of several tables as panels of one figure, with one legend: a row has one style in all panels."""
    tables = with_common_labels(tables)
    panels = [(name, table, _shown(table, over)) for name, table in zip(names(tables), tables, strict=True)]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return ""
    frequent = Counter(c.label for _, _, shown in panels for c in shown).most_common()
    styles = styles_for(label for label, _ in frequent)
    columns = min(PANELS, len(panels))
    lines = -(-len(panels) // columns)
    with drawing():
        figure = Figure(figsize=(3.1 * columns, 2.3 * lines), layout="constrained")
        places = list(figure.subplots(lines, columns, squeeze=False, subplot_kw={"axisbelow": True}).flatten())
        for axes, (name, table, shown) in zip(places, panels, strict=False):
            _draw(axes, table, shown, styles, over)
            better = "higher" if table.higher_is_better else "lower"
            # In place of a target that is out of range, whose words are of another colour.
            axes.set_title(name, loc="left", fontsize=10, fontweight="bold", color=INK)
            axes.set_ylabel(f"{table.metric} ({better} is better)", fontsize=8)
            axes.tick_params(labelsize=8)
        for unused in places[len(panels) :]:
            unused.set_axis_off()
        if len(panels) < len(places) and len(styles) <= LABELLED and max(map(len, styles)) <= LONGEST_LABEL:
            handles = [Line2D([], [], **drawn(one)) for one in styles.values()]
            places[-1].legend(handles, list(styles), loc="center", fontsize=9, handlelength=3)
        else:
            legend(figure, {label: label for label in styles}, styles, columns=2 * columns)
        alt = " ".join(f"{_alt(table, shown, over)}." for _, table, shown in panels)
        return to_svg(figure, f"curves {over} together", alt)


def _shown(table: Table, over: str) -> list[Curve]:
    """Return the curves of a table that can be drawn; none if all have a single point."""
    found = [c for row in table.rows if (c := curve(row)) and (over == "steps" or c.seconds is not None)]
    return found if any(len(c.steps) > 1 for c in found) else []


def _alt(table: Table, shown: Sequence[Curve], over: str) -> str:
    ends = "; ".join(f"{c.label} ends at {number(c.mean[-1])} (n = {c.n})" for c in shown)
    return f"{table.metric} on {table.task} over {over}. {ends}"


def _draw(axes: Axes, table: Table, shown: Sequence[Curve], styles: Styles, over: str) -> Ends:
    """Draw lines, bands and the target, and return where the lines end."""
    unit, scale = ("steps", 1.0) if over == "steps" else _unit(max(c.seconds[-1] for c in shown if c.seconds))
    xs = {c.label: [x / scale for x in (c.steps if over == "steps" else c.seconds or ())] for c in shown}
    for c in shown:
        marker, how = "o" if len(c.steps) == 1 else None, drawn(styles[c.label])
        axes.plot(xs[c.label], c.mean, **how, marker=marker, markersize=4, zorder=3)
        if c.band:
            alpha = 0.16 if len(shown) <= LABELLED else 0.08
            axes.fill_between(xs[c.label], c.band[0], c.band[1], color=how["color"], alpha=alpha, linewidth=0)
        for single in c.singles:
            axes.plot(xs[c.label], single, **how | {"linewidth": 0.7}, alpha=0.7, zorder=2)
    axes.set_ylim(_range_of(table, shown))
    low, high = axes.get_ylim()
    last = max(x[-1] for x in xs.values())
    first = min(_first(xs[c.label], c.mean, low, high) for c in shown)
    axes.set_xlim(max(first - 0.08 * (last - first), 0), last)
    axes.set_xlabel(unit)
    if over == "steps":
        whole_numbers(axes)
    _target(axes, table)
    return [(c.label, xs[c.label][-1], c.mean[-1]) for c in shown]


def whole_numbers(axes: Axes) -> None:
    """Put the ticks of the x axis at whole numbers, written as 1,000."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def drawn(style: Style) -> dict[str, Any]:
    return {"color": style.colour, "linestyle": style.dash, "linewidth": 1.6}


def _range_of(table: Table, shown: Sequence[Curve]) -> tuple[float, float]:
    """Return the range of values that shows the ends, the best of all, the end of the best row, and a near target."""
    finished = [c for c in shown if c.finished] or shown
    order = max if table.higher_is_better else min
    ends = [c.mean[-1] for c in finished]
    best = finished[ends.index(order(ends))]
    settled = bisect_left(best.steps, SETTLED * best.steps[-1])
    wanted = [best.mean[settled], order(value for c in finished for value in c.mean)]
    low, high = window(ends, wanted, higher=table.higher_is_better)
    if table.target is not None and low - 0.5 * (high - low) < table.target < high + 0.5 * (high - low):
        low, high = window(ends, [*wanted, table.target], higher=table.higher_is_better)
    return with_near([edge[-1] for c in finished for edge in c.band], low, high)


def _first(x: Sequence[float], y: Sequence[float], low: float, high: float) -> float:
    """Return the x of the last point before the line enters the vertical range."""
    inside = next((k for k, value in enumerate(y) if low <= value <= high), len(x) - 1)
    return x[max(inside - 1, 0)]


def _target(axes: Axes, table: Table) -> None:
    low, high = axes.get_ylim()
    if table.target is None:
        return
    if low <= table.target <= high:
        below = not table.higher_is_better  # the side that lines do not come from
        axes.axhline(table.target, color=MUTED, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        axes.annotate(
            f"target {table.target:g}", (0.01, table.target), xycoords=("axes fraction", "data"),
            xytext=(0, -2 if below else 2), textcoords="offset points", color=MUTED, fontsize=8,
            va="top" if below else "bottom",
        )  # fmt: skip
    else:
        place = "above" if table.target > high else "below"
        axes.set_title(f"target {table.target:g}: {place} this range", loc="left", color=MUTED, fontsize=8)


def _labelled(figure: Figure, axes: Axes, ends: Ends, styles: Styles, more: Mapping[str, str] | None = None) -> None:
    """Write names at the ends of lines, or a legend under the axes where names are too many or too long.

    A line that ends outside of the axes has its value beside its name.
    """
    low, high = sorted(axes.get_ylim())
    outside = {label: f" ↑ {y:.3g}" if y > high else f" ↓ {y:.3g}" if y < low else "" for label, _, y in ends}
    names = {label: f"{label}{(more or {}).get(label, '')}{outside[label]}" for label in outside}
    longest = max(map(len, names.values()))
    if len(ends) > LABELLED or longest > LONGEST_LABEL:
        legend(figure, names, styles)
        return
    wished = [min(max((y - low) / (high - low), 0.0), 1.0) for _, _, y in ends]
    places = apart([1 - w for w in wished] if axes.yaxis_inverted() else wished, 0.062, 0.0, 1.0)
    for (label, x, y), place in zip(ends, places, strict=True):
        axes.annotate(
            names[label], (x, min(max(y, low), high)), xytext=(1.035, place), textcoords="axes fraction",
            color=styles[label].colour, fontsize=8.5, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": styles[label].colour, "linewidth": 0.6, "shrinkA": 1,
                        "shrinkB": 1, "alpha": 0.9 if x == axes.get_xlim()[1] else 0.5},
        )  # fmt: skip


def legend(
    figure: Figure,
    names: Mapping[str, str],
    styles: Styles,
    drawn: Callable[[Style], dict[str, Any]] = drawn,
    columns: int = 3,
) -> None:
    """Write the names of lines under the axes, by label, and make room for them; in fewer columns if they are long."""
    longest = max(map(len, names.values()))
    columns = 1 if longest > 36 else 2 if longest > 14 else columns
    wrapped = [fill(name, 80) for name in names.values()]
    lines = math.ceil(sum(name.count("\n") + 1 for name in wrapped) / columns)
    figure.set_figheight(figure.get_figheight() + 0.17 * lines)
    handles = [Line2D([], [], **drawn(styles[label])) for label in names]
    figure.legend(handles, wrapped, loc="outside lower left", ncols=columns, fontsize=8, handlelength=3)


# ---- other figures -----------------------------------------------------------------------------------------------


def intervals(table: Table, styles: Styles | None = None) -> str:
    """Draw mean and 95 % interval of each row, with single seeds, and the interval of the baseline as a strip."""
    rows = table.rows
    means = [row.mean for row in rows if row.mean is not None]
    if not means:
        return ""
    styles = styles or styles_for(row.label for row in rows)
    low, high = window(means, higher=table.higher_is_better)
    low, high = with_near([edge for row in rows for edge in (*row.validation.ends, *row.values.values())], low, high)
    labels = [fill(row.label + f" (n\u00a0=\u00a0{row.n})" * (0 < row.n < BAND), 28) for row in rows]
    lines = max(label.count("\n") + 1 for label in labels)
    height = len(rows) * max(0.3 if len(labels) > LABELLED else 0.42, 0.16 * lines)
    with drawing():
        figure, axes = axes_of("", table.metric, height=0.75 + height)
        axes.set_xlim(low, high)
        for y, row in enumerate(rows):
            _interval(axes, y, row, styles[row.label])
            if row.is_baseline and row.n >= BAND and (ends := row.validation.ends):
                axes.axvspan(*ends, color=styles[row.label].colour, alpha=0.14, linewidth=0, zorder=0)
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        strip = [row.label for row in rows if row.is_baseline and row.n >= BAND]
        note(axes, "baseline, its interval as a strip", strip)
        said = "; ".join(f"{r.label} {number(r.mean)}, {interval_text(r.validation)} (n = {r.n})" for r in rows)
        return svg_of(figure, table, "intervals", f"Mean and 95 % interval of {table.metric} on {table.task}. {said}")


def with_near(values: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """Return the range, extended to those values that are not far outside."""
    room, margin = 0.5 * (high - low), 0.03 * (high - low)
    near = [value for value in values if low - room <= value <= high + room]
    return min([low, *(value - margin for value in near)]), max([high, *(value + margin for value in near)])


def _interval(axes: Axes, y: int, row: Row, style: Style) -> None:
    low, high = axes.get_xlim()
    if row.mean is None:
        axes.text(low, y, "  no run is done with a finite value", color=MUTED, fontsize=8, va="center")
        return
    if not low <= row.mean <= high:
        text, side = (f"{number(row.mean)} →", "right") if row.mean > high else (f"← {number(row.mean)}", "left")
        axes.text(high if side == "right" else low, y, text, color=style.colour, fontsize=8.5, ha=side, va="center")
        return
    seeds = list(row.values.values())
    axes.plot(seeds, [y + 0.24] * len(seeds), ".", color=style.colour, markersize=3.6, alpha=0.75, markeredgewidth=0)
    if row.validation.ends:
        width = 1.8 if row.n >= BAND else 0.7  # the interval of two reaches beyond the axes
        axes.plot(row.validation.ends, [y, y], color=style.colour, linewidth=width, solid_capstyle="butt")
    axes.plot([row.mean], [y], "o", color=style.colour, markersize=5.5)


def best_of(table: Table, styles: Styles | None = None) -> str:
    """Draw the expected best validation by the number of trials."""
    rows = [row for row in table.rows if len(row.best_of) > 1]
    if not rows:
        return ""
    styles = styles or styles_for(row.label for row in table.rows)
    with drawing():
        figure, axes = axes_of(f"best {table.metric}", "trials")
        for row in rows:
            trials = range(1, len(row.best_of) + 1)
            axes.plot(trials, row.best_of, **drawn(styles[row.label]), marker="o", markersize=3)
        wanted = [median(row.best_of[0] for row in rows)]
        axes.set_ylim(window([row.best_of[-1] for row in rows], wanted, higher=table.higher_is_better))
        axes.set_xlim(1, max(len(row.best_of) for row in rows))
        whole_numbers(axes)
        _labelled(figure, axes, [(row.label, len(row.best_of), row.best_of[-1]) for row in rows], styles)
        note(axes, "fewer than two trials", [row.label for row in table.rows if len(row.best_of) < 2])
        ends = [(row.label, row.best_of) for row in rows]
        said = [f"{name} {number(of[0])} after 1, {number(of[-1])} after {len(of)}" for name, of in ends]
        alt = f"Expected best {table.metric} on {table.task} by number of trials. {'; '.join(said)}"
        return svg_of(figure, table, "trials", alt)


def profile(found: Profile, styles: Styles | None = None) -> str:
    """Draw the performance profile, for times from once to four times the best."""
    if not found.tasks:
        return ""
    styles = styles or styles_for(found.ratios)
    with drawing():
        figure, axes = axes_of(f"share of {count(len(found.tasks), 'task')}", f"{found.unit} to target / fastest")
        for place, label in enumerate(found.scores):
            ratios = found.ratios[label]
            x = [1.0, *sorted(ratio for ratio in ratios if 1 < ratio <= LONGEST), LONGEST]
            width = min(1.4 + 0.6 * (len(found.scores) - 1 - place), 5)  # of lines that coincide all are seen
            how = drawn(styles[label]) | {"drawstyle": "steps-post", "linewidth": width}
            axes.plot(x, [rho(ratios, tau) for tau in x], **how)
        axes.set_xlim(1, LONGEST)
        axes.set_ylim(0, 1.03)
        _labelled(figure, axes, [(label, LONGEST, rho(found.ratios[label], LONGEST)) for label in found.scores], styles)
        scores = ", ".join(f"{label} {value:.2f}" for label, value in found.scores.items())
        alt = f"Share of tasks within a multiple of the fastest row's {found.unit} to target. Scores: {scores}"
        return to_svg(figure, f"profile {found.unit}", alt)


def axes_of(y: str, x: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y, axisbelow=True)
    return figure, axes


def svg_of(figure: Figure, table: Table, what: str, alt: str) -> str:
    return to_svg(figure, f"{table.task} {table.scale} {table.data} {table.metric} {what}", alt)


def note(axes: Axes, what: str, labels: Sequence[str]) -> None:
    """Write a note about some rows under the axis, if there are any; many or long labels are only counted."""
    named = listed(labels)
    named = named if len(what) + len(named) < 80 else count(len(labels), "row")
    if labels:
        axes.set_xlabel(f"{axes.get_xlabel()}\n{what}: {named}")


def _unit(longest: float) -> tuple[str, float]:
    """Return the unit for times up to ``longest`` seconds, in words, and its length in seconds."""
    if longest < 180:
        return "seconds of training", 1.0
    return ("minutes of training", 60.0) if longest < 3 * 3600 else ("hours of training", 3600.0)


# ---- ranges of axes ---------------------------------------------------------------------------


def window(ends: Sequence[float], wanted: Sequence[float] = (), *, higher: bool) -> tuple[float, float]:
    """Return the range of an axis on which ``ends`` can be distinguished, and on which all ``wanted`` values are.

    It goes from the best to the worst end, but not to those that lie ``FAR`` times as far from the best as the median
    one: a row that diverged does not flatten all others.
    """
    sign = -1.0 if higher else 1.0
    ranked = sorted(sign * end for end in ends)
    reach = FAR * (median(ranked) - ranked[0])
    kept = [end for end in ranked if len(ranked) < 3 or end - ranked[0] <= reach]
    seen = [*(kept or ranked[:1]), *(sign * value for value in wanted)]
    margin = 0.07 * (max(seen) - min(seen)) or 0.02 * abs(seen[0]) or 0.02
    edges = sign * (min(seen) - margin), sign * (max(seen) + margin)
    return min(edges), max(edges)


def apart(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return the positions, moved as little as possible, so that no two are nearer than ``gap``, within [low, high].

    Least in the sum of squares. Where not all fit, they are spread evenly.
    """
    from scipy.optimize import isotonic_regression  # slow to import

    count = len(positions)
    offsets = np.arange(count) * min(gap, (high - low) / max(count - 1, 1))
    order = sorted(range(count), key=lambda k: (positions[k], -k))  # of equal ones the first is the highest
    moved = np.empty(count)
    if count:
        wished = isotonic_regression(np.asarray(positions)[order] - offsets).x
        moved[order] = np.clip(wished, low, high - offsets[-1]) + offsets
    return [float(place) for place in moved]
