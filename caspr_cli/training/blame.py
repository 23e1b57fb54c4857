"""Whose fault an error is that comes before training: ours, or that of the package that brings a task or optimizer."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path

from caspr_cli.common import plugins
from caspr_cli.common.errors import not_installed
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe
from caspr_cli.tasks.errors import DataError


@contextmanager
def blaming(recipe: Recipe, group: str) -> Iterator[None]:
    """Around calls of a recipe's task or optimizer: name the package, function and line of an error of another's code.

    ``group``, ``plugins.TASKS`` or ``plugins.OPTIMIZERS``, is what is called: it gets the blame for an error outside
    all packages' functions, as of wrong arguments. Raises ConfigError for an error of another package, which is its
    cause; an error of ours is raised as it is.
    """
    try:
        yield
    except (ConfigError, DataError):
        raise
    except Exception as error:
        if isinstance(error, ImportError) and not_installed(error):
            raise
        names = {plugins.TASKS: recipe.task.name, plugins.OPTIMIZERS: recipe.optim.name}
        points = {kind: plugins.point(kind, name) for kind, name in names.items()}
        where = next((found for point in points.values() if point and (found := _place(error, point))), None)
        called = points[group]
        if where is None and called is not None:
            where = f"package {plugins.of(called)}: {called.value}"
        if where is None:
            raise
        raise ConfigError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _place(error: Exception, point: EntryPoint) -> str | None:
    """Return package, function and line of an error; None if no function of the package is part of it."""
    root, place = point.module.partition(".")[0], None
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] == root:
            code = frame.f_code
            place = f"package {plugins.of(point)}: {code.co_qualname} ({Path(code.co_filename).name}, line {line})"
    return place
