"""A look into the user's own data before a run starts, when no torch is imported yet."""

import time
from importlib import import_module

from caspr_cli.recipe.task import TaskConf
from caspr_cli.tasks.errors import DataError
from caspr_cli.tasks.registry import TASKS

SECONDS = 2.0  # of CPU, as much as importing torch takes; what is not read by then, the run reads and refuses itself


def check(conf: TaskConf) -> None:
    """Read own data from their beginning for some seconds: small ones to their end.

    Raises DataError if they cannot be used.
    """
    if not (named := TASKS[conf.name].samples):
        return
    module, _, function = named.partition(":")
    try:
        samples = getattr(import_module(module), function)(conf)
        until = time.process_time() + SECONDS
        for _ in samples:
            if time.process_time() > until:
                return
    except DataError:
        raise
    except Exception:
        return  # a library or a disk: the run does the same next, and says what it is
