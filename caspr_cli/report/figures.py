"""The figures of a report, as SVG text; empty where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from caspr_cli.report import look, words
from caspr_cli.report.curves import Curve, apart, curve, settled, window
from caspr_cli.report.look import MUTED, Style
from caspr_cli.report.model import Row, Table
from caspr_cli.report.profile import LONGEST, Profile, rho

WIDTH, HEIGHT = 5.6, 3.6  # inches; small, so that text stays readable where a page is narrow
LABELLED, LONGEST_LABEL = 9, 22  # so many lines at most are labelled at their ends, with so many characters
Styles = Mapping[str, Style]
Ends = Sequence[tuple[str, float, float]]  # label, x and y


def curves(table: Table, over: str = "steps", styles: Styles | None = None) -> str:
    """The mean of each row at each validation, with its 95 % interval, and the target.

    Args:
        over: ``steps``, or ``seconds`` of training, the median of the runs; then without rows that do not know them.
        styles: of labels that have one already in other figures.
    """
    found = [c for row in table.rows if (c := curve(row)) is not None]
    shown = [c for c in found if over == "steps" or c.seconds is not None]
    if max((len(c.steps) for c in shown), default=0) < 2:
        return ""
    styles = styles or look.styles(row.label for row in table.rows)
    unit, scale = ("steps", 1.0) if over == "steps" else _unit(max(c.seconds[-1] for c in shown if c.seconds))
    xs = {c.label: [x / scale for x in (c.steps if over == "steps" else c.seconds or ())] for c in shown}
    with look.drawing():
        figure, axes = _axes(table.metric, unit)
        for c in shown:
            style, x, marker = styles[c.label], xs[c.label], "o" if len(c.steps) == 1 else None
            _line(axes, x, c.mean, style, marker=marker, markersize=4, zorder=3)
            if c.low is not None and c.high is not None:
                alpha = 0.16 if len(shown) <= LABELLED else 0.08
                axes.fill_between(x, c.low, c.high, color=style.colour, alpha=alpha, linewidth=0)
        axes.set_ylim(_range_of(table, shown))
        low, high = axes.get_ylim()
        last = max(x[-1] for x in xs.values())
        first = min(_first(xs[c.label], c.mean, low, high) for c in shown)
        axes.set_xlim(max(first - 0.08 * (last - first), 0), last)
        _target(axes, table)
        ends = [(c.label, xs[c.label][-1], c.mean[-1]) for c in shown]
        _labelled(figure, axes, ends, styles, {c.label: _more(c) for c in shown})
        missing = [row.label for row in table.rows if row.label not in xs]
        _note(axes, "no curve" if over == "steps" else "times unknown", missing)
        return look.to_svg(figure, f"{_name(table)} curves {over}", _alt_of_curves(table, shown, over))


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], style: Style, **more: Any) -> None:
    axes.plot(x, y, **_drawn(style) | more)


def _drawn(style: Style) -> dict[str, Any]:
    return {"color": style.colour, "linestyle": style.dash, "linewidth": 1.6}


def _more(c: Curve) -> str:
    if not c.finished:
        return ", not finished"
    return ", n = 1" if c.n == 1 else ""


def _range_of(table: Table, shown: Sequence[Curve]) -> tuple[float, float]:
    """The axis of values: the ends, the best of all, the last part of the best row, and the target if that is near."""
    finished = [c for c in shown if c.finished] or shown
    order = max if table.higher_is_better else min
    ends = [c.mean[-1] for c in finished]
    best = finished[ends.index(order(ends))]
    wanted = [settled(best), order(value for c in finished for value in c.mean)]
    low, high = window(ends, wanted, higher=table.higher_is_better)
    if table.target is not None and low - 0.5 * (high - low) < table.target < high + 0.5 * (high - low):
        low, high = window(ends, [*wanted, table.target], higher=table.higher_is_better)
    return _with_near([edge for c in finished if c.low and c.high for edge in (c.low[-1], c.high[-1])], low, high)


def _first(x: Sequence[float], y: Sequence[float], low: float, high: float) -> float:
    """Where a line comes into the range: the point before."""
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


def _labelled(figure: Figure, axes: Axes, ends: Ends, styles: Styles, more: Mapping[str, str]) -> None:
    """Names at the ends of lines, or a legend under the axes where there are too many or too long ones.

    A line that ends outside of the axes has its value beside its name.
    """
    low, high = sorted(axes.get_ylim())
    names = {label: f"{label}{more.get(label, '')}{_outside(y, low, high)}" for label, _, y in ends}
    if len(ends) > LABELLED or max(map(len, names.values())) > LONGEST_LABEL:
        handles = [Line2D([], [], **_drawn(styles[label])) for label in names]
        longest = max(map(len, names.values()))
        columns = 1 if longest > 36 else 2 if longest > 14 else 3
        names = {label: fill(name, 80) for label, name in names.items()}
        lines = sum(name.count("\n") + 1 for name in names.values())
        figure.set_figheight(HEIGHT + 0.17 * math.ceil(lines / columns))
        figure.legend(
            handles, list(names.values()), loc="outside lower left", ncols=columns, fontsize=8, handlelength=3
        )
        return
    wished = [min(max((y - low) / (high - low), 0.0), 1.0) for _, _, y in ends]
    inverted = axes.yaxis_inverted()
    places = apart([1 - w if inverted else w for w in wished], 0.062, 0.0, 1.0)
    right = axes.get_xlim()[1]
    for (label, x, y), place in zip(ends, places, strict=True):
        axes.annotate(
            names[label], (x, min(max(y, low), high)), xytext=(1.035, place), textcoords="axes fraction",
            color=styles[label].colour, fontsize=8.5, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": styles[label].colour, "linewidth": 0.6, "shrinkA": 1,
                        "shrinkB": 1, "alpha": 0.9 if x == right else 0.5},
        )  # fmt: skip


def _outside(y: float, low: float, high: float) -> str:
    return f" ↑ {y:.3g}" if y > high else f" ↓ {y:.3g}" if y < low else ""


def intervals(table: Table, styles: Styles | None = None) -> str:
    """Mean and 95 % interval of each row, with single seeds; the interval of the baseline as a strip."""
    rows = [row for row in table.rows if row.mean is not None]
    if not rows:
        return ""
    styles = styles or look.styles(row.label for row in table.rows)
    low, high = window([row.mean for row in rows if row.mean is not None], higher=table.higher_is_better)
    edges = [edge for row in rows for edge in (row.ci_low, row.ci_high, *(run.final for run in row.runs))]
    low, high = _with_near([edge for edge in edges if edge is not None], low, high)
    labels = [fill(f"{row.label} (n\u00a0=\u00a01)" if row.n == 1 else row.label, 28) for row in table.rows]
    lines = max(label.count("\n") + 1 for label in labels)
    room = len(table.rows) * max(0.3 if len(labels) > LABELLED else 0.42, 0.16 * lines)
    with look.drawing():
        figure, axes = _axes("", table.metric, height=0.75 + room)
        axes.set_xlim(low, high)
        for y, row in enumerate(table.rows):
            _interval(axes, y, row, styles[row.label], (low, high))
            if row.is_baseline and row.ci_low is not None and row.ci_high is not None:
                axes.axvspan(row.ci_low, row.ci_high, color=styles[row.label].colour, alpha=0.14, linewidth=0, zorder=0)
        axes.set_yticks(range(len(table.rows)), labels)
        axes.set_ylim(len(table.rows) - 0.45, -0.55)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        _note(axes, "baseline, its interval as a strip", [row.label for row in table.rows if row.is_baseline])
        return look.to_svg(figure, f"{_name(table)} intervals", _alt_of_intervals(table))


def _with_near(values: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """The range, with those values that are not far outside, as ends of intervals."""
    room, margin = 0.5 * (high - low), 0.03 * (high - low)
    near = [value for value in values if low - room <= value <= high + room]
    return min([low, *(value - margin for value in near)]), max([high, *(value + margin for value in near)])


def _interval(axes: Axes, y: int, row: Row, style: Style, shown: tuple[float, float]) -> None:
    low, high = shown
    if row.mean is None:
        axes.text(low, y, "  no run is done with a finite value", color=MUTED, fontsize=8, va="center")
        return
    if not low <= row.mean <= high:
        text, side = (
            (f"{words.number(row.mean)} →", "right") if row.mean > high else (f"← {words.number(row.mean)}", "left")
        )
        axes.text(high if side == "right" else low, y, text, color=style.colour, fontsize=8.5, ha=side, va="center")
        return
    seeds = [run.final for run in row.runs if run.final is not None]
    axes.plot(seeds, [y + 0.24] * len(seeds), ".", color=style.colour, markersize=3.6, alpha=0.75, markeredgewidth=0)
    if row.ci_low is not None and row.ci_high is not None:
        axes.plot([row.ci_low, row.ci_high], [y, y], color=style.colour, linewidth=1.8, solid_capstyle="butt")
    axes.plot([row.mean], [y], "o", color=style.colour, markersize=5.5)


def best_of(table: Table, styles: Styles | None = None) -> str:
    """What a row's best validation is expected to be after so many trials, drawn from those that were made."""
    rows = [row for row in table.rows if len(row.best_of) > 1]
    if not rows:
        return ""
    styles = styles or look.styles(row.label for row in table.rows)
    with look.drawing():
        figure, axes = _axes(f"best {table.metric}", "trials")
        for row in rows:
            trials = range(1, len(row.best_of) + 1)
            _line(axes, trials, row.best_of, styles[row.label], marker="o", markersize=3)
        wanted = [median(row.best_of[0] for row in rows)]
        axes.set_ylim(window([row.best_of[-1] for row in rows], wanted, higher=table.higher_is_better))
        axes.set_xlim(1, max(len(row.best_of) for row in rows))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        ends = [(row.label, len(row.best_of), row.best_of[-1]) for row in rows]
        _labelled(figure, axes, ends, styles, {})
        missing = [row.label for row in table.rows if len(row.best_of) < 2]
        _note(axes, "fewer than two trials", missing)
        return look.to_svg(figure, f"{_name(table)} trials", _alt_of_best(table, rows))


