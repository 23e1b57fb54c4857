"""A report as one HTML file: no scripts, nothing from elsewhere, light and dark, on any width."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import fmean
from xml.etree.ElementTree import Element, tostring

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from caspr_cli.report import about, across, answer, figures, formats, look, words
from caspr_cli.report.answer import Answer
from caspr_cli.report.html import Cells, document, el, inline, swatch, table
from caspr_cli.report.look import Style
from caspr_cli.report.model import Row, Run, Table
from caspr_cli.report.profile import NOT_ALGOPERF, SHOWN, Profile, names, rho, times
from caspr_cli.report.profile import profile as profile_of
from caspr_cli.report.rows import ended
from caspr_cli.report.style import PALETTE, UNWRITABLE

# How a verdict is marked: told apart by form, not by colour alone.
MARKS = {"better": "▲", "worse": "▼", words.CANNOT_TELL: "≈", "baseline": "●"}
LEGEND = (
    "▲ better and ▼ worse than the baseline by a test at 5 %, corrected for several rows; ≈ cannot tell: these seeds "
    "do not separate the two, which does not mean that they are equal, or one side has the luckier ones. "
    f"{words.sentence(words.ABOUT_SETTINGS)}; {words.NOT_CORRECTED}."
)
LONG = 26  # characters of a label that may be broken
Styles = Mapping[str, Style]


def compared(tables: Sequence[Table], command: str) -> str:
    """The page of some tables, with their profile."""
    tasks = words.listed(list(dict.fromkeys(table.task for table in tables)))
    return page(tables, profile_of(tables, "steps"), f"Optimizers compared on {tasks}", command)


def page(tables: Sequence[Table], profile: Profile | None, title: str, command: str) -> str:
    """The whole file.

    Args:
        profile: over these tables; left out if it is None or of fewer than two tasks.
        command: what made the page, as one would type it.
    """
    own = [row.label for made in tables for row in made.rows]
    styles = look.styles([*own, *(label for labels in across.labels(tables) for label in labels)])
    sections = {name: f"task-{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{k}" for k, name in enumerate(names(tables))}
    links = {"results": "Results", **{anchor: name for name, anchor in sections.items()}}
    several = profile is not None and len(profile.tasks) > 1  # of one task it says what the table says
    links |= {"profile": "Over all tasks"} if several else {}
    links |= {"reading": "How to read this", "settings": "Settings", "provenance": "Provenance"}
    return document(
        title,
        el(
            "header",
            el("h1", title),
            *(el("p", text) for text in opening(tables)),
            el("nav", *(el("a", text, href=f"#{anchor}") for anchor, text in links.items()), aria_label="On this page"),
        ),
        el(
            "main",
            _results(tables, styles),
            *(_task(made, name, sections[name], styles) for name, made in zip(sections, tables, strict=True)),
            _profile(profile, styles) if profile and several else None,
            about.reading(),
            about.settings(tables),
            about.provenance(tables, command),
        ),
    )


def opening(tables: Sequence[Table]) -> list[str]:
    """What was compared, in words."""
    labels = list(dict.fromkeys(label for labels in across.labels(tables) for label in labels))
    reported = [run for made in tables for row in made.rows for run in row.runs]
    trials = sum(len(row.trials) for made in tables for row in made.rows)
    finite = sum(run.final is not None for run in reported)
    selected = [row.selected for made in tables for row in made.rows if row.selected]
    going = sum(not ended(run) for trial in selected for run in trial.runs)
    bases = list(dict.fromkeys(formats.baseline(made) for made in tables if made.baseline))
    rows = words.listed(labels)
    if len(rows) > 200:
        rows = f"variants of {words.listed(sorted({row.optim for made in tables for row in made.rows}))}"
    where = f"on {words.count(len(tables), 'task')} ({words.listed(names(tables))})"
    runs = f"{words.count(len(reported), 'reported run')}{_seeds(reported)}"
    how = "all ended" if finite == len(reported) else f"{finite} of them ended"
    more = f", and {going} more of the selected settings {'is' if going == 1 else 'are'} not finished" if going else ""
    return [
        f"{words.count(len(labels), 'row')} compared {where}: {rows}.",
        f"{runs}; {how} with a finite value{more}. Settings were chosen from {words.count(trials, 'trial')} in all.",
        f"Against {words.listed(bases)}: verdicts are tests of the difference to it."
        if bases
        else "There is no baseline, so no row is tested against another.",
    ]


def _seeds(runs: Sequence[Run]) -> str:
    seeds = sorted({run.seed for run in runs})
    if not seeds:
        return ""
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f" with seeds {seeds[0]} to {seeds[-1]}"
    return f" with seed{'s' * (len(seeds) > 1)} {words.listed([str(seed) for seed in seeds])}"


def _results(tables: Sequence[Table], styles: Styles) -> Element:
    """Rows by tasks: what each came to, and whether that is better than the baseline."""
    rows_by_label = [
        dict(zip(labels, made.rows, strict=True)) for labels, made in zip(across.labels(tables), tables, strict=True)
    ]
    heads: Cells = ["", *(_with_small(name, _metric(made)) for name, made in zip(names(tables), tables, strict=True))]
    rows: list[Cells] = []
    for label in _by_place(rows_by_label):
        rows.append([_named(label, styles), *(_cell(rows.get(label)) for rows in rows_by_label)])
    return el(
        "section",
        el("h2", "Results"),
        table("Mean ± standard deviation of validation at the end, over n seeds; bold: better.", heads, rows),
        el("p", LEGEND, class_="muted") if any(made.baseline for made in tables) else None,
        id="results",
    )


def _by_place(tables: Sequence[Mapping[str, Row]]) -> list[str]:
    """All labels, by their mean place in the tables that have them."""
    places: dict[str, list[float]] = {}
    for rows in tables:
        for k, label in enumerate(rows):
            places.setdefault(label, []).append(k / max(len(rows) - 1, 1))
    return sorted(places, key=lambda label: fmean(places[label]))


def _metric(made: Table) -> str:
    return f"{made.metric}, {'higher' if made.higher_is_better else 'lower'} is better"


def _named(label: str, styles: Styles) -> Element:
    return el("span", swatch(styles[label]), label, class_="long" if len(label) > LONG else "short")


def _with_small(text: str, small: str) -> Element:
    return el("span", text, el("span", small, class_="small"))


def _cell(row: Row | None) -> Element:
    if row is None:
        return el("td", "not run", class_="other")
    if row.mean is None:
        return el("td", "no finite run", class_="other")
    value = f"{words.spread(row.mean, row.sd)} (n = {words.seeds(row)})"
    lucky = None if row.fresh else el("span", "its seeds chose the trial", class_="small")
    return el("td", el("span", value, class_="best") if _kind(row) == "better" else value, lucky, _mark(row))


def _kind(row: Row) -> str | None:
    """The verdict as one of the keys of ``MARKS``."""
    if row.difference:
        return row.difference.verdict.partition(":")[0]
    return "baseline" if row.is_baseline else None


def _mark(row: Row) -> Element | None:
    kind = _kind(row)
    if kind is None:
        return None
    colour = kind if kind in ("better", "worse") else "other"
    return el("span", el("span", MARKS.get(kind, "≈"), aria_hidden="true"), f" {kind}", class_=f"small {colour}")


def _task(made: Table, name: str, anchor: str, styles: Styles) -> Element:
    """The table of a task, what to know before believing it, and its figures."""
    columns = formats.columns(made)
    own = sum(row.is_baseline for row in made.rows) > 1
    shares = any(row.difference and row.difference.share_of is not None for row in made.rows)
    unit = el("span", "row minus baseline, in per cent of the baseline's mean", class_="small") if shares else None
    head = el("th", f"against {formats.baseline(made)}", unit, class_="verdict", scope="col")
    against = [head] if made.baseline else []
    heads: Cells = [*(column.head for column in columns), *against]
    rows: list[Cells] = [
        [
            _named(row.label, styles),
            *(column.cell(row) for column in columns[1:]),
            *([_in_words(row, own)] if made.baseline else []),
        ]
        for row in made.rows
    ]
    warned = [el("li", text) for text in made.warnings]
    return el(
        "section",
        el("h2", name),
        table(formats.title(made), heads, rows),
        el("aside", el("h3", "Before you believe it"), el("ul", *warned), class_="warnings") if warned else None,
        el("div", *_figures(made, styles), class_="figures"),
        id=anchor,
    )


def _in_words(row: Row, own: bool) -> Element:
    """The verdict, with the baseline's name where rows have their own, and the difference in test below."""
    kind, said, test = _kind(row), formats.verdict(row), ""
    if row.difference:
        said = said.removeprefix(f"against {row.difference.against}: ")
        said += f", against {row.difference.against}" if own else ""
        test = words.in_test(row.difference)
    colour = kind if kind in ("better", "worse") else "other"
    head, rest = (kind, said.removeprefix(kind)) if kind and said.startswith(kind) else ("", said)
    mark = el("span", f"{MARKS.get(kind or '', '')} {head}".strip(), class_=colour)
    return el("td", mark, rest, el("span", f"in test {test}", class_="small") if test else None, class_="verdict")


