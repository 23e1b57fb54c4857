"""``caspr-train help TOPIC``: what is too long for the README, from the files in ``help/``."""

import sys
from pathlib import Path
from typing import Any

from caspr_cli.common.errors import one_of
from caspr_cli.common.streams import say
from caspr_cli.optim.family import options_of
from caspr_cli.optim.registry import OPTIMIZERS

DEFAULTS = "{defaults}"  # in a topic: the place of the table that defaults() makes
SHARED = ("lr", "betas", "momentum", "weight_decay", "interval")  # keys that several optimizers have

FOLDER = Path(__file__).with_name("help")


def titles() -> dict[str, str]:
    """Return the topics with the title of each."""
    files = sorted(FOLDER.glob("*.md"))
    return {file.stem: file.read_text(encoding="utf8").partition("\n")[0].removeprefix("# ") for file in files}


def defaults() -> str:
    """Return a table of the optimizers' own values of the keys that several have."""
    rows = [["optim", *SHARED]]
    for name, entry in OPTIMIZERS.items():
        own = {key: each.default for key, each in options_of(entry.keys).items()} | dict(entry.defaults)
        rows.append([f"`{name}`", *(_plain(own.get(key, "-")) for key in SHARED)])
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def _plain(value: Any) -> str:
    return ", ".join(map(_plain, value)) if isinstance(value, tuple) else f"{value:g}" if value != "-" else "-"


def show(words: list[str]) -> None:
    """Print the topic that is asked for, or the list; on a terminal with bold heads. Raises UserError if unknown."""
    known = titles()
    if not words:
        lines = [f"  caspr-train help {name:<8} {title}" for name, title in known.items()]
        say("\n".join(["topics", *lines]))
        return
    text = (FOLDER / f"{one_of('help', words[0], known)}.md").read_text(encoding="utf8")
    text = text.replace(DEFAULTS, defaults())
    if not sys.stdout.isatty():
        say(text.rstrip())
        return
    from rich.console import Console  # slow to import
    from rich.markdown import Markdown

    Console().print(Markdown(text))
