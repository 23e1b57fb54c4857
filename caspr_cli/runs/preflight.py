"""The other side of ``debug=plan``: reads a recipe from standard input, prints its plan. Nothing is trained."""

from __future__ import annotations

import logging
import sys

from caspr_cli.recipe import compose
from caspr_cli.recipe.errors import ConfigError


def main() -> int:
    """Exit code 0, or 2 with one clear line."""
    recipe = compose.parse(sys.stdin.read())
    logging.basicConfig(format="%(message)s")
    logging.getLogger("caspr").setLevel(logging.INFO)
    from caspr_cli.training.plan import plan, table
    from tasks.base import DataError

    try:
        for line in table(plan(recipe)):
            print(line)
    except (ConfigError, DataError, OSError) as error:  # OSError: the disk of the cache is full
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
