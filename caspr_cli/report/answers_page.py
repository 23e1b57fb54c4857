"""Several answers as one HTML page: the questions first, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from caspr_cli.report.answer import Answer, Figure, Sheet
from caspr_cli.report.answers import MARKS, rest, rows_of, said, shown, textual
from caspr_cli.report.html import Child, document, el, inline, table
from caspr_cli.report.words import count


def page(answers: Sequence[Answer], title: str) -> str:
    """All answers in one HTML file that needs no other: the questions first."""
    return document(
        title,
        el("header", el("h1", title), *_summary(answers)),
        el("main", *(_section(answer) for answer in answers), _made(answers)),
    )


def _summary(answers: Sequence[Answer]) -> list[Element]:
    """Every question, the beginning of its answer, and whether its statements held."""
    found = []
    for answer in answers:
        first = answer.words[0] if answer.words else ""
        found.append(el("dt", el("a", answer.question, href=f"#{answer.name}")))
        found.append(el("dd", first, el("span", _count(answer), class_="small")))
    return [
        el("p", _count_all(answers)),
        el("nav", el("dl", *found), aria_label="Questions"),
    ]


def _count(answer: Answer) -> str:
    held = sum(held for _, held in answer.holds)
    told = [f"{held} of {count(len(answer.holds), 'statement')} held"] if answer.holds else []
    if answer.fails:
        told.append(
            f"{count(len(answer.fails), 'statement')} looked at that {'are' if len(answer.fails) > 1 else 'is'} no law"
        )
    return "; ".join(told)


def _count_all(answers: Sequence[Answer]) -> str:
    broken = [text for answer in answers for text, held in answer.holds if not held]
    total = sum(len(answer.holds) for answer in answers)
    if broken:
        return f"Of {count(total, 'statement')} that should hold, {len(broken)} did not: {'; '.join(broken)}."
    return f"{count(len(answers), 'question')}; all {count(total, 'statement')} that should hold did."


def _section(answer: Answer) -> Element:
    marked = [
        el("li", el("span", MARKS[held][0], class_="better" if held else "worse"), f" {text}: {MARKS[held][1]}")
        for text, held in answer.holds
    ]
    marked += [el("li", el("span", "no law", class_="other"), f" {text}") for text in answer.fails]
    return el(
        "section",
        el("h2", answer.question),
        *(el("p", text) for text in answer.words),
        el("div", *(_figure(figure) for figure in answer.figures), class_="figures"),
        *(part for sheet in shown(answer) for part in _table(sheet)),
        el("details", el("summary", "Statements, one by one"), el("ul", *marked)) if marked else None,
        el("pre", el("code", answer.command)) if answer.command else None,
        id=answer.name,
    )


def _figure(figure: Figure) -> Element:
    return el("figure", inline(figure.svg), el("figcaption", figure.title))


def _table(sheet: Sheet) -> list[Element]:
    texts = [textual(sheet, column) for column in sheet.columns]

    def made(tag: str, text: str, k: int) -> Child:
        scope = {"scope": "col"} if tag == "th" else {}
        return el(tag, text, class_="text", **scope) if k and texts[k] else text

    heads = [made("th", column.head, k) for k, column in enumerate(sheet.columns)]
    rows = [[made("td", text, k) for k, text in enumerate(row)] for row in rows_of(sheet)]
    note = " ".join(filter(None, [sheet.note, f"({rest(sheet)}.)" if rest(sheet) else ""]))
    return [table(sheet.title, heads, rows), *([el("p", note, class_="muted")] if note else [])]


def _made(answers: Sequence[Answer]) -> Element:
    """Where the numbers come from."""
    parts = []
    for answer in answers:
        told = "; ".join(f"{key} {value}" for key, value in said(answer.provenance))
        parts += [el("dt", answer.name), el("dd", el("code", answer.command), el("span", told, class_="small"))]
    return el("section", el("h2", "Provenance"), el("dl", *parts), id="provenance")
