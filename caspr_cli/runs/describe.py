"""What a recipe's data are now. As a program: reads a recipe from standard input, prints that as a line of JSON."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from caspr_cli.recipe import compose
from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs import fingerprint

if TYPE_CHECKING:
    from tasks.base import Task


def prepared(recipe: Recipe, task: Task) -> tuple[fingerprint.Stamps | None, dict[str, Any]]:
    """Prepare a task's data. Returns the stamps of the user's files from before that, and what the task says of them.

    Raises:
        DataError: the data cannot be read.
    """
    from tasks.base import DataError
    from tasks.files import data_files

    taken = None
    if (root := fingerprint.root_of(recipe)) is not None:
        with suppress(DataError, OSError):  # the task reads them next, and says what is wrong
            taken = fingerprint.take(root, data_files(root))
    task.prepare()
    return taken, task.describe_data()


def main() -> int:
    """Exit code 0, or 2 with one clear line."""
    recipe = compose.parse(sys.stdin.read())
    import tasks
    from tasks.base import DataError

    try:
        taken, data = prepared(recipe, tasks.load(recipe.task, recipe.seed))
    except (DataError, OSError) as error:  # OSError: the disk of the cache is full
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(json.dumps({"files": taken or {}, "data": data}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
