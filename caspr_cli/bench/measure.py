"""Time steps of all optimizers in turns, so that other load on the machine affects all alike; and their statistics."""

import gc
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from caspr_cli import __version__
from caspr_cli.bench.baselines import NEVER, Settings, enter, has_interval, make
from caspr_cli.bench.gemm_bound import gemm_bound
from caspr_cli.bench.shapes import ShapeSet
from caspr_cli.bench.workload import Machine, Workload, workload_of
from caspr_cli.common.format import duration
from caspr_cli.common.plugins import installed
from caspr_cli.optim.cost import blocks_of, state_bytes
from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.options import factor_dtype
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe
from caspr_cli.training.timing import PhaseTimer, seconds_of

PHASES = ("statistics", "roots", "apply")
REFERENCE = "adamw"
RATE_SIZE = {"cpu": 1024, "cuda": 4096}  # of the square product that measures the rate of training
REFRESH_ROUNDS = 3
SETTLING = 100  # gradients in the statistics before refreshes are timed
ENDS = (0.0, 0.4, 0.8, 1.0)  # of the whole time, where warm-up, rounds and roots begin and end: a guess
BAR = 16  # characters

Log = Callable[[str], None]


def waiting(log: Log, now: Callable[[], float] = time.perf_counter) -> Callable[[int, str, float], None]:
    """Return a function that logs how far the work is, and how long the rest will take.

    It takes the number of the part (0 to 2), a text, and the share of this part that is done.
    """
    began = now()

    def say(part: int, text: str, done: float) -> None:
        start, end = ENDS[part : part + 2]
        share, elapsed = start + done * (end - start), now() - began
        left = f"  about {duration(elapsed / share - elapsed)} left" if share else ""
        full = round(BAR * share)
        log(f"[{'=' * full}{' ' * (BAR - full)}] {text}{left}")

    return say


@dataclass
class Row:
    """The costs of one optimizer; times in milliseconds, None where a cost does not apply."""

    optimizer: str
    median_ms: float  # of a step at its own interval, as are the next two
    p99_ms: float
    mean_ms: float
    step_ms: float  # median of a step without a refresh
    floor_ms: float | None  # its matrix products alone
    floor_ratio: float | None  # step_ms / floor_ms
    adamw_ratio: float  # median_ms / that of fused AdamW
    statistics_ms: float | None  # with the next three, where the time of a median step goes
    roots_ms: float | None
    apply_ms: float | None
    rest_ms: float | None
    state_bytes_per_parameter: float
    share: float  # of a training step, 0 to 1, from the mean
    parameters: int
    train_ms: float  # predicted: forward and backward of one batch
    steps: int  # behind median, percentile and mean
    set: str
    interval: int | None
    block_size: int
    dtype: str
    threads: int
    device: str
    versions: dict[str, str | None]  # None: it is not installed
    refresh_ms: float | None = None  # from here on for CASPR alone: new roots for all blocks at once
    lapack_ms: float | None = None  # eigendecompositions of as many matrices of the same sizes
    refresh_ratio: float | None = None  # refresh_ms / lapack_ms


@dataclass
class Timer:
    """A function that is timed in every round, and its seconds so far."""

    name: str
    run: Callable[[], Any]
    turns: int = 1  # calls in a round
    phases: PhaseTimer | None = None
    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)

    def turn(self, device: torch.device) -> None:
        for _ in range(self.turns):
            if self.phases:
                self.phases.take()
            self.seconds.append(seconds_of(self.run, device))
            if self.phases:
                self.parts.append(self.phases.take())

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


@dataclass
class Candidate:
    name: str
    optimizer: Optimizer
    own: Timer  # of steps at its own interval
    still: Timer  # of steps without a refresh; the same as `own` where nothing is refreshed
    bound: Timer | None  # of its matrix products alone

    @property
    def timers(self) -> list[Timer]:
        distinct = [self.own] if self.still is self.own else [self.own, self.still]
        return [*distinct, *([self.bound] if self.bound else [])]


