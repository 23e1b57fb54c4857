"""``caspr-bench --ranks``: a step whose work several ranks share, against one that a single process does alone.

Each number of ranks has its own processes. They take turns, a few steps each, so that other load on the machine affects
all alike.
"""

import datetime
import multiprocessing
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from caspr_cli.bench.baselines import WARM_UP, Settings, enter
from caspr_cli.bench.measure import Log
from caspr_cli.bench.shapes import ShapeSet
from caspr_cli.bench.workload import Machine, workload_of
from caspr_cli.optim.cost import state_bytes
from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.stacks import is_factor
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe
from caspr_cli.training.timing import PhaseTimer, seconds_of

PARTS = ("statistics", "roots", "apply", "communication")
TIMEOUT = 600  # seconds for one turn


@dataclass
class RanksRow:
    """One optimizer at one number of ranks; times in milliseconds, of the slowest rank."""

    optimizer: str
    ranks: int
    median_ms: float
    mean_ms: float
    speedup: float  # mean at one rank (the fewest measured) / mean here
    statistics_ms: float  # means, of the rank that spends most on it
    roots_ms: float
    apply_ms: float
    communication_ms: float  # waiting for the updates of others
    state_bytes: int  # of the rank that keeps most
    factor_bytes: int  # statistics and roots alone, of that rank
    bytes_received: int  # by a rank in a step
    weight_bytes: int  # of the model
    parameters: int
    steps: int
    set: str
    interval: int
    dtype: str
    threads: int  # of a rank
    device: str


def measured_ranks(
    what: ShapeSet | Recipe,
    names: list[str],
    counts: list[int],
    settings: Settings,
    machine: Machine,
    *,
    rounds: int,
    log: Log,
) -> list[RanksRow]:
    """Return a row for each of ``names`` at each number of ranks. Raises ConfigError.

    ``rounds``: in each, every number of ranks makes as many steps as an interval has.
    """
    if machine.device == "cuda" and torch.cuda.device_count() < max(counts):
        raise ConfigError(f"--ranks {max(counts)}: torch sees {torch.cuda.device_count()} CUDA devices here")
    rows = []
    for name in names:
        with ExitStack() as stack:
            teams = {n: stack.enter_context(_team(n, (what, name, settings, machine))) for n in counts}
            for n, team in teams.items():
                log(f"{name}: warm-up of {n} processes")
                _asked(team, "warm")
            steps: dict[int, list[list[dict[str, float]]]] = {n: [] for n in counts}  # [step][rank]
            for i in range(rounds):
                log(f"{name}: round {i + 1}/{rounds}")
                for n, team in teams.items():
                    steps[n] += [list(ranks) for ranks in zip(*_asked(team, "steps"), strict=True)]
            first_mean: float | None = None
            for n, team in teams.items():
                rows.append(_row(name, steps[n], _asked(team, "facts"), first_mean))
                first_mean = first_mean or rows[-1].mean_ms
    return rows


def _row(
    name: str, steps: list[list[dict[str, float]]], facts: list[dict[str, Any]], first_mean: float | None
) -> RanksRow:
    """Return the row of one number of ranks from ``steps`` ``[step][rank]``; a step takes as long as its slowest."""
    whole = [1000 * max(rank["step"] for rank in ranks) for ranks in steps]
    by_rank, mean = list(zip(*steps, strict=True)), float(np.mean(whole))
    means = {part: [float(np.mean([step.get(part, 0.0) for step in own])) for own in by_rank] for part in PARTS}
    parts = {f"{part}_ms": 1000 * max(own) for part, own in means.items()}
    row: dict[str, Any] = parts | max(facts, key=lambda fact: fact["state_bytes"])
    row |= {"median_ms": float(np.median(whole)), "mean_ms": mean, "speedup": (first_mean or mean) / mean}
    return RanksRow(optimizer=name, ranks=len(facts), steps=len(whole), **row)


def _asked(pipes: list[Connection], request: str) -> list[Any]:
    """Return the answer of each rank. Raises ConfigError if a rank failed, or does not answer."""
    for pipe in pipes:
        with suppress(BrokenPipeError):  # the process has ended, as will be seen below
            pipe.send(request)
    answers = []
    for rank, pipe in enumerate(pipes):
        try:
            answers.append(pipe.recv() if pipe.poll(TIMEOUT) else "does not answer")
        except (EOFError, ConnectionError):
            answers.append("has ended")
        if isinstance(answers[-1], str):
            raise ConfigError(f"--ranks {len(pipes)}: rank {rank} {answers[-1]}")
    return answers


@contextmanager
def _team(count: int, job: tuple[ShapeSet | Recipe, str, Settings, Machine]) -> Iterator[list[Connection]]:
    """Start the processes of the ranks, which answer requests until the end, and yield a pipe to each."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        pipes = []
        for rank in range(count):
            here, there = context.Pipe()
            arguments = (there, rank, count, str(Path(folder) / "store"), *job)
            process = context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)  # before it is joined
            there.close()
            pipes.append(here)
        yield pipes


def _rank(
    pipe: Connection, rank: int, count: int, store: str, what: Any, name: str, settings: Settings, machine: Machine
) -> None:
    """Answer requests until the process is ended."""
    try:
        torch.set_num_threads(machine.threads or 1)
        device = joined(machine.device, rank, count, store)
        workload = workload_of(what, 1, getattr(torch, machine.dtype), device)
        optimizer = enter(name, workload.copies(), settings)
        assert isinstance(optimizer, KroneckerOptimizer)
        optimizer.phase = phases = PhaseTimer(device)
        while True:
            request = pipe.recv()
            if request == "facts":
                pipe.send(_facts(optimizer, workload.name, settings, machine))
                continue
            found = []
            for _ in range(WARM_UP if request == "warm" else settings.interval):
                if count > 1:
                    dist.barrier()
                phases.take()
                seconds = seconds_of(optimizer.step, device)
                found.append(phases.take() | {"step": seconds})
            pipe.send(found)
    except EOFError:
        return
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"failed: {(str(error) or type(error).__name__).splitlines()[0]}")


def joined(kind: str, rank: int, count: int, store: str) -> torch.device:
    """Return the device of this rank, which is its own from now on, and meet the other ranks."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else every rank would take the first for what it sends
    if count > 1:
        backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        meet: dict[str, Any] = {"init_method": f"file://{store}", "rank": rank, "world_size": count}
        dist.init_process_group(backend, **meet, timeout=datetime.timedelta(seconds=TIMEOUT), device_id=own)
    return device


def _facts(optimizer: KroneckerOptimizer, name: str, settings: Settings, machine: Machine) -> dict[str, Any]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    factors = {p: {k: x for k, x in state.items() if is_factor(k)} for p, state in optimizer.state.items()}
    return {
        "state_bytes": state_bytes(optimizer.state),
        "factor_bytes": state_bytes(factors),
        "bytes_received": optimizer.bytes_received,
        "weight_bytes": sum(p.numel() * p.element_size() for p in params),
        "parameters": sum(p.numel() for p in params),
        "set": name,
        "interval": settings.interval,
        "dtype": machine.dtype,
        "threads": machine.threads or 1,
        "device": machine.device,
    }
