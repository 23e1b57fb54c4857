"""The YAML files and their choices, and the keys of a config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Beside the package in a checkout, inside it in a wheel.
PACKAGE = Path(__file__).resolve().parent.parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"


def choices(group: str) -> dict[str, str]:
    """Return the files of a config group with the first comment in each, for ``--help``."""
    found = {}
    for file in sorted((CONF / group).glob("*.yaml")):
        lines = file.read_text(encoding="utf8").splitlines()
        comments = (line[1:].strip() for line in lines if line.startswith("#") and "@package" not in line)
        found[file.stem] = next(comments, "")
    return found


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and their values; an empty mapping is a value."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