def measured(
    what: ShapeSet | Recipe,
    names: list[str],
    settings: Settings,
    machine: Machine,
    *,
    tokens: int,
    rounds: int,
    log: Log,
) -> list[Row]:
    """Return a row for each of ``names``. Raises ConfigError.

    A set of shapes has so many ``tokens`` in a training step; a task has a batch of its own.
    """
    if machine.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no such device here. Did you mean cpu?")
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    device = torch.device(machine.device)
    log("making weights and gradients")
    with blamed("the weights"):
        workload = workload_of(what, tokens, getattr(torch, machine.dtype), device)
    return measure(workload, names, settings, rounds=rounds, log=log)


def measure(workload: Workload, names: list[str], settings: Settings, *, rounds: int, log: Log) -> list[Row]:
    """Return a row for each of ``names``.

    Raises ConfigError if an optimizer refuses an option, or fails on this set or machine. ``rounds``: in each, every
    optimizer makes a step; one with an interval makes as many as two intervals need in all.
    """
    wait, candidates, wanted = waiting(log), [], dict.fromkeys([*names, REFERENCE])
    for number, name in enumerate(wanted):
        wait(0, f"warm-up: {name}", number / len(wanted))
        with blamed(name):
            candidates.append(_candidate(name, workload, settings, rounds))
    device, rate = workload.first.device, _rate_timer(workload.first)
    take_turns([*(timer for one in candidates for timer in one.timers), rate], rounds, device, partial(wait, 1))
    train = workload.train_flops * rate.median / (2.0 * RATE_SIZE[device.type] ** 3)
    adamw = next(one for one in candidates if one.name == REFERENCE).own.median
    rows = [_row(one, workload, settings, train, adamw) for one in candidates if one.name in names]
    for i, row in enumerate(rows):
        if row.optimizer == "caspr" and row.floor_ms is not None:  # else there is nothing that has a root
            with blamed("caspr, its roots"):
                rows[i] = replace(row, **refresh_costs(workload, settings, partial(wait, 2)))
    return rows


def _candidate(name: str, workload: Workload, settings: Settings, rounds: int) -> Candidate:
    refreshes, device = has_interval(name), workload.first.device
    first = make(name, workload.copies(), settings)
    own = Timer(name, first.step, math.ceil(2 * settings.interval / rounds) if refreshes else 1)
    if isinstance(first, KroneckerOptimizer):
        first.phase = own.phases = PhaseTimer(device)
    still, held = own, first
    if refreshes:
        held = make(name, workload.copies(), replace(settings, interval=NEVER))
        still = Timer(name, held.step)
    bound = gemm_bound(held, device, partial(seconds_of, device=device))
    return Candidate(name, first, own, still, Timer(f"{name}, its matrix products", bound) if bound else None)


def _rate_timer(like: Tensor) -> Timer:
    """Return the timer of a square product, on the device and in the type of ``like``."""
    size = RATE_SIZE[like.device.type]
    a, b, out = (torch.randn(size, size, device=like.device).to(like.dtype) for _ in range(3))
    torch.mm(a, b, out=out)
    return Timer("matrix product", lambda: torch.mm(a, b, out=out))


def take_turns(timers: list[Timer], rounds: int, device: torch.device, log: Callable[[str, float], None]) -> None:
    """Run every timer in every round, without garbage collection.

    The order changes from round to round: else one timer would always find the caches as the same other left them.
    """
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            log(f"round {i + 1}/{rounds}", i / rounds)
            for place in order(i, len(timers)):
                with blamed(timers[place].name):
                    timers[place].turn(device)
    finally:
        gc.enable()


def order(turn: int, count: int) -> list[int]:
    """Return a row of Williams' square: in ``count`` rows (if even) each timer follows each other one exactly once."""
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]  # 0, 1, -1, 2, -2, ...
    return [(turn + offset) % count for offset in zigzag]


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """Turn any error of an optimizer, this project's or not, into one line that names it."""
    try:
        yield
    except (ConfigError, ImportError):  # of the latter the console script says which extra brings it
        raise
    except Exception as error:
        why = (str(error).splitlines() or [""])[0]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in why:
            raise ConfigError(f"{name}: there is not enough memory here; try a smaller set") from error
        raise ConfigError(f"{name} fails here: {type(error).__name__}: {why}") from error


