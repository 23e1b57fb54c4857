"""From what the command line says to rows: the machine, the workload, the measurement."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from caspr_cli.bench.contenders import Settings, Workload, workload_of_shapes, workload_of_task
from caspr_cli.bench.measure import Row, Say, blamed, measure
from caspr_cli.bench.shapes import ShapeSet
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class Machine:
    """Where, and in which type."""

    dtype: str
    device: str
    threads: int | None  # None: as many as torch takes


def measured(
    what: ShapeSet | Recipe,
    names: list[str],
    settings: Settings,
    machine: Machine,
    *,
    tokens: int,
    rounds: int,
    say: Say,
) -> list[Row]:
    """A row for each of ``names``.

    Args:
        tokens: in one training step, of a set of shapes; a task has a batch of its own.

    Raises:
        ConfigError: one line for the user.
    """
    if machine.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no such device here. Did you mean cpu?")
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    device, dtype = torch.device(machine.device), getattr(torch, machine.dtype)
    say("making weights and gradients")
    with blamed("the weights"):
        workload = workload_of(what, tokens, dtype, device)
    return measure(workload, names, settings, rounds=rounds, device=device, say=say)


def workload_of(what: ShapeSet | Recipe, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """Raises:
    ConfigError: a task's data, which its model's shape depends on, are not there.
    """
    if isinstance(what, ShapeSet):
        return workload_of_shapes(what, tokens, dtype, device)
    from tasks.base import DataError

    try:
        return workload_of_task(what, dtype, device)
    except (DataError, OSError) as error:  # OSError: the disk of the cache is full
        raise ConfigError(f"--task {what.task.name}: {str(error).splitlines()[0]}") from error
