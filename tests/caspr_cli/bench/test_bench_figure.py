from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from caspr_cli.bench.figure import draw, png
from caspr_cli.bench.measure import Row
from caspr_cli.common.format import milliseconds

ROW = Row(
    optimizer="caspr", median_ms=10.0, p99_ms=12.0, mean_ms=10.5, step_ms=8.0, floor_ms=5.0, floor_ratio=1.6,
    adamw_ratio=5.0, statistics_ms=2.0, roots_ms=3.0, apply_ms=4.0, rest_ms=1.0, state_bytes_per_parameter=20.0,
    share=0.1, parameters=1_500_000, train_ms=90.0, steps=20, set="own", interval=10, block_size=1024, dtype="float32",
    threads=1, device="cpu", versions={"torch": "2.14"},
)  # fmt: skip
BARE = replace(ROW, optimizer="adamw", median_ms=2.0, p99_ms=2.5, floor_ms=None, floor_ratio=None, adamw_ratio=1.0,
               statistics_ms=None, roots_ms=None, apply_ms=None, rest_ms=None)  # fmt: skip


def widths(figure: Figure) -> list[float]:
    (axes,) = figure.axes
    return [patch.get_width() for patch in axes.patches]  # type: ignore[attr-defined]


def texts(figure: Figure) -> str:
    (axes,) = figure.axes
    titles = [axes.get_title(loc="left"), *(label.get_text() for label in axes.get_yticklabels())]
    return "\n".join([*titles, *(text.get_text() for text in axes.texts)])


def test_bars_are_the_parts_the_products_alone_and_the_whole_of_who_has_none() -> None:
    assert widths(draw([ROW, BARE])) == [2.0, 3.0, 4.0, 1.0, 5.0, 2.0]


def test_everything_has_its_label_inside_the_picture() -> None:
    figure = draw([replace(ROW, p99_ms=123_456.0, adamw_ratio=123.4), BARE])
    found = texts(figure)
    labels = (
        "caspr", "adamw", "statistics\n2.00", "10.0 ms  (p99 123,456),  123 x AdamW", "1.5M parameters", "1 thread",
    )  # fmt: skip
    for text in (*labels, "every 10 steps"):
        assert text in found
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert max(text.get_window_extent().x1 for text in axes.texts) <= figure.bbox.x1
    assert png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.6, "12,346"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.0123, "0.012"), (None, "-")],
)
def test_three_digits(value: float | None, text: str) -> None:
    assert milliseconds(value) == text
