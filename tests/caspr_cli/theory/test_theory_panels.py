"""Figures from data frames: what they say in words, and what they draw."""

import math

import pytest
from pandas import DataFrame

from caspr_cli.report import style
from caspr_cli.theory import panels

STYLES = {"one": style.KNOWN["caspr"], "two": style.KNOWN["shampoo"]}
DATA = DataFrame(
    {
        "where": ["b", "b", "b", "a", "c"],
        "step": [1, 1, 10, 5, 5],
        "one": [1.0, 3.0, 4.0, 7.0, math.nan],
        "two": [math.nan, math.nan, math.nan, 8.0, 9.0],
    }
)


@pytest.mark.parametrize("log", [True, False])
def test_a_panel_for_each_group_and_a_mean_for_each_x(log):
    seen = []
    found = panels.figure("f", "Title.", DATA, STYLES, panel="where", x="step", y="size", log=log, finish=seen.append)
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
