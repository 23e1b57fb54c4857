"""The console scripts. Without the packages that a command needs, each says in one line what to install."""

from __future__ import annotations

from importlib import import_module

from caspr_cli.common.streams import console_script


def _start(command: str) -> int:
    code: int = import_module(f"caspr_cli.commands.{command}").main()
    return code


@console_script
def train() -> int:
    """Run ``caspr-train``."""
    return _start("train")


@console_script
def report() -> int:
    """Run ``caspr-report``."""
    return _start("report")


@console_script
def bench() -> int:
    """Run ``caspr-bench``."""
    return _start("bench")


@console_script
def verify() -> int:
    """Run ``caspr-verify``."""
    return _start("verify")
