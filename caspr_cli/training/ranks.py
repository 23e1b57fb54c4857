"""Errors that other ranks caused, as types of their own."""

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from caspr_cli.runs.processes import LAUNCHER, workers
from caspr_cli.runs.record import RUNNING, Record

# What gloo, NCCL and the store in which ranks meet say; they have no exceptions of their own for it.
HUNG = re.compile(
    r"timed out (waiting|after|in blocking wait|during finalize)|wait timeout after|socket timeout|application timeout"
    r"|collective operation timeout|(nccl|collective) operation timed out|operations have failed or timed out",
    re.IGNORECASE,
)
LOST = re.compile(
    r"connection (was )?(closed|reset|refused|likely closed)|broken pipe|connectfullmesh|failed to recv|ncclremoteerror"
    r"|remote process exit|could not connect|communicator was aborted|socket (recv|send) failed",
    re.IGNORECASE,
)
SECONDS_TO_COMPARE = 1.0


class HungError(Exception):
    """Another rank does not answer."""


class LostError(Exception):
    """Another rank is gone."""


@contextmanager
def answering(record: Record, rank: int, world: int, timeout: float) -> Iterator[None]:
    """Turn an error that another rank caused into one of two types; errors of this rank pass through.

    Raises HungError if some rank did not answer in time (it is ended, as it may not listen to anything milder), and
    LostError if the connection to some rank is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if world > 1 and HUNG.search(str(error)):
            silent = _silent(record, rank, world)
            _end(record, silent)
            who = f"rank {', '.join(map(str, silent))} did not answer" if silent else "no rank heard of the others"
            raise HungError(f"{who} for {timeout:g} s (trainer.timeout)") from error
        if world > 1 and LOST.search(str(error)):
            raise LostError(str(error)) from error
        raise


def wait_for_first(record: Record, rank: int, world: int, timeout: float) -> None:
    """Wait until the first rank has written how the run ended; that rank may wait for the disk after its last step.

    Raises HungError if it has not written it in time, and LostError if it is gone, on another machine perhaps, and has
    written nothing.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing left to save here
    deadline = time.monotonic() + timeout
    # The first rank never comes to it; but gloo ends it with an error as soon as that rank is gone.
    alive = dist.barrier(async_op=True) if dist.is_initialized() and dist.get_backend() == "gloo" else None
    with answering(record, rank, world, timeout):
        while record.status.get("state") == RUNNING:
            if time.monotonic() > deadline:
                raise RuntimeError("timed out waiting for rank 0")
            gone = alive is not None and alive.is_completed()
            time.sleep(0.02)
            if gone and record.status.get("state") == RUNNING:  # it writes before it goes
                raise LostError("rank 0 is gone")


def _silent(record: Record, rank: int, world: int) -> list[int]:
    """Return the ranks that are not waiting: they hang, and this one waits for them."""
    marks = [record.path / f".waited.{r}" for r in range(world)]
    with suppress(OSError):  # a full disk
        marks[rank].touch()
    time.sleep(SECONDS_TO_COMPARE)
    return [r for r, mark in enumerate(marks) if r != rank and not mark.exists()]


def _end(record: Record, ranks: list[int]) -> None:
    for process, rank in workers(record.path, int(os.environ.get(LAUNCHER, "0"))).items():
        if rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
