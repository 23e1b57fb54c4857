import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from recorded import run
from tabled import axes_drawn, searched, seeds, table

from caspr_cli.report import figures, style
from caspr_cli.report.model import Table
from caspr_cli.report.profile import profile

FIGURES: dict[str, Callable[[Table], str]] = {
    "steps": figures.curves,
    "seconds": lambda table: figures.curves(table, "seconds"),
    "intervals": figures.intervals,
    "trials": figures.best_of,
}


@cache
def drawn(table: str, figure: str) -> str:
    return FIGURES[figure](getattr(synthetic, table)())


def texts(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text")]


def identifiers(svg: str) -> list[str]:
    return [e.attrib["id"] for e in ElementTree.fromstring(svg).iter() if "id" in e.attrib]


@pytest.mark.parametrize("figure", FIGURES)
def test_it_stands_alone(figure: str) -> None:
    """No reference to anything elsewhere, or to an identifier that is not there; no ground of its own, no colours
    but those that a page replaces; labels are text."""
    svg = drawn("language", figure)
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {light for light, _ in style.PALETTE.values()}
    assert all(label in "\n".join(texts(svg)) for label in synthetic.ENDS)
    assert re.findall(r"https?://[^\s\"<]+", svg) == [style.NAMESPACE]
    assert set(re.findall(r"(?:href=\"|url\()#([^\")]+)", svg)) == set(identifiers(svg))
    assert "<metadata" not in svg
    assert "<style" not in svg
    assert "DejaVu" not in svg
    assert "fill: #ffffff" not in svg


def test_bytes_are_the_same_in_another_process() -> None:
    code = "import synthetic; from caspr_cli.report.figures import curves; print(end=curves(synthetic.language()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={
        "PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7", "PYTHONIOENCODING": "utf8"})  # fmt: skip
    assert found.stdout == drawn("language", "steps")


def test_what_cannot_be_drawn_is_empty() -> None:
    empty = synthetic.tables([synthetic.ended("muon", 0, 4.0, "new")])[0]
    assert [draw(empty) for draw in FIGURES.values()] == ["", "", "", ""]
    assert drawn("bare", "trials") == figures.profile(profile([synthetic.bare()], "steps")) == ""


def test_a_row_without_a_curve_or_times_is_named() -> None:
    assert "no curve: muon and sgd" in texts(drawn("bare", "steps"))
    assert "times unknown: nadamw, muon and sgd" in texts(figures.curves(timed_and_not(), "seconds"))
    assert any("nadamw, n = 1" in text for text in texts(drawn("bare", "steps")))
    failed = searched("caspr", [4.0, 4.1]) + seeds("caspr", [None, None], 1, optim__lr=1e-4)
    assert "caspr, not finished" in texts(figures.curves(table(failed)))
    assert {row.label for row in synthetic.ablation().rows} <= set(texts(figures.curves(synthetic.ablation())))
    svg = figures.intervals(synthetic.bare(), {row.label: style.KNOWN["soap"] for row in synthetic.bare().rows})
    assert style.PALETTE["green"][0] in svg
    assert style.PALETTE["grey"][0] not in svg


def timed_and_not() -> Table:
    bare = synthetic.bare()
    return replace(bare, rows=(*bare.rows, synthetic.language().rows[0]))


def test_a_diverged_row_flattens_nothing_and_has_its_value() -> None:
    """Of the rows of ``language``, sgd alone ends at 6.9; the others between 3.9 and 4.5."""
    for figure in ("steps", "trials"):
        ticks = [float(t) for t in texts(drawn("language", figure)) if re.fullmatch(r"\d\.\d+", t)]
        assert max(ticks) < 5
        assert any(re.fullmatch(r"sgd ↑ 6\.\d+", text) for text in texts(drawn("language", figure)))
    assert any(re.fullmatch(r"6\.\d+ →", text) for text in texts(drawn("language", "intervals")))


