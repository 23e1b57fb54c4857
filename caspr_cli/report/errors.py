"""What a user got wrong, in a line that offers the nearest valid choice; without Hydra, which recipe.errors needs."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ReportError(Exception):
    """A report that cannot be made; the message is for the user."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`` Did you mean X?``, or nothing."""
    match = get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {match[0]}?" if match else ""