def _row(one: Candidate, workload: Workload, settings: Settings, train: float, adamw: float) -> Row:
    seconds, refreshes, device = one.own.seconds, has_interval(one.name), workload.first.device
    whole = len(seconds) - len(seconds) % settings.interval if refreshes else len(seconds)  # as many refreshes as due
    mean, step = float(np.mean(seconds[:whole])), one.still.median
    bound = one.bound.median if one.bound else None
    parts = split(seconds, one.own.parts)
    versions = {"python": platform.python_version(), "torch": installed("torch")}
    versions |= {"pytorch-optimizer": installed("pytorch-optimizer"), "caspr-cli": __version__}
    return Row(
        optimizer=one.name,
        median_ms=1e3 * one.own.median,
        p99_ms=1e3 * float(np.percentile(seconds, 99)),
        mean_ms=1e3 * mean,
        step_ms=1e3 * step,
        floor_ms=None if bound is None else 1e3 * bound,
        floor_ratio=None if bound is None else step / bound,
        adamw_ratio=one.own.median / adamw,
        **{f"{part}_ms": parts.get(part) for part in (*PHASES, "rest")},
        state_bytes_per_parameter=state_bytes(one.optimizer.state) / workload.parameters,
        share=mean / (mean + train),
        parameters=workload.parameters,
        train_ms=1e3 * train,
        steps=len(seconds),
        set=workload.name,
        interval=settings.interval if refreshes else None,
        block_size=settings.block_size,
        dtype=str(workload.first.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        versions=versions,
    )


def split(seconds: list[float], parts: list[dict[str, float]]) -> dict[str, float]:
    """Return where the time of a median step goes, in ms; the parts add up to the median. Empty without ``parts``.

    From the middle third of the steps, by their length. (An average over all steps would be one of ordinary steps
    and of those that something else on the machine held up.)
    """
    if not parts:
        return {}
    ranked = sorted(range(len(seconds)), key=seconds.__getitem__)
    cut = len(ranked) // 3
    middle = ranked[cut : len(ranked) - cut]
    sums = {name: sum(parts[i].get(name, 0.0) for i in middle) for name in PHASES}
    total = sum(seconds[i] for i in middle)
    sums["rest"] = total - sum(sums.values())
    return {name: 1e3 * float(np.median(seconds)) * value / total for name, value in sums.items()}


def refresh_costs(workload: Workload, settings: Settings, log: Callable[[str, float], None]) -> dict[str, Any]:
    """Return the milliseconds of CASPR's roots, all at once, in turns with LAPACK; gradients are new in every step."""
    device = workload.first.device
    log("roots: gathering statistics", 0.0)
    optimizer = enter("caspr", workload.copies(), replace(settings, interval=1))
    assert isinstance(optimizer, KroneckerOptimizer)
    for group in optimizer.param_groups:  # steps that gather statistics and do little else; the next one has roots
        group["start_step"] = SETTLING + 1
    for _ in range(SETTLING):
        _step_with_new_gradients(optimizer)
    optimizer.phase = phases = PhaseTimer(device)
    roots = Timer("caspr, its roots", partial(_step_with_new_gradients, optimizer), phases=phases)
    lapack = Timer("LAPACK", eigendecompositions(optimizer))
    log("roots: the first", 0.5)
    roots.run()
    take_turns([roots, lapack], REFRESH_ROUNDS, device, lambda text, done: log(f"roots: {text}", 0.6 + 0.4 * done))
    seconds = float(np.median([part["roots"] for part in roots.parts]))
    ratio = seconds / lapack.median
    return {"refresh_ms": 1e3 * seconds, "lapack_ms": 1e3 * lapack.median, "refresh_ratio": ratio}


def _step_with_new_gradients(optimizer: KroneckerOptimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()


def eigendecompositions(optimizer: KroneckerOptimizer) -> Callable[[], None]:
    """Return a call of ``torch.linalg.eigh`` for as many matrices, of the same sizes, as there are statistics."""
    counts: Counter[tuple[int, torch.dtype, torch.device]] = Counter()
    for group, p, sizes, _, count in blocks_of(optimizer):
        for d in sizes:
            counts[d, factor_dtype(p, group), p.device] += count
    stacks = []
    for (d, dtype, device), count in counts.items():  # of random gradients
        X = torch.randn(count, d, 2 * d, dtype=dtype, device=device)
        stacks.append(torch.bmm(X, X.mT) / (2 * d))

    def run() -> None:
        for stack in stacks:
            torch.linalg.eigh(stack)

    return run