def test_the_target_is_drawn_or_said() -> None:
    assert "target 4.5" in texts(drawn("language", "steps"))
    far = replace(synthetic.bare(), target=1.5)
    assert "target 1.5: below this range" in texts(figures.curves(far))


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Axes]:
    """Draws a figure, and returns its axes as matplotlib has them."""
    draw = axes_drawn(monkeypatch)
    return lambda *args: draw(*args)[0]


def test_curves_of_all_tasks_in_one_figure_with_one_legend() -> None:
    tables = synthetic.study()
    svg = figures.together(tables)
    found = texts(svg)
    assert [found.count(table.task) for table in tables] == [1] * len(tables)
    assert [found.count(label) for label in synthetic.ENDS] == [1] * len(synthetic.ENDS)
    assert found.count(f"{tables[0].metric} (lower is better)") == 1
    dark = style.dark(svg)
    assert set(re.findall(r"#[0-9a-f]{6}\b", dark)) <= {dark for _, dark in style.PALETTE.values()}
    assert texts(dark) == found


def test_a_task_is_named_in_the_same_colour_where_its_target_is_out_of_range() -> None:
    svg = figures.together([replace(synthetic.bare(), target=target) for target in (1.5, 4.5)])
    named = re.findall(r"<text[^>]*>c4_lm[^<]*</text>", svg)
    assert [style.INK in text for text in named] == [True, True]


def test_steps_are_marked_at_whole_numbers(axes: Callable[..., Axes]) -> None:
    """Also where there are three: no mark at 1.5 steps."""
    found = axes(figures.curves, table([run(curve=[(k, 1.0, 4.0 - k / 9) for k in (1, 2, 3)])]))
    ticks = [label.get_text() for label in found.get_xticklabels()]
    assert len(ticks) > 2
    assert all(re.fullmatch(r"[\d,]+", text) for text in ticks)


def test_two_seeds_are_two_thin_lines_and_no_band(axes: Callable[..., Axes]) -> None:
    """Their interval would be nine standard deviations to each side, and cover the other rows."""
    two, three = (axes(figures.curves, table(seeds("caspr", [4.0, 4.02, 4.04][:n]))) for n in (2, 3))
    assert [len(each.collections) for each in (two, three)] == [0, 1]
    assert [sum(line.get_linewidth() == 0.7 for line in each.lines) for each in (two, three)] == [2, 0]


@pytest.mark.parametrize(
    ("over", "unit", "seconds"), [("steps", "steps", 1.0), ("seconds", "minutes of training", 60.0)]
)
def test_lines_are_means_with_bands_and_names_at_their_ends(
    axes: Callable[..., Axes], over: str, unit: str, seconds: float
) -> None:
    table = synthetic.language()
    shown = axes(figures.curves, table, over)
    target, lines = [line for line in shown.lines if len(line.get_xdata()) == 2], shown.lines[:6]
    assert [set(line.get_ydata()) for line in target] == [{4.5}]
    means = {row.label: figures.curve(row) for row in table.rows}
    for line, band, found in zip(lines, shown.collections, means.values(), strict=True):
        x = found.steps if over == "steps" else [s / seconds for s in found.seconds]
        assert line.get_xdata() == pytest.approx(x)
        assert line.get_ydata() == pytest.approx(found.mean)
        corners = band.get_paths()[0].vertices[:, 1]
        assert (corners.min(), corners.max()) == pytest.approx((min(found.band[0]), max(found.band[1])))
    assert shown.get_xlabel() == unit
    low, high = shown.get_xlim()
    ends = [line.get_xdata()[-1] for line in lines]
    assert high == max(ends)
    assert 0 <= low < min(line.get_xdata()[-2] for line in lines)
    names = [text for text in shown.texts if text.get_text() in synthetic.ENDS]
    places = {text.get_text(): text.get_position()[1] for text in names}
    assert sorted(places, key=places.get) == sorted(places, key=lambda label: means[label].mean[-1])
    bottom, top = shown.get_ylim()
    wished = {label: min((means[label].mean[-1] - bottom) / (top - bottom), 1.0) for label in places}
    assert places == pytest.approx(wished, abs=0.1)
    gaps = [b - a for a, b in pairwise(sorted([*places.values(), 1.0]))]
    assert min(gaps) >= 0.062 - 1e-9
    assert {text.get_color() for text in names} == {style.KNOWN[label].colour for label in places}


