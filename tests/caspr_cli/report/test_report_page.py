import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import synthetic
from balanced import parsed
from recorded import run
from tabled import searched, seeds, table

from caspr_cli.report import figures, sensitivity, style, tuning
from caspr_cli.report.compare import tables
from caspr_cli.report.format import mean_sd
from caspr_cli.report.page import compared, opening

COMMAND = "caspr-report compare outputs --to 'a <b>.html'"


@cache
def study() -> str:
    """Two of the five tasks, to save time."""
    tables = synthetic.study()
    return compared([tables[0], tables[3]], COMMAND)


@cache
def bare() -> str:
    return compared([synthetic.bare()], COMMAND)


def results_of(html: str) -> tuple[str, str]:
    """Return the first table, and the same for phones."""
    results = html[html.index('id="results"') : html.index("</section>")]
    wide, _, narrow = results.partition('class="numbers narrow"')
    return wide, narrow


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time of a page."""
    monkeypatch.setattr("caspr_cli.report.page._figures", lambda table, styles: [])


@pytest.mark.parametrize("made", [study, bare])
def test_it_is_html_with_every_tag_closed_that_needs_nothing_from_elsewhere(made: Callable[[], str]) -> None:
    html = made()
    assert html.startswith("<!doctype html>")
    assert re.findall(r"https?://|//\w|@import|src=", html) == []
    found = parsed(html)
    headings = [int(tag[1]) for tag, _ in found.seen if re.fullmatch("h[1-6]", tag)]
    assert (headings.count(1), headings[0]) == (1, 1)
    assert all(b <= a + 1 for a, b in pairwise(headings))
    tags = Counter(tag for tag, _ in found.seen)
    assert tags.keys() & {"script", "link", "img", "iframe", "base"} == set()
    targets = [str(attrs["href"]) for _, attrs in found.seen if "href" in attrs]
    assert all(target.startswith("#") for target in targets)
    identifiers = Counter(attrs["id"] for _, attrs in found.seen if "id" in attrs)
    assert max(identifiers.values()) == 1
    referred = {target[1:] for target in targets} | set(re.findall(r"url\(#([^)]+)\)", html))
    assert referred
    assert referred <= set(identifiers)
    figures = [attrs for tag, attrs in found.seen if tag == "svg" and attrs.get("role") == "img"]
    assert len(figures) == (5 + 5 + 1 if made is study else 2)
    assert all(attrs["aria-label"] and not {"xmlns", "width", "height"} & attrs.keys() for attrs in figures)
    assert tags["table"] == tags["caption"]
    assert all("scope" in attrs for tag, attrs in found.seen if tag == "th")
    cells = [attrs for tag, attrs in found.seen if tag == "td"]  # on a phone a row is a card, with heads beside cells
    assert all(attrs.get("data-head") for attrs in cells)
    body, css = html[html.index("<body") :], html[: html.index("<body")]
    assert not any(light in body for light, _ in style.PALETTE.values())  # figures take the colours of the page
    assert "fill: var(--ink)" in body
    assert all(f"--{name}: {dark};" in css for name, (_, dark) in style.PALETTE.items())
    assert "@media screen and (max-width: 40rem)" in css


def test_what_the_page_of_a_study_says() -> None:
    html = study()
    found = parsed(html)
    cells, code = found.within("td", "th", "span", "div"), found.within("code")
    for word in ("better", "worse", "no significant difference", "baseline", "not run"):  # soap on resnet
        assert word in cells
    assert {"▲", "▼", "≈", "●"} <= set(cells)
    assert re.search(r"in test [+-]\d+\.\d+ % \([+-]", cells)
    results, cards = results_of(html)
    means = re.findall(r"\d ± [^<]*", results)
    assert len(means) == 11
    assert all(re.search(r"\(n = 5|\(n = 4 of 5", mean) for mean in means)
    assert sorted(re.findall(r"\d ± [^<]*", cards)) == sorted(means)  # on a phone, a card for each task
    assert re.findall(r'scope="row">(\w+)', cards) == ["c4_lm", "resnet"]
    assert "not run" not in cards
    assert "n = 5: shampoo, caspr, soap, adamw and sgd; n = 4: muon." in found.within("figcaption")
    for said in (
        "4 of 5", "lr=0.001", "1, 2, 3 (failed), 4, 5, held out", "number 0, of 6 (1 failed)", "A CPU, 2 cores",
        "caspr-cli 0.1.0, python 3.11.7, torch 2.9.0", "words (sample), hash abcd", "01234567 with changes feedfeed",
    ):  # fmt: skip
        assert said in cells
    assert "somewhere" not in cells.split()  # the name of the host is nobody's business
    assert synthetic.language().rows[0].runs[0].folder in code.split("\n")
    assert COMMAND in code
    assert "optim=adamw" in code
    assert "4 of 5 seeds count: not seed 3 (diverged: loss is nan)" in found.within("li")
    assert "Over all tasks" in html
    assert "soap was not run on resnet" in html


def test_provenance_is_counted_or_left_out(without_figures: None) -> None:
    gpu = {"device": {"type": "cuda", "name": "H100", "processes": 2, "threads": 4}, "machine": {"processor": "Xeon"}}
    made = table([run("caspr", 0), run("caspr", 1, provenance=gpu)])
    several = compared([made], COMMAND)
    cells = parsed(several).within("td")
    assert "A CPU, 1 process, 1 thread (1 run); H100, 2 processes, 4 threads (1 run)" in cells
    assert "A CPU, 2 cores (1 run); Xeon (1 run)" in cells
    assert "Over all tasks" not in several  # of one task a profile says nothing new
    none = compared([table([replace(run("caspr"), provenance={})])], COMMAND)
    assert "Provenance" in none
    assert parsed(none).within("td").count("CPU") == 0


def test_labels_and_words_of_files_are_text() -> None:
    evil = "<script>alert(1)</script>&amp;\"'"
    one = run(evil, 1, task__name=evil, task__data=evil, provenance={"packages": {evil: evil}, "python": "\ud800"})
    one.provenance["command"] = [evil]
    one = replace(one, path=f"{evil}/seed1")
    made = replace(table([one, replace(one, config=one.config | {"seed": 2})], baseline=evil), warnings=(evil,))
    html = compared([made, replace(made, scale=evil)], evil)
    html.encode("utf8")
    found = parsed(html)
    assert "script" not in {tag for tag, _ in found.seen}
    for tags in (("h1",), ("span", "th"), ("li",), ("code",)):
        assert evil in found.within(*tags)


def test_bold_is_the_best_of_a_column_and_significance_has_a_mark(without_figures: None) -> None:
    made = table(seeds("adamw", [4.5, 4.52, 4.47]) + seeds("caspr", [4.4, 4.51, 4.49]))
    html = compared([made], COMMAND)
    results, cards = results_of(html)
    assert re.findall(r'class="best">([^<]*) \(', cards) == [mean_sd(made.rows[0].validation)]
    assert re.findall(r'class="best">([^<]*) \(', results) == [mean_sd(made.rows[0].validation)]
    row = results[results.index("</svg>caspr") :]
    row = row[: row.index("</tr>")]
    assert "≈</span> no significant difference" in row
    assert "▲" not in row


def test_rows_with_baselines_of_their_own_name_them(without_figures: None) -> None:
    runs = [each for k in (0.0, 0.1) for o in ("adamw", "caspr") for each in
            seeds(o, [4.0 + k, 4.1 + k, 4.3], optim__weight_decay=k)]  # fmt: skip
    html = compared([table(runs, baseline="weight_decay=0")], COMMAND)
    text = parsed(html).within("th", "p", "td", "div")
    assert "against each optimizer's own row with weight_decay=0" in text
    assert re.search(r"th\.verdict \{[^}]*white-space: normal", html)  # its head is long, and would widen the table
    assert ", against adamw" in text


def test_a_row_of_one_table_is_that_of_another_with_the_same_settings(without_figures: None) -> None:
    runs = [run("caspr", 1, optim__eps=1e-6), run("caspr", 1, optim__eps=1e-4, task__name="vit")]
    both = tables([*runs, run("caspr", 1, optim__eps=1e-6, task__name="vit")])
    assert parsed(compared(both, COMMAND)).within("td").split("\n").count("not run") == 1
    assert opening(both)[0] == "2 rows compared on 2 tasks (c4_lm and vit): caspr eps=1e-06 and caspr eps=0.0001."


def test_it_opens_with_what_was_compared() -> None:
    first, second, third = opening([synthetic.study()[0], synthetic.study()[3]])
    assert first == "6 rows compared on 2 tasks (c4_lm and resnet): shampoo, caspr, soap, adamw, sgd and muon."
    assert second.startswith("55 reported runs with seeds 1 to 5; 54 of them ended with a finite value.")
    assert "66 trials" in second
    assert third.startswith("Against adamw")
    assert opening([synthetic.ablation()])[0].endswith("variants of caspr.")
    assert opening([table([run(optim__note=k) for k in range(12, 24)])])[0].endswith("note=18 and 5 more.")


def test_it_says_at_once_what_is_not_finished_and_whose_seeds_selected_the_trial(without_figures: None) -> None:
    going = [run("caspr", 3, None, "running", optim__lr=1e-3), run("caspr", 4, None, "preempted", optim__lr=1e-3)]
    caspr = searched("caspr", [4.2, 4.0, 4.1]) + seeds("caspr", [4.0, 4.1], 1, optim__lr=1e-3)
    made = tables(caspr + going + searched("adamw", [4.5, 4.4, 4.6]))
    said = "all ended with a finite value, and 2 more of the selected settings are not finished"
    assert f"3 reported runs with seeds 0 to 2; {said}" in opening(made)[1]
    found = parsed(compared(made, COMMAND)).within("td", "span")
    assert found.count("its seeds selected the trial") == 2  # the second is for phones


def test_it_begins_with_who_wins_and_has_every_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("curves", "intervals", "best_of"):  # to save time
        monkeypatch.setattr(figures, name, lambda *_: "")
    again = [run("caspr", seed, 4.0, optim__lr=1e-3, search__rerank=3) for seed in (1001, 1002)]
    runs = searched("caspr", [4.2, 4.0, None, 4.4], search__rerank=3) + again + searched("adamw", [4.5, 4.4, 4.6])
    html = compared(tables(runs), COMMAND)
    found = parsed(html)
    assert found.within("p").startswith("Best mean: caspr; ")
    assert html.index('class="lead"') < html.index("<nav")
    captions = found.within("caption", "figcaption", "summary", "span")
    for caption in (tuning.BY_BUDGET, tuning.WIDTHS, tuning.RAN_WITH, tuning.TRIALS, sensitivity.BY_RATE):
        assert captions.count(caption) == 1
    assert "All 7 trials" in captions
    every = html[html.index("<details") : html.index("</details>")]
    assert every.count('<th scope="row">') == 7
    assert 'class="text">diverged: loss is nan<' in every
    assert "4.0000, 4.0000" in every  # run again
    assert every.index("4.0000") < every.index("4.2000") < every.index("4.4000") < every.index("diverged")
    plain = compared(tables(seeds("caspr", [4.0, 4.1])), COMMAND)
    assert "<details" not in plain
    assert tuning.BY_BUDGET not in parsed(plain).within("span")


def test_what_is_unknown_is_not_made_up() -> None:
    text = parsed(bare()).within("p", "td", "span", "text", "th")
    for said in (
        "There is no baseline", "1 reported run with seed 0;", "no finite run", "no run is done", "4.4000 (n = 1)",
    ):  # fmt: skip
        assert said in text
    assert "▲" not in text
    assert "target" not in text
