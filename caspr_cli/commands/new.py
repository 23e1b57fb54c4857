"""``caspr-train new task NAME`` and ``new optimizer NAME``: write a package that adds one, to begin from."""

import sys
import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from caspr_cli.common.errors import UserError, one_of
from caspr_cli.common.streams import say
from caspr_cli.optim.registry import OPTIMIZERS
from caspr_cli.tasks.registry import TASKS

TEMPLATES = Path(__file__).with_name("templates")
TRY = {  # after it is installed
    "task": """\
python -m pytest {name}
caspr-train task={name}
caspr-train -m task={name} optim=caspr,adamw seed=0,1,2""",
    "optimizer": """\
python -m pytest {name}
caspr-train task=ud_pos optim={name}
caspr-train -m task=ud_pos optim={name},adamw seed=0,1,2
caspr-train experiment=ud_pos optim={name},adamw plan=true""",
}


def main(words: Sequence[str]) -> None:
    """Write the package into a folder of its name in the working directory, and print what to do next.

    Raises UserError if the name cannot be one, or the folder is there.
    """
    if len(words) != 2:
        raise UserError("write caspr-train new task NAME, or caspr-train new optimizer NAME")
    kind, name = one_of("new", words[0], TRY), words[1]
    _check(name)
    written = []
    for source in sorted((TEMPLATES / kind).rglob("*.*")):
        place = Path(str(source.relative_to(TEMPLATES / kind)).removesuffix(".txt").replace("NAME", name))
        # The project is a folder with the package in it.
        file = name / (place if place.parts[0] in ("pyproject.toml", f"test_{name}.py") else name / place)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source.read_text(encoding="utf8").replace("NAME", name), encoding="utf8")
        written.append(str(file.relative_to(name)))
    say(f"wrote    {name}/: {', '.join(written)}")
    say(f"next     pip install -e ./{name} pytest")
    say(textwrap.indent(TRY[kind].format(name=name), " " * 9))


def _check(name: str) -> None:
    if not (name.isidentifier() and name.isascii() and name.islower()):
        raise UserError(f"{name}: a name has lower-case letters, digits and _, and no digit first, as my_task")
    if Path(name).exists():
        raise UserError(f"{name}: is there already")
    if name in TASKS or name in OPTIMIZERS:
        raise UserError(f"{name}: there is a task or an optimizer of this name")
    if name in sys.stdlib_module_names or find_spec(name) is not None:
        raise UserError(f"{name}: there is a Python module of this name; choose another, as in my_{name}")
