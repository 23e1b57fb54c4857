"""Answers as lines, files and a page: from answers that are made up."""

import csv
import io
import json
import math
import re
from xml.etree import ElementTree

import pytest
from balanced import parsed
from matplotlib.figure import Figure as Drawing
from pandas import DataFrame

from caspr_cli.common.errors import UserError
from caspr_cli.report import answer as answers
from caspr_cli.report import page, style
from caspr_cli.report.answer import Answer, Figure
from caspr_cli.report.formulas import typeset, typeset_figure


def drawn(name):
    with style.drawing():
        figure = Drawing(figsize=(3, 2))
        figure.add_subplot().plot([1, 2], [3, 4], color=style.KNOWN["caspr"].colour)
        return style.to_svg(figure, name, f"a line called {name}")


ROWS = (
    {"layer": "up <1>", "gap": 1.25e-3, "which": "a|b"},
    {"layer": "down", "gap": math.nan, "which": "it"},
    {"layer": "query", "gap": None, "which": None},
)


def table(rows=ROWS, title="Smallest eigenvalues", **changes):
    how = {"heads": {"which": "which | kind"}, "formats": {"gap": ".1e"}, "note": "Relative."}
    return answers.table(rows, title, **how | changes)


def answer(name="order", **changes):
    values = {
        "name": name,
        "question": f"Is {name} so?",
        "formula": "F~^½ ⪯ X_Shampoo",
        "finding": "3 < 4 & so on.",
        "text": ("By how much: a little.",),
        "tables": {"gaps": table(), "all": table(title="Everything", shown=0)},
        "figures": (Figure("traces", "Traces.", drawn(f"{name} traces"), "traces over [steps]"),),
        "claims": (("X₁ ⪯ X₂", True), ("X₂ ⪯ X₃", True)),
        "counterexamples": ("X₂ ⪰ F: false in 3 of 4 cases",),
        "command": f"caspr-verify {name}",
        "provenance": {"torch": "2.9", "nested": {"a": 1}},
    }
    return Answer(**values | changes)


def broken():
    return answer("cost", claims=(("predicted is measured", False),), counterexamples=())


def test_cells():
    assert answers.cell(None, ".2f") == "-"
    assert answers.cell(math.nan, ".2f") == "-"
    assert answers.cell(math.inf, ".2f") == "inf"
    assert answers.cell(True, ",") == "yes"
    assert answers.cell(12345, ",") == "12,345"
    assert answers.cell("as it is", ".2f") == "as it is"
    made = answers.table(DataFrame({"n": [1, 2], "x": [0.5, math.inf], "yes": [True, False]}), "Frame")
    assert answers.sheet(made).heads == ["n", "x", "yes"]
    assert answers.sheet(made).rows == [("1", "0.5", "yes"), ("2", "inf", "no")]


def test_lines_for_a_terminal():
    text = "\n".join(answers.lines(answer(), 80))
    assert text.startswith("Is order so?\n\n  F~^½ ⪯ X_Shampoo\n\nYes. 3 < 4 & so on.")
    assert "held     X₁ ⪯ X₂" in text
    assert "not true X₂ ⪰ F: false in 3 of 4 cases" in text
    assert re.search(r"^up <1>  1\.3e-03  a\|b$|^up <1>  1\.2e-03  a\|b$", text, re.M)
    assert "Everything" not in text  # for files alone
    assert "failed   predicted is measured" in "\n".join(answers.lines(broken(), 80))
    bare = Answer(name="a", question="Is it?", finding="It is.")
    assert list(answers.lines(bare)) == ["Is it?", "", "Yes. It is."]
    assert answers.as_markdown(bare) == "# Is it?\n\nYes. It is.\n"
    assert "details" not in page.answers([bare], "Theory").partition("<body>")[2]


def test_a_table_that_is_too_wide_says_what_it_leaves_out():
    wide = table([{f"column {k}": "x" * 30 for k in range(9)}])
    lines = list(answers.table_lines("wide", wide, 80))
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("(no room for: column 2,") for line in lines)
    long = table([{"a": "x" * 60, "b": "y"}])
    assert "x" * 60 in "\n".join(answers.table_lines("long", long, 80))
    assert "x" * 39 + "…" in "\n".join(answers.table_lines("long", long, 50))
    assert "(2 more rows in gaps.csv)" in answers.table_lines("gaps", table(shown=1), 80)
    assert answers.rest("gaps", table(shown=3)) == answers.rest("gaps", table()) == ""
    assert answers.rest("gaps", table(shown=2)) == "1 more row in gaps.csv"


