"""Where a result came from: command, code, versions, machine."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from caspr_cli import __version__
from caspr_cli.recipe.compose import PACKAGE

PACKAGES = (
    "torch", "torchvision", "lightning", "hydra-core", "omegaconf", "datasets", "tokenizers", "torchmetrics",
    "tensorboard", "pytorch-optimizer", "numpy",
)  # fmt: skip


def collect(command: list[str]) -> dict[str, Any]:
    """What can be known without starting the run; the worker adds device and data."""
    return {
        "command": command,
        "caspr_cli": __version__,
        "code": _git(PACKAGE.parent),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _git(directory: Path) -> dict[str, Any] | None:
    """Commit of the checkout that the code runs from, and its uncommitted changes; None for an installed wheel."""

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
