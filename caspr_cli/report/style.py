"""The style of figures: a colour for each label, and SVG that stands alone or in a page, with the same bytes each time.

Figures are drawn with matplotlib's objects, without pyplot's state. Text stays text. Colours are those of ``PALETTE``
on a light ground; a page replaces each by its counterpart on a dark one.
"""

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# On a light and on a dark ground, with a contrast of at least 4.5 to 1, as text needs (but for rules). The hues are
# near those of Okabe and Ito, which every kind of colour vision distinguishes.
PALETTE = {
    "ink": ("#1b1f24", "#e6e9ee"),
    "muted": ("#59626d", "#a3acb8"),
    "rule": ("#d3d8de", "#3b434d"),
    "blue": ("#0072b2", "#56b0ec"),
    "vermilion": ("#c24e00", "#ff8f4a"),
    "green": ("#00805c", "#2fc597"),
    "purple": ("#ad4a89", "#e596c6"),
    "amber": ("#946500", "#e8b64a"),
    "grey": ("#5b6673", "#b9c2cd"),
}
INK, MUTED, RULE = (PALETTE[name][0] for name in ("ink", "muted", "rule"))
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"
NAMESPACE = "http://www.w3.org/2000/svg"
UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # neither in XML nor in a file

# Dashes as matplotlib takes them; they distinguish lines of one hue.
Dash = str | tuple[float, tuple[float, ...]]
SOLID: Dash = "-"
DASHED: Dash = (0, (5, 1.6))
DASHDOT: Dash = (0, (6, 1.5, 1.2, 1.5))
DOTTED: Dash = (0, (1.3, 1.3))
HUES = ("vermilion", "green", "purple", "amber", "blue", "grey", "ink")


@dataclass(frozen=True)
class Style:
    hue: str
    dash: Dash

    @property
    def colour(self) -> str:
        return PALETTE[self.hue][0]


SOLIDS = {"caspr": "blue", "shampoo": "vermilion", "soap": "green", "muon": "purple", "adamw": "grey", "sgd": "ink",
          "full_adagrad": "amber"}  # fmt: skip
KNOWN = {name: Style(hue, SOLID) for name, hue in SOLIDS.items()}
KNOWN |= {"caspr_paper": Style("blue", DASHED), "caspr_sum": Style("blue", DOTTED), "nadamw": Style("grey", DASHED)}
OTHERS = [Style(hue, dash) for dash, hue in product((DASHED, DASHDOT, DOTTED), HUES)]
OTHERS = [style for style in OTHERS if style not in KNOWN.values()]


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """Return a style for each label: fixed for the optimizers of this package, the next free one for others.

    The first variant of an optimizer, as ``caspr order=1``, has that of the optimizer, if no label is its name; an
    untuned row only where no other has it.
    """
    labels = list(dict.fromkeys(labels))
    found = {label: KNOWN[label] for label in labels if label in KNOWN}
    for label in sorted(labels, key=lambda label: "untuned" in label.split()):
        own = [KNOWN[name] for name in label.split()[:1] if name in KNOWN]
        hues = {style.hue for style in found.values()}
        others = sorted(OTHERS, key=lambda style: style.hue in hues)
        free = [style for style in (*own, *others) if style not in found.values()]
        found.setdefault(label, free[0] if free else OTHERS[len(found) % len(OTHERS)])
    return {label: found[label] for label in labels}


@contextmanager
def drawing() -> Iterator[None]:
    """Set the sizes and colours with which figures are made and written; text between dollar signs stays text."""
    settings: Any = {
        # The font comes with matplotlib. It is wide, so a text that fits in it also fits in the reader's font.
        "svg.fonttype": "none", "text.parse_math": False, "font.family": ["DejaVu Sans"], "font.size": 9,
        "axes.linewidth": 0.8, "axes.unicode_minus": True, "grid.color": RULE, "grid.linewidth": 0.6,
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
        **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"), INK),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield


def to_svg(figure: Figure, name: str, alt: str) -> str:
    """Return the figure as SVG on no ground; ``alt`` says what it shows, for readers who do not see it.

    Identifiers that something refers to begin with ``name``, so that several figures can stand in one page.
    """
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # its width is a little wrong; the reader's font has it
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(UNWRITABLE.sub("\ufffd", buffer.getvalue()))
    _bare(root)
    _renamed(root, re.sub(r"\W+", "-", name))
    root.attrib = {
        "xmlns": NAMESPACE,
        **{key: root.attrib[key] for key in ("width", "height", "viewBox")},
        "role": "img",
        "aria-label": UNWRITABLE.sub("\ufffd", alt),
        "style": f"font-family: {FONTS}; stroke-linejoin: round; stroke-linecap: butt",
    }
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def recoloured(svg: str, colours: Mapping[str, str]) -> str:
    """Return a figure with other colours in place of those of the light palette."""

    def swapped(attribute: re.Match[str]) -> str:
        return re.sub(r"#[0-9a-f]{6}", lambda found: colours.get(found[0], found[0]), attribute[0])

    return re.sub(r'style="[^"]*"', swapped, svg)


def dark(svg: str) -> str:
    return recoloured(svg, dict(PALETTE.values()))


def _bare(root: ElementTree.Element) -> None:
    """Remove namespaces, metadata, rules for the whole page, and font families."""
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if "style" in element.attrib:
            style = re.sub(r"font: (?:normal )*([\d.]+px) [^;]*", r"font-size: \1", element.attrib["style"])
            element.attrib["style"] = re.sub(r"font-family: [^;]*;? ?", "", style)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == "metadata" or (child.tag == "defs" and child.find("style") is not None):
                parent.remove(child)


def _renamed(root: ElementTree.Element, prefix: str) -> None:
    """Give identifiers that something refers to a prefix, and remove all others."""
    used = set()
    for element in root.iter():
        for key in ("href", "clip-path"):
            if key in element.attrib:
                used.add(element.attrib[key].partition("#")[2].rstrip(")"))
                element.attrib[key] = element.attrib[key].replace("#", f"#{prefix}-", 1)
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            element.attrib["id"] = f"{prefix}-{name}"
