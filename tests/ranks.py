"""Several ranks in tests: processes that stay, and call functions of test modules together under gloo on the CPU."""

import datetime
import importlib
import itertools
import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class Ranks:
    """``Ranks(2)(function, ...)`` calls ``function(rank, ...)`` on two ranks; the list of what they return.

    Each call has a process group of its own. What goes in and out is pickled.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self._folder, self._calls = tempfile.TemporaryDirectory(), itertools.count()
        self._start()

    def _start(self) -> None:
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        context = mp.get_context("spawn")
        for _ in range(self.world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, sys.path), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def __call__(self, function: Any, *args: Any, timeout: float = 300) -> list[Any]:
        # Never the same name twice: a store that is destroyed late makes its file once more.
        store = Path(self._folder.name) / str(next(self._calls))
        for rank, pipe in enumerate(self._pipes):
            pipe.send((function.__module__, function.__qualname__, rank, self.world, str(store), args))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                self._stop()  # a late answer would be taken for that of the next call
                self._start()
                raise AssertionError(f"rank {rank} does not answer")
            results.append(pipe.recv())
        failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(results) if not ok]
        assert not failed, "\n".join(failed)
        return [value for _, value in results]

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def close(self) -> None:
        self._stop()
        self._folder.cleanup()


def alone(function: Any, *args: Any) -> Any:
    """What it comes to in this process, which has one thread as the ranks have."""
    return function(0, *args)


def _serve(pipe: Connection, path: list[str]) -> None:
    sys.path[:] = path
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        module, name, rank, world, store, args = pipe.recv()
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=30),
            )
            function = getattr(importlib.import_module(module), name)
            answer = True, function(rank, *args)
            dist.barrier()  # nobody leaves while another still connects
        except Exception:
            answer = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(answer)