def test_points_and_bars_of_intervals(axes: Callable[..., Axes]) -> None:
    table = synthetic.language()
    shown = axes(figures.intervals, table)
    rows = [row for row in table.rows if row.label != "sgd"]  # diverged: a number at the edge
    bars = [line for line in shown.lines if len(line.get_xdata()) == 2 and len({*line.get_ydata()}) == 1]
    assert [tuple(bar.get_xdata()) for bar in bars] == [(row.validation.low, row.validation.high) for row in rows]
    means = [line.get_xdata()[0] for line in shown.lines if len(line.get_xdata()) == 1]
    assert means == [row.mean for row in rows]
    assert [label.get_text() for label in shown.get_yticklabels()] == [row.label for row in table.rows]
    low, high = shown.get_xlim()
    assert all(low < row.validation.low and row.validation.high < high for row in rows)
    assert high < 6
    strips = [patch for patch in shown.patches if patch.get_alpha() == 0.14]
    adamw = next(row for row in table.rows if row.label == "adamw")
    assert [(s.get_x(), s.get_x() + s.get_width()) for s in strips] == [
        pytest.approx((adamw.validation.low, adamw.validation.high))
    ]


def test_lines_of_trials_and_of_a_profile(axes: Callable[..., Axes]) -> None:
    table = synthetic.language()
    shown = axes(figures.best_of, table)
    for line, row in zip(shown.lines, table.rows, strict=True):
        assert (list(line.get_xdata()), tuple(line.get_ydata())) == ([1, 2, 3, 4, 5, 6], row.best_of)
    assert shown.get_xlim() == (1, 6)
    found = profile(synthetic.study(), "steps")
    assert "shampoo 1.00" in figures.profile(found)
    shown = axes(figures.profile, found)
    for line, label in zip(shown.lines, found.scores, strict=True):
        x = line.get_xdata()
        assert (x[0], x[-1]) == shown.get_xlim() == (1, 4)
        assert list(line.get_ydata()) == [sum(ratio <= tau for ratio in found.ratios[label]) / 4 for tau in x]


@pytest.mark.parametrize(
    ("seconds", "unit", "scale"),
    [(179, "seconds", 1), (180, "minutes", 60), (3 * 3600 - 1, "minutes", 60), (3 * 3600, "hours", 3600)],
)
def test_units_of_time(axes: Callable[..., Axes], seconds: float, unit: str, scale: float) -> None:
    one = run(curve=[(k, seconds * k / 4, 4.0 - k / 9) for k in (1, 2, 3, 4)])
    shown = axes(figures.curves, table([one]), "seconds")
    assert shown.get_xlabel() == f"{unit} of training"
    assert shown.lines[0].get_xdata()[-1] == pytest.approx(seconds / scale)


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("caspr <b>&\"' $x_1^2$ \x07", "caspr <b>&\"' $x_1^2$ \ufffd"),  # neither markup nor mathematics
        ("caspr task.dropout=0.1 trainer.precision=32-true trainer.max_steps=500 task.batch_size=32", "caspr"),
    ],
)
def test_labels_are_text_and_long_ones_leave_room_for_the_figure(label: str, shown: str) -> None:
    made = table(seeds(label, [4.0, 4.01, 4.02]))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="constrained_layout")  # where a figure has no room for its axes
        for draw in (figures.curves, figures.intervals):
            assert shown in "\n".join(texts(draw(made)))