def profile(found: Profile, styles: Styles | None = None) -> str:
    """The performance profile, for times from once to four times the best."""
    if not found.tasks:
        return ""
    styles = styles or look.styles(found.ratios)
    with look.drawing():
        figure, axes = _axes(f"share of {words.count(len(found.tasks), 'task')}", f"{found.unit} to target / fastest")
        for place, (label, ratios) in enumerate((label, found.ratios[label]) for label in found.scores):
            x = [1.0, *sorted(ratio for ratio in ratios if 1 < ratio <= LONGEST), LONGEST]
            width = min(1.4 + 0.6 * (len(found.scores) - 1 - place), 5)  # of lines that coincide all are seen
            _line(axes, x, [rho(ratios, tau) for tau in x], styles[label], drawstyle="steps-post", linewidth=width)
        axes.set_xlim(1, LONGEST)
        axes.set_ylim(0, 1.03)
        ends = [(label, LONGEST, rho(found.ratios[label], LONGEST)) for label in found.scores]
        _labelled(figure, axes, ends, styles, {})
        alt = f"Share of tasks within a multiple of the fastest row's {found.unit} to target. Scores: " + ", ".join(
            f"{label} {value:.2f}" for label, value in found.scores.items()
        )
        return look.to_svg(figure, f"profile {found.unit}", alt)