def _figures(made: Table, styles: Styles) -> list[Element]:
    """Those that have something to show."""
    drawn: list[tuple[str, Callable[[], str]]] = [
        (f"Mean over training, with its 95 % interval; {_ns(made)}.", lambda: figures.curves(made, "steps", styles)),
        ("The same by time: seconds are medians over seeds.", lambda: figures.curves(made, "seconds", styles)),
        (
            f"Means with their 95 % intervals; small dots are single seeds; {_ns(made)}.",
            lambda: figures.intervals(made, styles),
        ),
        (
            "The best of so many trials, expected from those that were made, with the seeds that choose: its end is "
            "the winner's, which was lucky, so that fresh seeds end worse.",
            lambda: figures.best_of(made, styles),
        ),
    ]
    return [_figure(svg, caption) for caption, draw in drawn if (svg := draw())]


def _ns(made: Table) -> str:
    """How many seeds the means are of."""
    counts: dict[int, list[str]] = {}
    for row in made.rows:
        if row.n:
            counts.setdefault(row.n, []).append(row.label)
    if len(counts) == 1:
        return f"n = {next(iter(counts))}"
    return "; ".join(f"n = {n}: {words.listed(labels)}" for n, labels in sorted(counts.items(), reverse=True))


def _figure(svg: str, caption: str) -> Element:
    return el("figure", inline(svg), el("figcaption", caption))


