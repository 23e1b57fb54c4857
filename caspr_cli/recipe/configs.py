"""The YAML files and their choices, and the keys of a config."""

from pathlib import Path

from caspr_cli.common import plugins
from caspr_cli.common.errors import UserError

PACKAGE = Path(__file__).resolve().parent.parent
CONF = PACKAGE / "conf"


def folders() -> dict[Path, str | None]:
    """Return the folders of YAML files: ours, then those of other packages, with the package."""
    return {CONF: None, **plugins.folders()}


def files(group: str) -> dict[str, Path]:
    """Return the files of a config group by name. Raises UserError if two packages have the same one."""
    found: dict[str, Path] = {}
    for folder, package in folders().items():
        for file in sorted((folder / group).glob("*.yaml")):
            if found.setdefault(file.stem, file) != file:
                raise UserError(f"package {package}: {group}/{file.name} of its config files is there already")
    return found


def described(group: str) -> dict[str, tuple[str, str | None]]:
    """Return the files of a config group: the first comment in each, and the package that brings it if it is not ours.

    ``--help`` shows them.
    """
    found, packages = {}, folders()
    for name, file in files(group).items():
        lines = file.read_text(encoding="utf8").splitlines()
        comments = (line[1:].strip() for line in lines if line.startswith("#") and "@package" not in line)
        found[name] = next(comments, ""), next(packages[folder] for folder in packages if folder in file.parents)
    return found


def choices(group: str) -> dict[str, str]:
    """Return the files of a config group with the first comment in each."""
    return {name: about for name, (about, _) in described(group).items()}


def scales(task: str) -> dict[str, str]:
    """Return the scales of a task. A task without files has the sample, as its dataclass has it."""
    return choices(f"scale/{task}") or {"sample": ""}
