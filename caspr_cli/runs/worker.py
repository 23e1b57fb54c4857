"""One rank of a run: ``python -m caspr_cli.runs.worker RECORD``. Reads the record's recipe, writes its result."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from caspr_cli.recipe import compose
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.runs.record import DONE, FAILED, PREEMPTED, RUNNING, Record, RecordDamagedError


def main(path: str) -> int:
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    record = Record(Path(path))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        recipe = compose.load(record.config)
        from caspr_cli.training.fit import fit

        result = fit(recipe, record, rank=rank, world=world)
    except Exception as error:
        traceback.print_exc()  # to log.txt
        with suppress(OSError):  # a full disk: the launcher finds the state "running"
            _fail(record, error, rank if world > 1 else None)
        return 1
    if rank == 0:
        if result is not None:
            record.write("result.json", result)
        record.update_status(state=PREEMPTED if result is None else DONE)
    return 0


def _fail(record: Record, error: Exception, rank: int | None) -> None:
    """The first rank to fail says why; the others are ended by the launcher."""
    from tasks.base import DataError

    if record.status.get("state") != RUNNING:
        return
    user_error = isinstance(error, (DataError, ConfigError, RecordDamagedError))
    message = str(error) or type(error).__name__
    if not user_error:
        message = f"{type(error).__name__}: {message}"
    record.update_status(
        state=FAILED, error=message if rank is None else f"rank {rank}: {message}", user_error=user_error
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
