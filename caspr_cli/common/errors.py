"""Mistakes of the user, said in one line that offers the nearest valid choice. No Hydra, no torch."""

import argparse
import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from shutil import get_terminal_size
from typing import Any, NoReturn

# The modules that an extra of this package installs, beside those of the extras that it builds on.
EXTRAS = {
    "graphs": ("chemicals", "rdkit", "torch_geometric"),
    "run": ("PIL", "datasets", "google", "hydra", "jinja2", "lightning", "matplotlib", "numpy", "omegaconf", "pandas",
            "psutil", "pyarrow", "pytorch_optimizer", "rich", "scipy", "tensorboard", "tokenizers", "torchmetrics",
            "torchvision", "turkish_treebanks", "yaml"),
    "wandb": ("wandb",), "mlflow": ("mlflow",),
}  # fmt: skip


def not_installed(error: ImportError) -> str | None:
    """Return how to install the module that an import did not find; None if it is not one of :data:`EXTRAS`."""
    return _install((error.name or "").partition(".")[0])


def uninstalled(module: str) -> str | None:
    """Return how to install a module that is not installed; None if it is. It is not imported."""
    spec = find_spec(module)
    return _install(module) if spec is None or spec.origin is None else None  # a folder of that name is no package


def _install(module: str) -> str | None:
    extra = next((name for name, modules in EXTRAS.items() if module in modules), None)
    return extra and f"this needs {module}, which is not installed: pip install 'caspr-cli[{extra}]'"


WIDEST = 110  # columns of a help text
CLOSE = 0.65  # least similarity of a suggestion: above that of muon to lion and of resnet to imagenet


class UserError(Exception):
    """The command cannot do what was asked; the message is for the user."""


def nearest(word: str, choices: Iterable[str], prefix: str = "") -> str:
    """Return `` Did you mean X?``, or nothing if no choice is close: a wrong guess misleads more than none helps.

    Close is also the one choice that begins with the word, as ``c4_lm`` with ``c4``.
    """
    known = {choice.lower(): choice for choice in choices}
    match = get_close_matches(word.lower(), known, n=1, cutoff=CLOSE)
    if not match and len(word) > 1:
        longer = [choice for choice in known if choice.startswith(word.lower())]
        match = longer if len(longer) == 1 else []
    return f" Did you mean {prefix}{known[match[0]]}?" if match else ""


def one_of(flag: str, value: str, choices: Iterable[str]) -> str:
    """Return the value, if it is one of the choices. Raises UserError if it is not."""
    known = list(choices)
    if value not in known:
        raise UserError(f"{flag} {value}: no such choice.{nearest(value, known)} (choices: {', '.join(known)})")
    return value


def positive(text: str) -> int:
    """Return the positive integer that a flag is given."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be a positive integer but is {text}")
    return value


class Help(argparse.RawDescriptionHelpFormatter):
    """Help in two columns, as wide as the terminal, where that is not too wide to read."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=24, width=min(get_terminal_size().columns, WIDEST) - 2)

    def _format_action(self, action: argparse.Action) -> str:
        """Return a flag's lines; of commands only theirs, as their title says what they are."""
        if isinstance(action, argparse._SubParsersAction):
            return self._join_parts([self._format_action(each) for each in self._iter_indented_subactions(action)])
        return super()._format_action(action)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        for each in self._iter_indented_subactions(action):  # argparse forgets that commands are indented
            length = len(self._format_action_invocation(each)) + self._current_indent
            self._action_max_length = max(self._action_max_length, length)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises :class:`UserError` with one line instead of printing its usage."""

    def __init__(self, *args: Any, **options: Any) -> None:
        ours: dict[str, Any] = {"allow_abbrev": False, "formatter_class": Help}
        super().__init__(*args, **ours | options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # subparsers are called by this name
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = re.findall(r"--[\w-]+", self.format_help())
            what = self.prog.rpartition(" ")[2]
            raise UserError(f"{unknown[0]} is no flag of {what}.{nearest(unknown[0].split('=')[0], flags)}")
        return found, []

    def print_help(self, file: Any = None) -> None:
        """Print the help. (argparse passes over an output that is full.)"""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        argument, _, text = message.replace("'", "").removeprefix("argument ").partition(": ")
        if text.startswith("ignored explicit argument"):
            raise UserError(f"{argument} takes no value")
        if match := re.fullmatch(r"invalid choice: (.*) \(choose from (.*)\)", text):
            what, noun = (f"{argument} {match[1]}", "choice") if argument[0] == "-" else (match[1], argument)
            raise UserError(f"{what}: no such {noun}.{nearest(match[1], match[2].split(', '))} (choices: {match[2]})")
        raise UserError(f"{argument}: {text}" if text else argument)
