"""HTML as a tree of elements: what is text stays text, and every element is closed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import resources
from xml.etree.ElementTree import Element, fromstring, tostring

from caspr_cli.report.style import PALETTE, UNWRITABLE, Style

Child = Element | str | None
Cells = Sequence[Child]


def el(tag: str, *children: Child, **attributes: str) -> Element:
    """An element; None among its children is nothing. ``class_`` and ``aria_label`` are spelt as HTML has them."""
    made = Element(tag, {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif child and len(made):
            made[-1].tail = (made[-1].tail or "") + child
        elif child:
            made.text = (made.text or "") + child
    return made


def table(caption: str, heads: Cells, rows: Iterable[Cells], *, numbers: bool = True) -> Element:
    """A table that scrolls in its own box; the first cell of a row is its head.

    Args:
        numbers: whether cells but the first of a row are set to the right.
    """
    body = [
        el("tr", el("th", row[0], scope="row"), *(cell if _is("td", cell) else el("td", cell) for cell in row[1:]))
        for row in rows
    ]
    made = el(
        "table",
        el("caption", el("span", caption)),
        el("thead", el("tr", *(head if _is("th", head) else el("th", head, scope="col") for head in heads))),
        el("tbody", *body),
        class_="numbers" if numbers else "words",
    )
    return el("div", made, class_="box", role="region", tabindex="0", aria_label=caption)


def _is(tag: str, child: Child) -> bool:
    return isinstance(child, Element) and child.tag == tag


def swatch(style: Style) -> Element:
    """A piece of a label's line, as figures have it."""
    width = 2.5
    line = {"x1": "0", "x2": "22", "y1": "3", "y2": "3", "stroke": f"var(--{style.hue})", "stroke-width": f"{width}"}
    if not isinstance(style.dash, str):
        line["stroke-dasharray"] = " ".join(f"{part * width * 0.7:.1f}" for part in style.dash[1])
    drawn = Element("svg", {"class": "swatch", "viewBox": "0 0 22 6", "aria-hidden": "true"})
    drawn.append(Element("line", line))
    return drawn


def inline(svg: str) -> Element:
    """A figure in the colours of the page: those of the palette become its variables."""
    root = fromstring(svg)
    variables = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        if "style" in element.attrib:
            element.attrib["style"] = re.sub(
                r"#[0-9a-f]{6}", lambda m: variables.get(m.group(), m.group()), element.attrib["style"]
            )
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    return root


def document(title: str, *body: Child) -> str:
    """The whole file, which needs no other."""
    light, dark = (" ".join(f"--{name}: {colours[k]};" for name, colours in PALETTE.items()) for k in range(2))
    css = (resources.files("caspr_cli.report") / "templates" / "page.css").read_text(encoding="utf8")
    css += f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", css),
    )
    root = el("html", head, el("body", *body), lang="en")
    text = tostring(root, encoding="unicode", method="html")
    return "<!doctype html>\n" + UNWRITABLE.sub("\ufffd", text) + "\n"