def test_files_are_written_whole_with_all_rows_in_full_precision_and_no_formulas(tmp_path):
    rows = [{"n": 7, "gap": 1 / 3, "which": "=HYPERLINK()"}, {"n": None, "gap": -1e-300, "which": "-x"}]
    made = answer(tables={"gaps": table(rows, shown=1), "all": table(title="Everything", shown=0)})
    written = answers.write(made, tmp_path / "new" / "order")
    names = ["order.md", "order.json", "gaps.csv", "all.csv", "traces.svg"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "new" / "order").iterdir()) == sorted(names)
    found = list(csv.DictReader(io.StringIO((tmp_path / "new/order/gaps.csv").read_text())))
    assert [row["n"] for row in found] == ["7", ""]
    assert [float(row["gap"]) for row in found] == [1 / 3, -1e-300]
    assert [row["which"] for row in found] == ["'=HYPERLINK()", "'-x"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write there"):
        answers.write(answer(), tmp_path / "file")


def test_json_is_json():
    infinite = answer(tables={"gaps": table(({"layer": "a", "gap": math.inf}, {"layer": "b", "gap": math.nan}))})
    found = json.loads(answers.as_json(infinite), parse_constant=pytest.fail)
    assert [row["gap"] for row in found["tables"]["gaps"]["rows"]] == ["inf", None]
    assert found["claims"][0] == {"statement": "X₁ ⪯ X₂", "held": True}
    assert found["provenance"]["nested"] == {"a": 1}
    assert [one["name"] for one in json.loads(answers.as_json([answer(), broken()]))] == ["order", "cost"]


def test_markdown():
    text = answers.as_markdown(answer())
    assert text.startswith("# Is order so?\n\n    F~^½ ⪯ X_Shampoo\n\nYes. 3")
    assert "| layer | gap | which \\| kind |\n| --- | ---: | --- |\n" in text
    assert "| a\\|b |" in text
    assert "![traces over steps](traces.svg)" in text
    assert "    caspr-verify order\n" in text
    assert "torch 2.9" in text
    assert "nested" not in text


def test_page_stands_alone():
    text = page.answers([answer(), answer("regret"), broken()], "Theory")
    found = parsed(text)
    ids = [each["id"] for _, each in found.seen if "id" in each]
    assert len(ids) == len(set(ids))
    links = [each["href"] for tag, each in found.seen if tag == "a"]
    assert links == ["#order", "#regret", "#cost"]
    assert {link[1:] for link in links} <= set(ids)
    fetched = [value for _, each in found.seen for key, value in each.items() if key in ("src", "href")]
    assert all(link.startswith("#") for link in fetched)  # to answers, and uses of a figure's own parts
    assert not {"script", "link"} & {tag for tag, _ in found.seen}
    assert text.count("<svg") >= 3
    assert "prefers-color-scheme: dark" in text
    assert "3 &lt; 4 &amp; so on." in text
    start = text[: text.index("<main")]
    for said in ("Is order so?", "Is cost so?", "1 of 5 statements that should hold did not: predicted is measured."):
        assert said in start
    assert "all 2 statements that should hold did" in page.answers([answer()], "Theory")


@pytest.mark.parametrize(
    ("verdict", "held", "word"),
    [
        ("Yes", [], "Yes"),
        ("Yes", [True, True], "Yes"),
        ("Yes", [True, False], "Mixed"),
        ("Yes", [False, False], "No"),
        ("Mixed", [True], "Mixed"),
        ("No", [True, True], "No"),
        ("No", [True, False], "No"),
    ],
)
def test_the_answer_in_a_word(verdict, held, word):
    claims = tuple((f"claim {k}", one) for k, one in enumerate(held))
    made = answer(verdict=verdict, claims=claims)
    assert made.word == word
    html = page.answers([made], "Theory")
    assert html.count(f'<span class="chip {word.lower()}">{word}</span>') == 2  # in the list of questions, and below


def test_judged():
    assert [answers.judged(found) for found in ([True, True], [True, False], [False])] == ["Yes", "Mixed", "No"]


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("F~^½ ⪯ X₁", "<i>F\u0303</i><sup>½</sup> ⪯ <i>X</i>₁"),
        ("X_Shampoo − X₂", "<i>X</i><sub>Shampoo</sub> − <i>X</i>₂"),
        ("‖X⁻¹ − F^−½‖", "‖<i>X</i>⁻¹ − <i>F</i><sup>−½</sup>‖"),
        ("(1 − δκ)^(−1−1/p)", "(1 − δκ)<sup>−1−1/p</sup>"),
        ("2mn (t_m + t_n)", "2mn (t<sub>m</sub> + t<sub>n</sub>)"),
        ("1B of c4_lm at node_embedding.weight", "1B of c4_lm at node_embedding.weight"),
        ("CASPR is Shampoo's, 3 < 4 & F", "CASPR is Shampoo&#39;s, 3 &lt; 4 &amp; <i>F</i>"),
        ("FLOPs = 2mn", "FLOPs = 2mn"),
        ("<b>", "&lt;b&gt;"),
    ],
)
def test_formulas_are_set(text, html):
    assert str(typeset(text)) == html


def test_formulas_of_figures_are_set():
    text = "<text style='a^b'>tr X / tr F~^½, X_Shampoo</text>"
    made = typeset_figure(f'<svg aria-label="tr F~^½"><g>{text}<text>plain_name</text></g></svg>')
    root = ElementTree.fromstring(made)
    texts = ["".join(one.itertext()).replace("\u200b", "") for one in root.iter("text")]
    assert texts == ["tr X / tr F\u0303½, XShampoo", "plain_name"]
    moves = [
        float(one.attrib["dy"].removesuffix("em")) * (0.75 if "font-size" in one.attrib else 1)
        for one in root.iter("tspan")
    ]
    assert len(moves) == 4
    assert sum(moves) == pytest.approx(0)  # back on the line
    assert root.attrib["aria-label"] == "tr F~^½"
