import re
from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.axes import Axes
from recorded import run
from tabled import axes_drawn, searched, seeds, table

from caspr_cli.report import sensitivity, style
from caspr_cli.report.model import Run, Table

Draw = Callable[[Table], str]
BETA = "optim.betas.1"


def rates() -> Table:
    """Two rows of one tuned key; a rate of each failed, and one of adamw ends far off."""
    return table(searched("caspr", [4.2, 4.0, 4.1, None]) + searched("adamw", [4.5, 4.4, 4.45, None, 99.0]))


def joint(**more: Any) -> Table:
    runs: list[Run] = []
    for optim, best in (("caspr", 4.0), ("adamw", 4.4)):
        for k, (lr, beta, decay) in enumerate([(1e-3, 0.9, 0.0), (1e-2, 0.99, 0.1), (3e-2, 0.999, 0.2)]):
            space = {"search__space__optim.lr__log": [1e-4, 0.1], f"search__space__{BETA}__one_minus_log": [1e-3, 0.3]}
            space["search__space__optim.weight_decay__linear"] = [0.0, 0.3]
            keys = {"optim__lr": lr, "optim__betas": [0.9, beta], "optim__weight_decay": decay, "trial": k} | space
            runs.append(run(optim, 0, best + 0.1 * abs(k - 1), **keys | more))
    return table(runs)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[Draw, Table], list[Axes]]:
    return axes_drawn(monkeypatch)


def marks(axes: Axes, marker: str) -> list[tuple[float, float]]:
    """The points with a mark, each a line of its own."""
    lines = [line for line in axes.lines if line.get_marker() == marker]
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines]


def test_a_line_a_row_with_its_best_and_what_failed_at_the_edge(drawn: Callable[[Draw, Table], list[Axes]]) -> None:
    (axes,) = drawn(sensitivity.by_rate, rates())
    assert axes.get_xscale() == "log"
    lines = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert [tuple(line.get_ydata()) for line in lines] == [(4.2, 4.0, 4.1), (4.5, 4.4, 4.45, 99.0)]
    assert list(lines[0].get_xdata()) == pytest.approx([1e-4, 1e-3, 1e-2])
    assert [line.get_color() for line in lines] == [style.KNOWN[label].colour for label in ("caspr", "adamw")]
    assert sorted(marks(axes, "*")) == [(pytest.approx(1e-3), 4.0), (pytest.approx(1e-3), 4.4)]
    crosses, far = marks(axes, "x"), marks(axes, "^")
    assert [x for x, _ in crosses] == pytest.approx([0.1, 0.1])
    assert [x for x, _ in far] == pytest.approx([1.0])
    assert all(0.9 < y < 1 for _, y in crosses + far)  # of the height of the axes: where the worst is
    assert len({y for _, y in crosses}) == 2  # neither hides the other
    low, high = axes.get_ylim()
    assert low < 4.0
    assert 4.5 < high < 5


def test_the_worst_edge_is_below_where_higher_is_better(drawn: Callable[[Draw, Table], list[Axes]]) -> None:
    up = {"task__target__higher_is_better": True}
    (axes,) = drawn(sensitivity.by_rate, table(searched("caspr", [0.7, 0.8, None, 0.75, 0.01], **up)))
    assert [0 < y < 0.1 for _, y in marks(axes, "x") + marks(axes, "v")] == [True, True]


def test_names_have_the_width_and_rows_without_one_are_named() -> None:
    svg = sensitivity.by_rate(table(searched("caspr", [4.2, 4.0, 4.3]) + seeds("adamw", [4.5, 4.6])))
    assert re.search(r">caspr, ×\d", svg)
    assert ">fewer than two rates with a value: adamw<" in svg
    assert "caspr 4.0000 at 0.001, within 1 % ×" in svg[: svg.index("<g")]  # for readers who do not see it
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {light for light, _ in style.PALETTE.values()}


def test_each_other_key_has_a_panel_with_its_scale(drawn: Callable[[Draw, Table], list[Axes]]) -> None:
    panels = drawn(sensitivity.by_others, joint())
    assert [(panel.get_xlabel(), panel.get_xscale()) for panel in panels] == [
        ("1 - betas.1", "log"), ("weight_decay", "linear"),
    ]  # fmt: skip
    assert sorted(x for x, _ in marks(panels[0], "o")) == pytest.approx([1e-3, 1e-3, 0.1, 0.1])
    assert marks(panels[0], "*") == [(pytest.approx(0.01), 4.0), (pytest.approx(0.01), 4.4)]
    assert panels[0].get_ylim() == panels[1].get_ylim()


def test_words_and_values_of_zero_have_places_too(drawn: Callable[[Draw, Table], list[Axes]]) -> None:
    runs = [run("caspr", 0, 4.0 + k, optim__graft=graft, optim__eps=eps) for k, (graft, eps) in
            enumerate([("adam", 0.0), (3, 1e-8), (None, 1e-4), (True, 1.0)])]  # fmt: skip
    panels = drawn(sensitivity.by_others, table(runs, tuned=["optim.graft", "optim.eps"]))
    assert [(panel.get_xlabel(), panel.get_xscale()) for panel in panels] == [("eps", "linear"), ("graft", "linear")]
    assert {label.get_text() for label in panels[1].get_xticklabels()} == {"adam", "3", "true"}


def test_an_odd_number_of_keys_leaves_no_empty_axes(drawn: Callable[[Draw, Table], list[Axes]]) -> None:
    runs = [run("caspr", 0, 4.0 + k, optim__a=k, optim__b=k, optim__c=k) for k in range(3)]
    panels = drawn(sensitivity.by_others, table(runs, tuned=["optim.a", "optim.b", "optim.c"]))
    assert [panel.get_visible() for panel in panels] == [True, True, True, False]


def test_what_cannot_be_drawn_is_empty() -> None:
    assert sensitivity.by_rate(table(seeds("caspr", [4.0, 4.1]))) == ""
    assert sensitivity.by_others(rates()) == ""
    assert sensitivity.by_rate(table(searched("caspr", [None, None]))) == ""
    assert sensitivity.about_rates(rates()) == sensitivity.BY_RATE
    assert sensitivity.about_rates(joint()) == f"{sensitivity.BY_RATE} {sensitivity.JOINT}"
    zero = [run("caspr", 0, 4.0 + k, optim__lr=lr) for k, lr in enumerate([0.0, -1.0, "x"])]
    assert sensitivity.by_rate(table(zero)) == ""  # no rate has a logarithm
    some = [*zero, run("caspr", 0, 4.0, optim__lr=0.1), run("caspr", 0, 4.1, optim__lr=0.2)]
    assert sensitivity.by_rate(table(some))
