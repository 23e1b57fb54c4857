"""Where a result came from: the command, code, versions, machine and data of each attempt.

The record's own entries are those of the first attempt; ``attempts`` has what differed in each later one.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caspr_cli import __version__
from caspr_cli.common.packages import installed
from caspr_cli.recipe.configs import PACKAGE
from caspr_cli.runs.processes import cores

PACKAGES = (
    "torch", "torchvision", "lightning", "hydra-core", "omegaconf", "datasets", "tokenizers", "torchmetrics",
    "tensorboard", "pytorch-optimizer", "numpy",
)  # fmt: skip
# Those that may change the numbers of a run.
ABOUT_NUMBERS = [name for name in PACKAGES if name not in ("hydra-core", "omegaconf", "tensorboard")]


def collect(command: list[str]) -> dict[str, Any]:
    """Return what is known before the run starts; the worker adds device and data."""
    return {
        "command": command,
        "caspr_cli": __version__,
        "code": _git(PACKAGE.parent),
        "python": sys.version.split()[0],
        "packages": {name: installed(name) for name in PACKAGES},
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "processor": _processor(),
            "cores": cores(),
        },
    }


def begun(found: Mapping[str, Any], collected: dict[str, Any], attempt: int, time: str) -> dict[str, Any]:
    """Return the content of ``provenance.json`` when another attempt starts.

    Args:
        found: the content before.
        attempt: its number, from 1.
    """
    if not found:
        return collected
    entry = {"attempt": attempt, "started": time} | _differing(found, collected)
    return {**found, "attempts": [*(found.get("attempts") or []), entry]}


def completed(found: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content with data and device, which the worker adds; the record's own are the first attempt's."""
    added = {key: value for key, value in where.items() if key not in found}
    whole = {**found, **added}
    if later := whole.get("attempts"):
        whole["attempts"] = [*later[:-1], later[-1] | _differing(whole, where)]
    return whole


def _differing(first: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in now.items() if key not in first or first[key] != value}


def changes(found: Mapping[str, Any]) -> list[str]:
    """Return what differs between the latest attempt and the first, of all that may change numbers."""
    entry = (found.get("attempts") or [{}])[-1]
    return [
        f"{name} {before or 'unknown'}, now {now or 'unknown'}"
        for name, before, now in zip(_NAMES, _versions(found), _versions({**found, **entry}), strict=True)
        if before != now
    ]


_NAMES = ["caspr-cli", "commit", "uncommitted changes", "python", "device", "processor", *ABOUT_NUMBERS]


def _versions(found: Mapping[str, Any]) -> list[Any]:
    """Return the values of ``_NAMES``."""
    parts = (found.get(key) for key in ("code", "device", "machine", "packages"))
    code, device, machine, packages = (part if isinstance(part, dict) else {} for part in parts)
    own = [found.get("caspr_cli"), str(code.get("commit") or "")[:10], code.get("diff_sha256"), found.get("python")]
    return [*own, device.get("name"), machine.get("processor"), *(packages.get(name) for name in ABOUT_NUMBERS)]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _git(directory: Path) -> dict[str, Any] | None:
    """Return the commit and the uncommitted changes of the checkout that runs; None for an installed wheel."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(directory), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != directory:
            return None
        diff = git("diff", "HEAD")
        commit = git("rev-parse", "HEAD").strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "diff": diff or None, "diff_sha256": hashlib.sha256(diff.encode()).hexdigest()[:16]}
