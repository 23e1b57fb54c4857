"""One rank of a run, ``python -m caspr_cli.training.worker RECORD``: read the recipe, train, write the result."""

import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from caspr_cli.common.alive import lives
from caspr_cli.common.errors import not_installed
from caspr_cli.common.files import disk_error
from caspr_cli.common.shape import DONE, FAILED
from caspr_cli.recipe import compose
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.runs.processes import LAUNCHER, device_error, memory_error
from caspr_cli.runs.record import CUT_OFF, FULL, PLACE, PREEMPTED, REFUSED, RUNNING, Record, RecordDamagedError

NAMES_RANKS = ("rank ", "no rank ")  # the start of a message that names its rank


def main(path: str) -> int:
    """Run one rank of a record; return the exit status."""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    record = Record(Path(path))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with record.joined():
        if not lives(int(os.environ.get(LAUNCHER, os.getpid()))):
            return CUT_OFF  # another may have the record by now
        try:
            _run(record, rank, world)
        except Exception as error:
            with suppress(OSError, MemoryError):  # a full disk has no room for the log
                traceback.print_exc()
            return _end(record, error, rank, world)
    return 0


def _run(record: Record, rank: int, world: int) -> None:
    recipe = compose.load(record.config)
    from caspr_cli.training.begin import begin

    begun = begin(recipe, record, rank=rank)
    from caspr_cli.training.fit import fit  # only now: it imports Lightning
    from caspr_cli.training.ranks import wait_for_first

    result = fit(begun, record, rank=rank, world=world)
    if rank > 0:
        wait_for_first(record, rank, world, recipe.trainer.timeout)
        return
    if result is not None:
        record.write("result.json", result)
    record.update_status(state=PREEMPTED if result is None else DONE)


def _end(record: Record, error: Exception, rank: int, world: int) -> int:
    """Write the error into ``status.json``, unless another rank has; return the exit status."""
    state, message = _cause(record, error)
    if state is None:
        return CUT_OFF  # the rank that ended first knows why
    if world > 1 and not message.startswith(NAMES_RANKS):
        message = f"rank {rank}: {message}"
    with suppress(OSError):  # nor for this: the launcher finds the state "running", and this exit status
        if record.status.get("state") == RUNNING:
            record.update_status(state=state, error=message)
    return CUT_OFF if state == PREEMPTED else 1


def _cause(record: Record, error: Exception) -> tuple[str | None, str]:
    """Return the state that an error leaves a run in (None: another rank writes it), and the message."""
    if memory := memory_error(error):  # before anything else is imported
        return FAILED, f"too little memory: {memory}; a smaller task.batch_size, or trainer.accumulate, needs less"
    if broken := device_error(error):
        return PREEMPTED, f"a GPU is broken or gone: {broken}"
    from caspr_cli.tasks.errors import DataError
    from caspr_cli.training.ranks import HungError, LostError

    # A loader's process hands an error on as the text of its traceback, which ends in what it said.
    message = str(error).rpartition(f"{DataError.__qualname__}: ")[2].strip() or type(error).__name__
    if isinstance(error, LostError):
        return None, message
    if isinstance(error, HungError):
        return PREEMPTED, message
    if isinstance(error, ModuleNotFoundError) and (missing := not_installed(error)):
        return REFUSED, missing
    refused = isinstance(error, (DataError, ConfigError, RecordDamagedError))
    disk = disk_error(error, PLACE)
    if disk and (not refused or disk.errno in FULL):  # else what a user has to mend
        return PREEMPTED, f"{disk.filename or f'{record.path}, or the cache'}: {disk.strerror}"
    return (REFUSED, message) if refused else (FAILED, f"{type(error).__name__}: {message}")


if __name__ == "__main__":
    code = main(sys.argv[1])
    if code == CUT_OFF:
        os._exit(code)  # an orderly exit would wait for a rank or a disk that is gone
    sys.exit(code)
