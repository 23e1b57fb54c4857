"""Tasks, optimizers and config files of other packages, from entry points in their ``pyproject.toml``.

    [project.entry-points."caspr.tasks"]
    blobs = "my_work:BLOBS"        # an Entry of caspr_cli.tasks
    [project.entry-points."caspr.optimizers"]
    lion = "my_work:LION"          # an Entry of caspr_cli.optim.family
    [project.entry-points."caspr.conf"]
    my_work = "my_work.conf"       # a folder of YAML files as in conf/: experiment, scale, search, tuned

Whoever installs such a package consents to running its code; a config only names what is there. Entries are imported
wherever a recipe is read, so their modules should not import torch.
"""

from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from caspr_cli.common.errors import UserError

TASKS, OPTIMIZERS, CONF = "caspr.tasks", "caspr.optimizers", "caspr.conf"
GROUPS = (TASKS, OPTIMIZERS, CONF)
E = TypeVar("E")


@cache
def _installed() -> EntryPoints:
    return EntryPoints(each for group in GROUPS for each in entry_points(group=group))  # reads a file of every package


def installed(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed by this name."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def joined(group: str, ours: dict[str, E]) -> dict[str, E]:
    """Return our entries and those of other packages.

    Raises UserError, which names the package, if an entry cannot be used.
    """
    found, kind = dict(ours), type(next(iter(ours.values())))
    for point in _installed().select(group=group):
        if point.name in ours:
            raise _refused(point, "caspr-cli itself has this name; choose another")
        if point.name in found:
            raise _refused(point, f"{package(group, point.name)} has this name, too; uninstall one")
        if not point.name.isidentifier():
            raise _refused(point, "the name should be made of letters, digits and _")
        try:
            entry = point.load()
        except (Exception, SystemExit) as error:  # whatever its module does
            raise _refused(point, f"cannot be imported ({_why(error)})") from error
        if not isinstance(entry, kind):
            raise _refused(point, f"should be a {_name(kind)} but is a {_name(type(entry))}")
        found[point.name] = entry
    return found


def folders() -> dict[Path, str]:
    """Return the folders with config files of other packages, and the package of each, as "my-work 0.1".

    Raises UserError if there is no such folder.
    """
    found = {}
    for point in _installed().select(group=CONF):
        try:
            spec = find_spec(point.value)
        except (Exception, SystemExit) as error:
            raise _refused(point, f"cannot be imported ({_why(error)})") from error
        if spec is None or not spec.submodule_search_locations:
            raise _refused(point, f"{point.value} is no folder")
        found[Path(spec.submodule_search_locations[0])] = of(point)
    return found


def package(group: str, name: str) -> str | None:
    """Return which package brings an entry, as "my-work 0.1"; None if it is ours."""
    found = point(group, name)
    return of(found) if found else None


def point(group: str, name: str) -> EntryPoint | None:
    """Return the entry point of another package; None if the entry is ours."""
    return next(iter(_installed().select(group=group, name=name)), None)


def of(point: EntryPoint) -> str:
    """Return which package an entry point is of, as "my-work 0.1"."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}".removeprefix("builtins.")


def _why(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _refused(point: EntryPoint, why: str) -> UserError:
    return UserError(f"package {of(point)}: entry point {point.name} of {point.group}: {why}")
