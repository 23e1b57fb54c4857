"""One rank of a run: ``python -m caspr_cli.runs.worker RECORD``. Reads the record's recipe, writes its result."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from caspr_cli.recipe import compose
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.runs.processes import LAUNCHER, lives
from caspr_cli.runs.record import CUT_OFF, DONE, FAILED, PREEMPTED, RUNNING, Record, RecordDamagedError, disk_error


def main(path: str) -> int:
    """Returns the exit status."""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    record = Record(Path(path))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with record.joined():
        if not lives(int(os.environ.get(LAUNCHER, os.getpid()))):
            return CUT_OFF  # another may have the record by now
        try:
            _run(record, rank, world)
        except Exception as error:
            with suppress(OSError):  # a full disk has no room for the log
                traceback.print_exc()
            return _end(record, error, rank, world)
    return 0


def _run(record: Record, rank: int, world: int) -> None:
    recipe = compose.load(record.config)
    from caspr_cli.training.fit import fit
    from caspr_cli.training.ranks import wait_for_first

    result = fit(recipe, record, rank=rank, world=world)
    if rank > 0:
        wait_for_first(record, rank, world, recipe.trainer.timeout)
        return
    if result is not None:
        record.write("result.json", result)
    record.update_status(state=PREEMPTED if result is None else DONE)


def _end(record: Record, error: Exception, rank: int, world: int) -> int:
    """Say why in ``status.json``, unless another rank has. Returns the exit status."""
    from caspr_cli.training.ranks import HungError, LostError
    from tasks.base import DataError

    if isinstance(error, LostError):
        return CUT_OFF  # whoever ended first knows why
    # A loader's process hands an error on as the text of its traceback, which ends in what it said.
    message, code = str(error).rpartition(f"{DataError.__qualname__}: ")[2].strip() or type(error).__name__, 1
    user_error = isinstance(error, (DataError, ConfigError, RecordDamagedError))
    if isinstance(error, HungError):
        code = CUT_OFF
    elif not isinstance(error, DataError) and (disk := disk_error(error)):  # data that may not be read are no disk
        message, code = f"{disk.filename or record.path}: {disk.strerror}", CUT_OFF
    elif not user_error:
        message = f"{type(error).__name__}: {message}"
    if world > 1 and not isinstance(error, HungError):
        message = f"rank {rank}: {message}"
    state = {"state": PREEMPTED if code == CUT_OFF else FAILED, "error": message, "user_error": user_error}
    with suppress(OSError):  # nor for this: the launcher finds the state "running", and this exit status
        if record.status.get("state") == RUNNING:
            record.update_status(**state)
    return code


if __name__ == "__main__":
    code = main(sys.argv[1])
    if code == CUT_OFF:
        os._exit(code)  # an orderly exit would wait for a rank or a disk that is gone
    sys.exit(code)
