"""The bar chart of a run."""

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from caspr_cli.bench.measure import Row
from caspr_cli.common.format import milliseconds

# Okabe and Ito's, which every kind of colour vision tells apart; greys for what is not split.
COLOURS = {"statistics": "#0072B2", "roots": "#D55E00", "apply": "#009E73", "rest": "#A6A6A6"}
WHOLE, BOUND = "#CFCFCF", "black"
BOUND_LABEL = "floor: the matrix products alone of a step without a refresh"
UNITS = (("B", 1e9), ("M", 1e6), ("k", 1e3))
WIDE_ENOUGH = 0.055  # of the axis: a part that holds its own label


def draw(rows: list[Row]) -> Figure:
    """Return a bar for each optimizer: the median step, in its parts where they are known, and its products alone."""
    figure = Figure(figsize=(10, 1.9 + 0.68 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    limit = 1.45 * max(max(row.median_ms, row.floor_ms or 0.0) for row in rows)  # leaves space for the labels
    for y, row in enumerate(rows):
        _bar(axes, y, row, limit)
    axes.set_yticks(range(len(rows)), [row.optimizer for row in rows], fontsize=10)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, limit)
    axes.set_xlabel("milliseconds of a median step")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    first = rows[0]
    unit, size = next(((name, n) for name, n in UNITS if first.parameters >= n), ("", 1))
    title = f"What a step costs: {first.set}, {first.parameters / size:.3g}{unit} parameters, {first.dtype}"
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=22)
    axes.text(0, 1.02, _conditions(rows), transform=axes.transAxes, fontsize=9, va="bottom", color="#444444")
    _legend(figure, rows)
    return figure


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _bar(axes: Axes, y: int, row: Row, limit: float) -> None:
    left = 0.0
    for name, value in _parts(row).items():
        axes.barh(y, value, left=left, height=0.5, color=COLOURS.get(name, WHOLE), edgecolor="white", linewidth=0.5)
        if name in COLOURS and value > WIDE_ENOUGH * limit:
            colour = "black" if name == "rest" else "white"
            label = f"{name}\n{milliseconds(value)}"
            axes.text(left + value / 2, y, label, ha="center", va="center_baseline", color=colour, fontsize=8)
        left += value
    label = f"{milliseconds(row.median_ms)} ms  (p99 {milliseconds(row.p99_ms)}),  {row.adamw_ratio:.3g} x AdamW"
    axes.text(row.median_ms + 0.01 * limit, y, label, va="center", fontsize=9)
    if row.floor_ms is not None:
        axes.barh(y + 0.33, row.floor_ms, height=0.07, color=BOUND)
        axes.text(row.floor_ms + 0.005 * limit, y + 0.35, milliseconds(row.floor_ms), va="center", fontsize=7)


def _parts(row: Row) -> dict[str, float]:
    parts = {"statistics": row.statistics_ms, "roots": row.roots_ms, "apply": row.apply_ms, "rest": row.rest_ms}
    known = {name: value for name, value in parts.items() if value is not None}
    return known or {"whole step": row.median_ms}


def _conditions(rows: list[Row]) -> str:
    first = rows[0]
    interval = next((row.interval for row in rows if row.interval is not None), None)
    refresh = "" if interval is None else f", roots or bases every {interval} steps"
    threads = "1 thread" if first.threads == 1 else f"{first.threads} threads"
    return f"{first.device}, {threads}, torch {first.versions['torch']}{refresh}"


def _legend(figure: Figure, rows: list[Row]) -> None:
    used = {name for row in rows for name in _parts(row)}
    colours = COLOURS | {"whole step": WHOLE}
    marks: list[Patch | Line2D] = [Patch(color=colour, label=name) for name, colour in colours.items() if name in used]
    if any(row.floor_ms is not None for row in rows):
        marks.append(Line2D([], [], color=BOUND, linewidth=3, label=BOUND_LABEL))
    figure.legend(handles=marks, loc="outside lower left", ncols=len(marks), frameon=False, fontsize=9)
