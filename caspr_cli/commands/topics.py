"""``caspr-train help TOPIC``: what is too long for the README, from the files in ``help/``."""

from __future__ import annotations

import sys
from pathlib import Path

from caspr_cli.common.errors import one_of
from caspr_cli.common.streams import say

FOLDER = Path(__file__).with_name("help")


def titles() -> dict[str, str]:
    """Return the topics with the title of each."""
    files = sorted(FOLDER.glob("*.md"))
    return {file.stem: file.read_text(encoding="utf8").partition("\n")[0].removeprefix("# ") for file in files}


def show(words: list[str]) -> None:
    """Print the topic that is asked for, or the list of topics; on a terminal with bold heads and drawn tables.

    Raises:
        UserError: there is no such topic.
    """
    known = titles()
    if not words:
        lines = [f"  caspr-train help {name:<8} {title}" for name, title in known.items()]
        say("\n".join(["topics", *lines]))
        return
    text = (FOLDER / f"{one_of('help', words[0], known)}.md").read_text(encoding="utf8")
    if not sys.stdout.isatty():
        say(text.rstrip())
        return
    from rich.console import Console  # slow to import
    from rich.markdown import Markdown

    Console().print(Markdown(text))