def _axes(y: str, x: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_axisbelow(True)
    return figure, axes


def _note(axes: Axes, what: str, labels: Sequence[str]) -> None:
    """A line under the axis, if it is about any row; many or long labels are only counted."""
    named = words.listed(labels)
    if labels:
        axes.set_xlabel(f"{axes.get_xlabel()}\n{what}: {named if len(named) < 60 else words.count(len(labels), 'row')}")


def _unit(longest: float) -> tuple[str, float]:
    """A unit for times up to so many seconds, in words, and its seconds."""
    if longest < 180:
        return "seconds of training", 1.0
    return ("minutes of training", 60.0) if longest < 3 * 3600 else ("hours of training", 3600.0)


def _name(table: Table) -> str:
    return f"{table.task} {table.scale} {table.data} {table.metric}"


def _alt_of_curves(table: Table, shown: Sequence[Curve], over: str) -> str:
    ends = "; ".join(f"{c.label} ends at {words.number(c.mean[-1])} (n = {c.n})" for c in shown)
    return f"{table.metric} on {table.task} over {over}. {ends}"


def _alt_of_best(table: Table, rows: Sequence[Row]) -> str:
    ends = (
        f"{row.label} {words.number(row.best_of[0])} after 1, {words.number(row.best_of[-1])} after {len(row.best_of)}"
        for row in rows
    )
    return f"Expected best {table.metric} on {table.task} by number of trials. {'; '.join(ends)}"


def _alt_of_intervals(table: Table) -> str:
    rows = "; ".join(
        f"{row.label} {words.number(row.mean)}, {words.between(row.ci_low, row.ci_high, row.sd)} (n = {row.n})"
        for row in table.rows
    )
    return f"Mean and 95 % interval of {table.metric} on {table.task}. {rows}"
