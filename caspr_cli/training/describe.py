"""Answer a question about a recipe without training: ``python -m caspr_cli.training.describe plan|data``.

The recipe comes on standard input. ``plan`` prints the table of ``debug=plan``, ``data`` a line of JSON with the hash
of the data.
"""

import json
import logging
import sys
from contextlib import suppress
from typing import Any

from caspr_cli import tasks
from caspr_cli.common import plugins
from caspr_cli.common.errors import not_installed
from caspr_cli.common.streams import complain
from caspr_cli.recipe import compose
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs import fingerprint
from caspr_cli.tasks.base import DataError, Task
from caspr_cli.tasks.files import data_files
from caspr_cli.training.blame import blaming


def prepared(recipe: Recipe, task: Task) -> tuple[fingerprint.Stamps | None, dict[str, Any]]:
    """Prepare a task's data; return the stamps that the user's files had before, and the task's description of them.

    Raises DataError if the data cannot be read.
    """
    taken = None
    if (root := fingerprint.root_of(recipe)) is not None:
        with suppress(DataError, OSError):  # the task reads them next, and says what is wrong
            taken = fingerprint.take(root, data_files(root))
    with blaming(recipe, plugins.TASKS):
        task.prepare()
        return taken, task.describe_data()


def main(question: str) -> int:
    """Return the exit code: 0, or 2 after one line that says what is wrong."""
    recipe = compose.parse(sys.stdin.read())
    logging.basicConfig(format="%(message)s")
    logging.getLogger("caspr").setLevel(logging.INFO)
    try:
        if question == "plan":
            from caspr_cli.training.plan import plan, table  # slow, and not needed for the data

            with blaming(recipe, plugins.TASKS):
                found = plan(recipe)
            print("\n".join(table(found)))
        else:
            taken, data = prepared(recipe, tasks.load(recipe.task, recipe.seed))
            print(json.dumps({"files": taken or {}, "data": data}))
    except (ConfigError, DataError, OSError) as error:  # OSError: the disk of the cache is full
        complain(str(error).splitlines()[0])
        return 2
    except ModuleNotFoundError as error:
        if (missing := not_installed(error)) is None:
            raise
        complain(missing)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
