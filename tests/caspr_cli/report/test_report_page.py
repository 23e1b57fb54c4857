from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import synthetic
from recorded import run
from tabled import searched, seeds

from caspr_cli.report import style, tuning
from caspr_cli.report.compare import tables
from caspr_cli.report.format import mean_sd
from caspr_cli.report.model import Run
from caspr_cli.report.page import opening, page
from caspr_cli.report.profile import profile

VOID = {"meta", "br", "hr", "img", "link", "input"}
COMMAND = "caspr-report compare outputs --to 'a <b>.html'"


class Balanced(HTMLParser):
    """Raises where tags are not closed in order, and gathers what is in them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append((self.open[-1] if self.open else "", data))

    def within(self, *tags: str) -> str:
        return "\n".join(data for tag, data in self.text if tag in tags)


def parsed(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


@cache
def study() -> str:
    """Two of the five tasks, to save time."""
    tables = synthetic.study()
    return page([tables[0], tables[3]], profile(tables, "steps"), "Five tasks", COMMAND)


@cache
def bare() -> str:
    return page([synthetic.bare()], None, "Little is known", COMMAND)


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
    assert len(figures) == (4 + 4 + 1 if made is study else 3)
    assert all(attrs["aria-label"] and not {"xmlns", "width", "height"} & attrs.keys() for attrs in figures)
    assert tags["table"] == tags["caption"]
    assert all("scope" in attrs for tag, attrs in found.seen if tag == "th")


def test_what_the_page_of_a_study_says() -> None:
    html = study()
    found = parsed(html)
    cells, code = found.within("td", "th", "span", "div"), found.within("code")
    for word in ("better", "worse", "no significant difference", "baseline"):
        assert f" {word}" in cells
    assert {"▲", "▼", "≈", "●"} <= set(cells)
    assert synthetic.VERDICT.partition("difference")[2] in cells
    assert "not run" in cells  # soap on resnet
    assert re.search(r"in test [+-]\d+\.\d+ % \([+-]", cells)
    results = html[html.index('id="results"') : html.index("</section>")]
    means = re.findall(r"\d ± [^<]*", results)
    assert len(means) == 11
    assert all(re.search(r"\(n = 5|\(n = 4 of 5", mean) for mean in means)
    assert "n = 5: shampoo, caspr, soap, adamw and sgd; n = 4: muon." in found.within("figcaption")
    assert "4 of 5" in cells  # muon's failed seed
    for said in (
        "lr=0.001", "1, 2, 3 (failed), 4, 5, held out", "number 0, of 6 (1 failed)", "AMD EPYC, 2 cores, Linux-6.18",
        "caspr-cli 0.1.0, python 3.11.7, torch 2.14.1", "python-stdlib (sample), hash c919348c4a87560d", "997f39e9",
    ):  # fmt: skip
        assert said in cells
    assert "vm" not in cells.split()  # the name of the host is nobody's business
    assert synthetic.language().rows[0].runs[0].folder in code.split("\n")
    assert COMMAND in code
    assert "caspr-train task=c4_lm" in code
    assert "CUDA out of memory" in found.within("li")
    assert "Over all tasks" in html
    assert "soap was not run on resnet" in html


def test_provenance_is_counted_or_left_out(without_figures: None) -> None:
    table = synthetic.bare()
    run = table.rows[0].runs[0]

    def made(*runs: Run) -> str:
        rows = (replace(table.rows[0], runs=runs, trials=()),)
        return page([replace(table, rows=rows)], profile([replace(table, target=4.5)], "steps"), "Two", COMMAND)

    gpu = {"device": {"type": "cuda", "name": "H100", "processes": 2, "threads": 4}, "machine": {"processor": "Xeon"}}
    several = made(run, replace(run, path="elsewhere", provenance=gpu))
    cells = parsed(several).within("td")
    assert "AMD EPYC, 1 process, 2 threads (1 run); H100, 2 processes, 4 threads (1 run)" in cells
    assert "AMD EPYC, 2 cores, Linux-6.18 (1 run); Xeon (1 run)" in cells
    assert "Over all tasks" not in several  # of one task a profile says nothing new
    none = made(replace(run, provenance={}))
    assert "Provenance" in none
    assert parsed(none).within("td").count("EPYC") == 0


def test_labels_and_words_of_files_are_text() -> None:
    evil = "<script>alert(1)</script>&amp;\"'"
    run = synthetic.run("caspr", 1, 4.0)
    run = replace(
        run, path=f"{evil}/seed1", provenance={"command": [evil], "packages": {evil: evil}, "python": "\ud800"}
    )
    row = synthetic.row(evil, [run, replace(run, config=run.config | {"seed": 2})])
    made = synthetic.table([row], baseline=evil, task=evil, data=evil, warnings=(evil,))
    html = page([made], profile([made, replace(made, scale=evil)], "steps"), evil, evil)
    html.encode("utf8")
    found = parsed(html)
    assert "script" not in {tag for tag, _ in found.seen}
    assert found.within("h1") == evil
    assert evil in found.within("span", "th")
    assert evil in found.within("li")
    assert evil in found.within("code")


def test_bold_is_the_best_of_a_column_and_significance_has_a_mark(without_figures: None) -> None:
    table = synthetic.language()
    best = table.rows[0]
    assert best.difference is not None
    alike = replace(best, difference=replace(best.difference, verdict=synthetic.VERDICT))
    html = page([replace(table, rows=(alike, *table.rows[1:]))], None, "One", COMMAND)
    results = html[html.index('id="results"') : html.index("</section>")]
    assert re.findall(r'class="best">([^<]*) \(', results) == [mean_sd(best.mean, best.sd)]
    row = results[results.index(best.label) : results.index("</tr>", results.index(best.label))]
    assert "≈</span> no significant difference" in row
    assert "▲" not in row


def test_on_a_phone_a_cell_has_its_head_beside_it() -> None:
    """A row is a card there: every cell of a table's body says what it is."""
    for html in (study(), bare()):
        cells = [attrs for tag, attrs in parsed(html).seen if tag == "td"]
        assert cells
        assert all(attrs.get("data-head") for attrs in cells)
        assert "@media screen and (max-width: 40rem)" in html


