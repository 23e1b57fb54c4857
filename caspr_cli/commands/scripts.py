"""The console scripts. Without the packages that a command needs, each says in one line what to install."""

from collections.abc import Callable
from importlib import import_module

from caspr_cli.common.streams import console_script


def _script(command: str) -> Callable[[], int]:
    def start() -> int:
        code: int = import_module(f"caspr_cli.commands.{command}").main()
        return code

    return console_script(start)


train, report, bench, verify = map(_script, ("train", "report", "bench", "verify"))
