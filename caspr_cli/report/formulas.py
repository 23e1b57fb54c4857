"""Formulas of plain text, as people type them, set for a page."""

import re

from markupsafe import Markup, escape

TILDE = "\u0303"  # above the letter before it
LETTER = re.compile(r"(?<![\w&;])([DEFGLRSUWX])(?![A-Za-z\u2019'])")  # of the matrices of caspr_cli.theory
RAISED = re.compile(r"\^(?:\(([^()]*)\)|([−+-]?[\w½¼⅓/]+))")
OF_FIGURE = re.compile(r"(?<=>)[^<>]*(?:\^|~|X_)[^<>]*(?=</text>)")
LOWERED = re.compile(r"(</i>|\bt|λ)_(\w+)")


def typeset(text: str) -> Markup:
    """Return the text with ``F~`` under its tilde, ``^½`` raised, ``_Shampoo`` lowered, and matrices in italics."""
    html = RAISED.sub(lambda found: f"<sup>{found[1] or found[2]}</sup>", str(escape(text)))
    html = LETTER.sub(r"<i>\1</i>", html)
    html = re.sub(r"(?<=[A-Z])(</i>)?~", rf"{TILDE}\1", html)
    return Markup(LOWERED.sub(r"\1<sub>\2</sub>", html))


def typeset_figure(svg: str) -> str:
    """Return an SVG whose texts have their formulas set in the same way, without italics."""

    def shifted(text: str, by: float) -> str:
        back = f'<tspan dy="{-0.75 * by:g}em">\u200b</tspan>'  # SVG has no end of a shift
        return f'<tspan dy="{by:g}em" font-size="75%">{text}</tspan>{back}'

    def of(text: str) -> str:
        text = re.sub(r"(?<=[A-Z])~", TILDE, text)
        text = re.sub(r"\^([−-]?[½¼])", lambda found: shifted(found[1], -0.4), text)
        return re.sub(r"(?<=X)_([A-Za-z]+)", lambda found: shifted(found[1], 0.3), text)

    return OF_FIGURE.sub(lambda found: of(found[0]), svg)
