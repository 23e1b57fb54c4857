"""Answers as lines, files and a page: from answers that are made up."""

import csv
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure as Drawing

from caspr_cli.report import answers, answers_page, look
from caspr_cli.report.answer import Answer, Column, Figure, Sheet
from caspr_cli.report.errors import ReportError


def drawn(name):
    with look.drawing():
        figure = Drawing(figsize=(3, 2))
        figure.add_subplot().plot([1, 2], [3, 4], color=look.KNOWN["caspr"].colour)
        return look.to_svg(figure, name, f"a line called {name}")


def sheet(**changes):
    values = {
        "name": "gaps",
        "title": "Smallest eigenvalues",
        "columns": (Column("layer", "layer"), Column("gap", "gap", ".1e"), Column("note", "which | kind")),
        "rows": (
            {"layer": "up <1>", "gap": 1.25e-3, "note": "a|b", "hidden": 7},
            {"layer": "down", "gap": math.nan, "note": "it"},
            {"layer": "query", "gap": None, "note": None},
        ),
        "note": "Relative.",
    }
    return Sheet(**values | changes)


def answer(name="order", **changes):
    values = {
        "name": name,
        "question": f"Is {name} so?",
        "words": ("Yes, 3 < 4 & so on.", "By how much: a little."),
        "sheets": (sheet(), sheet(name="all", title="Everything", shown=0)),
        "figures": (Figure("traces", "Traces.", drawn(f"{name} traces"), "traces over [steps]"),),
        "holds": (("X₁ ⪯ X₂", True), ("X₂ ⪯ X₃", True)),
        "fails": ("X₂ ⪰ F: false in 3 of 4 cases",),
        "command": f"caspr-verify {name}",
        "provenance": {"torch": "2.9", "nested": {"a": 1}},
    }
    return Answer(**values | changes)


def broken():
    return answer("cost", holds=(("predicted is measured", False),), fails=())


def test_cells():
    assert answers.cell(None, ".2f") == "-"
    assert answers.cell(math.nan, ".2f") == "-"
    assert answers.cell(math.inf, ".2f") == "inf"
    assert answers.cell(True, ",") == "yes"
    assert answers.cell(12345, ",") == "12,345"
    assert answers.cell("as it is", ".2f") == "as it is"


def test_lines_for_a_terminal():
    text = "\n".join(answers.lines(answer(), 80))
    assert text.startswith("Is order so?\n\nYes, 3 < 4 & so on.")
    assert "held     X₁ ⪯ X₂" in text
    assert "no law   X₂ ⪰ F: false in 3 of 4 cases" in text
    assert re.search(r"^up <1>  1\.3e-03  a\|b$|^up <1>  1\.2e-03  a\|b$", text, re.M)
    assert "Everything" not in text  # for files alone
    assert "failed   predicted is measured" in "\n".join(answers.lines(broken(), 80))


def test_a_table_that_is_too_wide_says_what_it_leaves_out():
    columns = tuple(Column(f"k{k}", f"column {k}") for k in range(9))
    wide = sheet(columns=columns, rows=({f"k{k}": "x" * 30 for k in range(9)},))
    lines = list(answers.sheet_lines(wide, 80))
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("(no room for: column 2,") for line in lines)


def test_long_cells_are_cut_only_where_there_is_no_room():
    columns = (Column("a", "a"), Column("b", "b"))
    long = sheet(columns=columns, rows=({"a": "x" * 60, "b": "y"},))
    assert "x" * 60 in "\n".join(answers.sheet_lines(long, 80))
    assert "x" * 39 + "…" in "\n".join(answers.sheet_lines(long, 50))


def test_rows_that_are_not_shown_are_in_the_file():
    short = sheet(shown=1)
    assert "(2 more rows in gaps.csv)" in "\n".join(answers.sheet_lines(short, 80))
    assert len(list(csv.DictReader(io.StringIO(answers.as_csv(short))))) == 3


def test_csv_has_full_precision_and_the_columns_alone():
    rows = list(csv.DictReader(io.StringIO(answers.as_csv(sheet()))))
    assert list(rows[0]) == ["layer", "gap", "note"]
    assert float(rows[0]["gap"]) == 1.25e-3


def test_json_is_json():
    infinite = answer(sheets=(sheet(rows=({"layer": "a", "gap": math.inf}, {"layer": "b", "gap": math.nan})),))
    found = json.loads(answers.as_json(infinite), parse_constant=pytest.fail)
    assert [row["gap"] for row in found["sheets"]["gaps"]["rows"]] == ["inf", None]
    assert found["holds"][0] == {"statement": "X₁ ⪯ X₂", "held": True}
    assert found["provenance"]["nested"] == {"a": 1}
    assert [one["name"] for one in json.loads(answers.as_json([answer(), broken()]))] == ["order", "cost"]


def test_markdown():
    text = answers.as_markdown(answer())
    assert text.startswith("# Is order so?\n\nYes")
    assert "| layer | gap | which \\| kind |\n| --- | ---: | --- |\n" in text
    assert "| a\\|b |" in text
    assert "![traces over steps](traces.svg)" in text
    assert "    caspr-verify order\n" in text
    assert "torch 2.9" in text
    assert "nested" not in text


def test_files_are_written_whole(tmp_path):
    written = answers.write(answer(), tmp_path / "new" / "order")
    names = ["order.md", "order.json", "gaps.csv", "all.csv", "traces.svg"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "new" / "order").iterdir()) == sorted(names)
    (tmp_path / "file").touch()
    with pytest.raises(ReportError, match="cannot write there"):
        answers.write(answer(), tmp_path / "file")


class Page(HTMLParser):
    """Identifiers, links, and what would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.fetched, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            elif key == "href" and tag == "a":
                self.links.append(value)
            elif key in ("src", "href"):
                self.fetched.append(value)


def test_page_stands_alone():
    text = answers_page.page([answer(), answer("regret"), broken()], "Theory")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert page.links == ["#order", "#regret", "#cost"]
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert all(link.startswith("#") for link in page.fetched)  # uses of a figure's own parts
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert text.count("<svg") >= 3
    assert "prefers-color-scheme: dark" in text
    assert "Yes, 3 &lt; 4 &amp; so on." in text


def test_page_begins_with_the_questions_and_what_failed():
    text = answers_page.page([answer(), broken()], "Theory")
    start = text[: text.index("<main")]
    assert "Is order so?" in start
    assert "Is cost so?" in start
    assert "Of 3 statements that should hold, 1 did not: predicted is measured." in start
    assert "all 2 statements that should hold did" in answers_page.page([answer()], "Theory")
