"""The shape of each part of a record, checked by ``caspr-train``, ``caspr-report`` and packs. No torch, no Hydra."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml

DONE, FAILED = "done", "failed"

NEEDED = ("task.name", "optim.name", "seed", "task.target.metric")
KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "integer": lambda value: type(value) is int and abs(value) < 2**63,
    "number": lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max,
    "truth value": lambda value: isinstance(value, bool),
    "list": lambda value: isinstance(value, list),
    "list of mappings": lambda value: isinstance(value, list) and all(isinstance(each, dict) for each in value),
    "mapping": lambda value: isinstance(value, dict),
    "mapping of numbers": lambda value: (
        isinstance(value, dict) and all(each is None or KINDS["number"](each) for each in value.values())
    ),
}
# What is read of a record, an owner before its own keys; each may be missing or null. Other keys may be anything.
SHAPE: dict[str, dict[str, str]] = {
    "config": {
        "task": "mapping", "task.name": "text", "task.data": "text", "task.target": "mapping",
        "task.target.metric": "text", "task.target.value": "number", "task.target.higher_is_better": "truth value",
        "optim": "mapping", "optim.name": "text", "scale": "text", "seed": "integer",
        "search": "mapping", "search.space": "mapping", "search.trials": "integer", "search.rerank": "integer",
        "trainer": "mapping", "trainer.max_steps": "integer", "horizon": "integer",
    },
    "status": {
        "state": "text", "error": "text", "user_error": "truth value", "step": "integer", "attempts": "integer",
        "host": "text", "pid": "integer", "born": "integer", "started": "text", "updated": "text",
    },
    "result": {
        "final": "mapping of numbers", "best": "mapping of numbers", "test": "mapping of numbers",
        "steps": "integer", "seconds": "number", "optimizer_seconds": "mapping of numbers",
        "optimizer_state_bytes": "number", "target": "mapping", "target.metric": "text", "target.value": "number",
        "target.step": "integer", "target.seconds": "number",
    },
    "provenance": {
        "command": "list", "code": "mapping", "data": "mapping", "data.hash": "text", "attempts": "list of mappings",
        "packages": "mapping", "packages.torch": "text",
        "machine": "mapping", "machine.host": "text", "machine.system": "text",
        "device": "mapping", "device.processes": "integer", "device.threads": "integer",
    },
    "trackers": {"wandb": "text", "mlflow": "text"},
}  # fmt: skip
SEVERAL_LINES = ("error", "diff")  # all other texts are words in tables
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where libyaml is installed
FAST = 16_000  # bytes; in longer ones libyaml's recursion, a level a byte at most, could end the process
# PyYAML raises these, too.
NO_YAML = (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
DEEPEST = 32  # more levels than any record has, fewer than Python's recursion


class DamagedError(ValueError):
    """A part of a record cannot be used; the message says why."""


def parsed(content: bytes, *, finite: bool = True) -> Any:
    """Return the value of a JSON text; with ``finite`` NaN and Infinity become None. Raises DamagedError."""
    try:
        return json.loads(content, parse_constant=(lambda _: None) if finite else None)
    except (ValueError, RecursionError) as error:
        raise DamagedError("is not valid JSON") from error


def config(content: bytes) -> dict[str, Any]:
    """Return the dotted keys of a ``config.yaml``, as :func:`part` does. Raises DamagedError."""
    try:
        plain = yaml.load(content, Loader=LOADER if len(content) <= FAST else yaml.SafeLoader)
        found = flat(plain) if isinstance(plain, dict) else {}
    except NO_YAML as error:
        where = getattr(error, "problem_mark", None)
        raise DamagedError(f"{f'line {where.line + 1}: ' if where else ''}is not valid YAML") from error
    return part("config", found)


def part(name: str, content: Any) -> dict[str, Any]:
    """Return a part of a record with the types that its readers need; its texts can be printed.

    Raises DamagedError if it has another shape. ``name``: ``config`` (dotted keys), ``status``, ``result`` or
    ``provenance``.
    """
    if not isinstance(content, dict):
        raise DamagedError(f"{name} is not a mapping")
    found: dict[str, Any] = tidy(content, name)
    for key, kind in SHAPE[name].items():
        value = found.get(key) if name == "config" else inner(found, *key.split("."))
        if value is not None and not KINDS[kind](value):
            kind = {"text": kind, "integer": f"an {kind}"}.get(kind, f"a {kind}")
            raise DamagedError(f"{key} is not {kind}")
    if name == "config":
        if missing := [key for key in NEEDED if found.get(key) in (None, "")]:
            raise DamagedError(f"has no {missing[0]}")
        groups = {key[: dot.start()] for key in found for dot in re.finditer(r"\.", key)}
        if both := groups.intersection(found):
            raise DamagedError(f"{min(both)} is a value and a group")
    return found


def leaves(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and their values; an empty mapping is a value."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flat(node: Mapping[Any, Any]) -> dict[str, Any]:
    """Return nested keys as dotted ones; a list is one value, an empty group none."""
    return {key: value for key, value in leaves(node) if value != {}}


def inner(node: Any, *keys: str) -> Any:
    """Return the value at a path of keys of nested mappings; None where it is not there."""
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def tidy(node: Any, key: str = "", depth: int = 0) -> Any:
    """Return a value with all texts made printable and encodable. Raises DamagedError for what records do not have."""
    if depth > DEEPEST:
        raise DamagedError(f"{key} is nested too deeply")
    if isinstance(node, dict):
        return {printable(str(name)): tidy(value, str(name), depth + 1) for name, value in node.items()}
    if isinstance(node, list):
        return [tidy(value, key, depth + 1) for value in node]
    if isinstance(node, str):
        return "\n".join(map(printable, node.split("\n"))) if key in SEVERAL_LINES else printable(node)
    if node is None or isinstance(node, (bool, float)) or (isinstance(node, int) and abs(node) < sys.float_info.max):
        return node
    raise DamagedError(f"{printable(key)} is neither text, list nor a number in range")


def printable(text: str) -> str:
    """Return the text on one line, without characters that a terminal, LaTeX or UTF-8 cannot show."""
    if text.isprintable():
        return text
    return " ".join("".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text).split())


def encodable(path: str) -> str:
    """Return a path in UTF-8, which names of files need not be."""
    return path.encode(errors="replace").decode()


def lost(status: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Return whether a run is done but its result is missing."""
    return status.get("state") == DONE and result.get("final") is None