def contrast(one: str, other: str) -> float:
    """Of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", sorted(set(style.PALETTE) - {"rule"}))
def test_colours_can_be_read_on_both_grounds(name: str) -> None:
    light, dark = style.PALETTE[name]
    assert contrast(light, "#ffffff") >= 4.5
    assert contrast(dark, "#14181d") >= 4.5


def test_styles_stay_with_known_labels_and_differ_for_others() -> None:
    labels = [f"caspr eps=1e-{k}" for k in range(18)]
    found = style.styles(["adamw", *labels, "caspr"])
    assert found["caspr"] == style.KNOWN["caspr"]
    assert found["adamw"] == style.KNOWN["adamw"]
    assert len(set(found.values())) == 20
    assert len(style.styles(map(str, range(100)))) == 100


def test_the_first_variant_of_an_optimizer_looks_like_it_and_no_two_have_one_hue() -> None:
    labels = ["caspr exponent=0.5", "muon", "shampoo exponent=1", "caspr exponent=0", "adamw"]
    found = style.styles(["caspr untuned exponent=0.5", *labels])
    assert [found[label] for label in labels[:3]] == [style.KNOWN[name] for name in ("caspr", "muon", "shampoo")]
    assert len({one.hue for one in found.values()}) == len(found)


def curve_of(values: list[list[float | None]]) -> figures.Curve | None:
    runs = [run("caspr", k, curve=[(s, 2.0 * s, v) for s, v in enumerate(own, 1)]) for k, own in enumerate(values)]
    return figures.curve(table(runs).rows[0])


def test_the_mean_and_its_interval_by_hand() -> None:
    """t for two degrees of freedom is 4.303; the standard error of 1, 2 and 3 is 0.577."""
    found = curve_of([[1.0, 5.0], [3.0, 5.0], [2.0, 5.0]])
    assert (found.mean, found.steps, found.seconds) == ((2.0, 5.0), (1, 2), (2.0, 4.0))
    assert found.band[0] == pytest.approx((2 - 2.484, 5.0), abs=1e-3)  # a band of no width where seeds are equal
    assert found.band[1] == pytest.approx((2 + 2.484, 5.0), abs=1e-3)
    some = curve_of([[1.0, None, 3.0, 4.0], [1.0, 2.0, 3.0]])
    assert (some.steps, some.band) == ((1, 3), ())  # where all runs have a value
    assert curve_of([[None], [1.0]]) is None
    runs = [run("caspr", 0, 4.0), run("caspr", 1, 9.0, "failed")]
    both = figures.curve(table(runs).rows[0])
    assert (both.n, both.mean[-1], both.finished) == (1, 4.0, True)


@pytest.mark.parametrize(
    ("ends", "higher", "low", "high"),
    [
        ([4.0, 4.1, 4.2, 9.0], False, (3.9, 4.0), (4.2, 4.3)),
        ([0.9, 0.88, 0.87, 0.1], True, (0.86, 0.87), (0.9, 0.91)),
        ([4.0, 9.0], False, (3.0, 4.0), (9.0, 10.0)),
        ([4.0], False, (3.9, 4.0), (4.0, 4.1)),
    ],
)
def test_a_window_shows_the_ends_and_not_the_diverged_one(
    ends: list[float], higher: bool, low: tuple[float, float], high: tuple[float, float]
) -> None:
    found = figures.window(ends, higher=higher)
    assert low[0] < found[0] < low[1]
    assert high[0] < found[1] < high[1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.2))
@settings(deadline=None, max_examples=60)
def test_labels_are_apart_in_order_and_inside(positions: list[float], gap: float) -> None:
    moved = figures.apart(positions, gap, 0.0, 1.0)
    fits = min(gap, 1 / max(len(positions) - 1, 1))
    ranked = sorted(moved)
    assert all(b - a >= fits - 1e-9 for a, b in pairwise(ranked))
    assert -1e-9 <= ranked[0] <= ranked[-1] <= 1 + 1e-9
    assert not any(a < b and x > y for a, x in zip(positions, moved, strict=True)
                   for b, y in zip(positions, moved, strict=True))  # fmt: skip
    assert figures.apart([0.1, 0.9, 0.5], 0.06, 0, 1) == pytest.approx([0.1, 0.9, 0.5])
    assert figures.apart([0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.55, 0.45])
    assert figures.apart([], 0.1, 0, 1) == []
