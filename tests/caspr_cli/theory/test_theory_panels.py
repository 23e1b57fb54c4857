"""Figures from data frames: what they say in words, and what they draw."""

import math

import pytest
from pandas import DataFrame

from caspr_cli.report import style
from caspr_cli.theory import panels

STYLES = {"one": style.KNOWN["caspr"], "two": style.KNOWN["shampoo"]}
COLUMNS = ("where", "line", "step", "size")
ROWS = [
    ("b", "one", 1, 1.0), ("b", "one", 1, 3.0), ("b", "one", 10, 4.0), ("a", "one", 5, 7.0), ("a", "two", 5, 8.0),
    ("c", "one", 5, math.nan), ("c", "two", 5, 9.0), ("c", "three", 7, 9.0),
]  # fmt: skip
DATA = DataFrame(ROWS, columns=COLUMNS)


@pytest.mark.parametrize("log", [True, False])
def test_a_panel_for_each_group_and_a_mean_for_each_x(log):
    seen = []
    found = panels.figure("f", "Title.", DATA, STYLES, COLUMNS, log=log, finish=seen.append)
    assert found.alt == "Title. b: one from 2 to 4; a: one from 7 to 7, two from 8 to 8; c: two from 9 to 9."
    assert [axes.get_title(loc="left") for axes in seen] == ["b", "a", "c"]
    assert [axes.get_ylabel() for axes in seen] == ["size", "", "size"]
    assert [axes.get_xlabel() for axes in seen] == ["", "step", "step"]
    one, two = seen[0].lines
    assert (list(one.get_xdata()), list(one.get_ydata()), list(two.get_xdata())) == ([1, 10], [2, 4], [])
    (band,) = seen[0].collections
    assert band.get_paths()[0].get_extents().bounds == pytest.approx((1, 2 - math.sqrt(2), 9, 2 + math.sqrt(2)))
    assert not seen[1].collections
    assert seen[0].get_xscale() == ("log" if log else "linear")
    assert [found.svg.count(f">{text}<") for text in ("one", "two", "b", "a", "c")] == [1] * 5  # one legend for all


def test_a_logarithmic_axis_has_plain_numbers_and_what_else_is_asked():
    seen, scale = [], panels.logarithmic(ylim=(1, 10))
    panels.figure("f", "", DATA, STYLES, COLUMNS, unit="mm", finish=lambda axes: seen.append(scale(axes) or axes))
    assert seen[0].get_ylabel() == "mm"
    assert (seen[0].get_yscale(), seen[0].get_ylim()) == ("log", (1, 10))
    assert seen[0].yaxis.get_major_formatter()(0.01) == "0.01"