def test_rows_with_baselines_of_their_own_name_them(without_figures: None) -> None:
    table = synthetic.language()
    rows = [replace(row, is_baseline=row.label in ("adamw", "caspr")) for row in table.rows]
    html = page([replace(table, rows=tuple(rows), baseline="eps=1e-08")], None, "Own", COMMAND)
    text = parsed(html).within("th", "p", "td", "div")
    assert "against each optimizer's own row with eps=1e-08" in text
    assert re.search(r"th\.verdict \{[^}]*white-space: normal", html)  # its head is long, and would widen the table
    assert ", against adamw" in text


def test_a_row_of_one_table_is_that_of_another_with_the_same_settings(without_figures: None) -> None:
    one = synthetic.table([synthetic.row("caspr", [synthetic.run("caspr", 1, 4.0)], settings={"optim.eps": 1e-6})])
    rows = [
        synthetic.row(f"caspr eps={eps:g}", [synthetic.run("caspr", 1, 4.0)], task="vit", settings={"optim.eps": eps})
        for eps in (1e-6, 1e-4)
    ]
    both = [one, synthetic.table(rows, task="vit")]
    cells = parsed(page(both, None, "Two", COMMAND)).within("td")
    assert cells.split("\n").count("not run") == 1
    assert opening(both)[0] == "2 rows compared on 2 tasks (c4_lm and vit): caspr eps=1e-06 and caspr eps=0.0001."


def test_it_opens_with_what_was_compared() -> None:
    first, second, third = opening([synthetic.study()[0], synthetic.study()[3]])
    assert first == "6 rows compared on 2 tasks (c4_lm and resnet): shampoo, caspr, soap, muon, adamw and sgd."
    assert second.startswith("55 reported runs with seeds 1 to 5; 54 of them ended with a finite value.")
    assert "66 trials" in second
    assert third.startswith("Against adamw")
    assert opening([synthetic.ablation()])[0].endswith("caspr graft=sgd and 7 more.")
    long = [replace(row, label=f"{row.label} {'x' * 40}") for row in synthetic.ablation().rows]
    assert opening([replace(synthetic.ablation(), rows=tuple(long))])[0].endswith("variants of caspr.")


def test_it_says_at_once_what_is_not_finished_and_whose_seeds_selected_the_trial(without_figures: None) -> None:
    going = [run("caspr", 3, None, "running", optim__lr=1e-3), run("caspr", 4, None, "preempted", optim__lr=1e-3)]
    caspr = searched("caspr", [4.2, 4.0, 4.1]) + seeds("caspr", [4.0, 4.1], 1, optim__lr=1e-3)
    made = tables(caspr + going + searched("adamw", [4.5, 4.4, 4.6]))
    said = "all ended with a finite value, and 2 more of the selected settings are not finished"
    assert f"3 reported runs with seeds 0 to 2; {said}" in opening(made)[1]
    found = parsed(page(made, None, "Part", COMMAND)).within("td", "span")
    assert found.count("its seeds selected the trial") == 1


def test_it_begins_with_who_wins_and_has_every_trial(without_figures: None) -> None:
    again = [run("caspr", seed, 4.0, optim__lr=1e-3, search__rerank=3) for seed in (1001, 1002)]
    runs = searched("caspr", [4.2, 4.0, None, 4.4], search__rerank=3) + again + searched("adamw", [4.5, 4.4, 4.6])
    made = tables(runs)
    html = page(made, None, "Tuned", COMMAND)
    found = parsed(html)
    assert found.within("p").startswith("Best mean: caspr; ")
    assert html.index('class="lead"') < html.index("<nav")
    captions = found.within("caption", "figcaption", "summary", "span")
    for caption in (tuning.BY_BUDGET, tuning.WIDTHS, tuning.RAN_WITH, tuning.TRIALS):
        assert captions.count(caption) == 1
    assert "All 7 trials" in captions
    every = html[html.index("<details") : html.index("</details>")]
    assert every.count('<th scope="row">') == 7
    assert 'class="text">diverged: loss is nan<' in every
    assert "4.0000, 4.0000" in every  # run again
    assert every.index("4.0000") < every.index("4.2000") < every.index("4.4000") < every.index("diverged")
    plain = page(tables(seeds("caspr", [4.0, 4.1])), None, "Untuned", COMMAND)
    assert "<details" not in plain
    assert tuning.BY_BUDGET not in parsed(plain).within("span")


def test_what_is_unknown_is_not_made_up() -> None:
    text = parsed(bare()).within("p", "td", "span", "text", "th")
    assert "There is no baseline" in text
    assert "no finite run" in text
    assert "no run is done" in text
    assert "4.4000 (n = 1)" in text
    assert "▲" not in text
    assert "target" not in text


def test_figures_take_the_colours_of_the_page() -> None:
    html = study()
    body = html[html.index("<body") :]
    assert not any(light in body for light, _ in style.PALETTE.values())
    assert "stroke: var(--blue)" in body
    assert "fill: var(--ink)" in body
    css = html[: html.index("<body")]
    assert all(f"--{name}: {dark};" in css for name, (_, dark) in style.PALETTE.items())
