"""Where the YAML files are, and what can be chosen from them."""

from __future__ import annotations

from pathlib import Path

# Beside the package in a checkout, inside it in a wheel.
PACKAGE = Path(__file__).resolve().parent.parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"


def choices(group: str) -> dict[str, str]:
    """The files of a config group and the first comment in each, for ``--help``."""
    found = {}
    for file in sorted((CONF / group).glob("*.yaml")):
        lines = file.read_text(encoding="utf8").splitlines()
        comments = (line[1:].strip() for line in lines if line.startswith("#") and "@package" not in line)
        found[file.stem] = next(comments, "")
    return found
