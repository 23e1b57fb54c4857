"""Where a result came from: the command, code, versions, machine and data of each attempt.

The record's own entries are those of the first attempt; ``attempts`` has what differed in each later one.
"""

import hashlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from caspr_cli import __version__
from caspr_cli.common import plugins
from caspr_cli.common.plugins import installed
from caspr_cli.recipe.configs import PACKAGE
from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs.processes import cores
from caspr_cli.runs.record import PROVENANCE, Record, RecordDamagedError

PACKAGES = (
    "torch", "torchvision", "lightning", "hydra-core", "omegaconf", "datasets", "tokenizers", "torchmetrics",
    "tensorboard", "pytorch-optimizer", "numpy",
)  # fmt: skip
NOT_ABOUT_NUMBERS = ("hydra-core", "omegaconf", "tensorboard")


def collect(command: list[str], recipe: Recipe | None = None) -> dict[str, Any]:
    """Return what is known before the run starts; the worker adds device and data.

    The task or optimizer of ``recipe`` may be of another package, whose version is noted, too.
    """
    machine = {"host": platform.node(), "system": platform.platform()}
    return {
        "command": command,
        "caspr_cli": __version__,
        "code": _git(PACKAGE.parent),
        "python": sys.version.split()[0],
        "packages": {name: installed(name) for name in PACKAGES} | brought(recipe),
        "machine": machine | {"processor": _processor(), "cores": cores()},
    }


def brought(recipe: Recipe | None) -> dict[str, str]:
    """Return the other packages that bring a recipe's task or optimizer, with their versions."""
    if recipe is None:
        return {}
    found = (plugins.package(plugins.TASKS, recipe.task.name), plugins.package(plugins.OPTIMIZERS, recipe.optim.name))
    return dict(package.rsplit(" ", 1) for package in found if package)


def missing(output_dir: Path, group: str, name: str) -> str | None:
    """Return which package brought a choice (``group``: task or optim) to a record, if it is not installed any more."""
    records = f"{name}/*/*/seed*" if group == "task" else f"*/{name}/*/seed*"
    for file in sorted(output_dir.glob(f"{records}/{PROVENANCE}")):
        with suppress(RecordDamagedError, OSError):
            packages = Record(file.parent).read(PROVENANCE).get("packages") or {}
            gone = [each for each in packages if each not in PACKAGES and not installed(each)]
            if brought := " and ".join(f"{each} {packages[each]}" for each in gone):
                return f"{group}={name}: {file.parent} ran it from the package {brought}, not installed now"
    return None


def begun(found: Mapping[str, Any], collected: dict[str, Any], attempt: int, time: str) -> dict[str, Any]:
    """Return the content of ``provenance.json``, ``found`` before, when an attempt of this number starts."""
    if not found:
        return collected
    entry = {"attempt": attempt, "started": time} | _differing(found, collected)
    return {**found, "attempts": [*(found.get("attempts") or []), entry]}


def completed(found: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content with data and device, which the worker adds; the record's own are the first attempt's."""
    whole = {**found, **{key: value for key, value in where.items() if key not in found}}
    if later := whole.get("attempts"):
        whole["attempts"] = [*later[:-1], later[-1] | _differing(whole, where)]
    return whole


def _differing(first: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in now.items() if key not in first or first[key] != value}


def changes(found: Mapping[str, Any]) -> list[str]:
    """Return what differs between the latest attempt and the first, of all that may change numbers."""
    entry = (found.get("attempts") or [{}])[-1]
    before, now = _versions(found), _versions({**found, **entry})
    return [
        f"{name} {before.get(name) or 'unknown'}, now {now.get(name) or 'unknown'}"
        for name in before | now
        if before.get(name) != now.get(name)
    ]


def _versions(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the versions of all that may change numbers, packages with a task among them."""
    parts = (found.get(key) for key in ("code", "device", "machine", "packages"))
    code, device, machine, packages = (part if isinstance(part, dict) else {} for part in parts)
    return {
        "caspr-cli": found.get("caspr_cli"),
        "commit": str(code.get("commit") or "")[:10],
        "uncommitted changes": code.get("diff_sha256"),
        "python": found.get("python"),
        "device": device.get("name"),
        "processor": machine.get("processor"),
        "products": device.get("products"),
    } | {name: packages.get(name) for name in [*PACKAGES, *packages] if name not in NOT_ABOUT_NUMBERS}


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
