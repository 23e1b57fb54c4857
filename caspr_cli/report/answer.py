"""A question of theory, answered: what ``caspr-verify`` computes, as plain values. Tables and pages are made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Column:
    """One column of a sheet.

    Args:
        key: in the rows, in CSV and JSON.
        head: as people read it, with the unit.
        form: format specification of a number, as ``.3g``.
    """

    key: str
    head: str
    form: str = ""


@dataclass(frozen=True)
class Sheet:
    """One table.

    Args:
        name: of its CSV file, without suffix.
        shown: how many rows people are shown, from the first; None shows all. Files have all.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]
    note: str = ""
    shown: int | None = None


@dataclass(frozen=True)
class Figure:
    """One picture: SVG as ``report.look`` makes it, and what it shows in words."""

    name: str
    title: str
    svg: str
    alt: str


@dataclass(frozen=True)
class Answer:
    """What one command of ``caspr-verify`` has to say.

    Args:
        words: paragraphs, made from the numbers: the answer first.
        holds: each statement that should hold, with whether it did everywhere it was looked at; if one did not, the
            command fails.
        fails: statements that are known not to hold in general, each with what was seen of it here.
    """

    name: str
    question: str
    words: tuple[str, ...]
    sheets: tuple[Sheet, ...] = ()
    figures: tuple[Figure, ...] = ()
    holds: tuple[tuple[str, bool], ...] = ()
    fails: tuple[str, ...] = ()
    command: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