def _profile(profile: Profile, styles: Styles) -> Element:
    heads = ["", "score", *(f"ρ({tau:g})" for tau in SHOWN), *profile.tasks]
    rows: list[Cells] = [
        [
            _named(label, styles),
            f"{points:.3f}",
            *(f"{rho(profile.ratios[label], tau):.2f}" for tau in SHOWN),
            *map(times, profile.ratios[label]),
        ]
        for label, points in profile.scores.items()
    ]
    caption = f"Median {profile.unit} to target as a multiple of the fastest row of the task, and what follows."
    svg = figures.profile(profile, styles)
    return el(
        "section",
        el("h2", "Over all tasks"),
        el(
            "p",
            f"ρ(τ) is the share of tasks whose target a row reaches within τ times the {profile.unit} of the fastest "
            "(Dolan and Moré, 2002); the score is its mean over τ from 1 to 4, AlgoPerf's integral: 1 is the fastest "
            "everywhere, 0 never within four times the fastest. Both depend on who takes part. Scores are not "
            f"AlgoPerf's: {NOT_ALGOPERF}.",
        ),
        table(caption, heads, rows),
        el("ul", *(el("li", text) for text in profile.left_out)) if profile.left_out else None,
        el("div", _figure(svg, "Higher and more to the left is better."), class_="figures"),
        id="profile",
    )


# ---- templates ---------------------------------------------------------------------------------------------------


@cache
def _templates() -> Environment:
    loader = PackageLoader("caspr_cli.report")
    made = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
        finalize=lambda value: UNWRITABLE.sub("\ufffd", value) if type(value) is str else value,
    )  # fmt: skip
    made.globals.update(palette=PALETTE, inline=_inline)
    return made


def _inline(svg: str) -> Markup:
    return Markup(tostring(inline(svg), encoding="unicode", method="html"))


def answers(made: Sequence[Answer], title: str) -> str:
    """Return answers of ``caspr-verify`` as one HTML page that needs no other file: the questions first."""
    template = _templates().get_template("answers.html.j2")
    return template.render(
        title=title, answers=made, summary=_all_claims(made), counted=_claims, marks=answer.MARKS,
        **{use.__name__: use for use in (answer.visible, answer.grid, answer.numeric, answer.rest, answer.origin)},
    )  # fmt: skip


def _claims(one: Answer) -> str:
    held = sum(held for _, held in one.claims)
    said = [f"{held} of {words.count(len(one.claims), 'statement')} held"] if one.claims else []
    if n := len(one.counterexamples):
        said.append(f"{words.count(n, 'statement')} checked that {'are' if n > 1 else 'is'} not true in general")
    return "; ".join(said)


def _all_claims(made: Sequence[Answer]) -> str:
    broken = [text for one in made for text, held in one.claims if not held]
    total = words.count(sum(len(one.claims) for one in made), "statement")
    if broken:
        return f"{len(broken)} of {total} that should hold did not: {'; '.join(broken)}."
    return f"{words.count(len(made), 'question')}; all {total} that should hold did."
