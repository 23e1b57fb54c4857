"""Formulas of plain text, as people type them, set for a page."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

TILDE = "\u0303"  # above the letter before it
LETTER = re.compile(r"(?<![\w&;])([DFGLRSUWX])(?![a-z\u2019'])")  # of the matrices of caspr_cli.theory
RAISED = re.compile(r"\^(?:\(([^()]*)\)|([−+-]?[\w½¼⅓/]+))")
LOWERED = re.compile(r"(</i>|\bt|λ)_(\w+)")


def typeset(text: str) -> Markup:
    """Return the text with ``F~`` under its tilde, ``^½`` raised, ``_Shampoo`` lowered, and matrices in italics."""
    html = RAISED.sub(lambda found: f"<sup>{found[1] or found[2]}</sup>", str(escape(text)))
    html = LETTER.sub(r"<i>\1</i>", html)
    html = re.sub(r"(?<=[A-Z])(</i>)?~", rf"{TILDE}\1", html)
    return Markup(LOWERED.sub(r"\1<sub>\2</sub>", html))
