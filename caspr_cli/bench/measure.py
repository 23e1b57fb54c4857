"""Steps of all contenders in turns, so that whatever else the machine does hits all alike, and what they come to."""

from __future__ import annotations

import gc
import math
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from caspr_cli.bench.contenders import (
    NEVER,
    WARM_UP,
    Settings,
    Workload,
    bytes_of_state,
    enter,
    has_interval,
)
from caspr_cli.bench.floor import floor_of
from caspr_cli.optim.cost import blocks_of
from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.options import factor_dtype
from caspr_cli.optim.probe import diagnose
from caspr_cli.recipe.errors import ConfigError

PHASES = ("statistics", "roots", "apply")
REFERENCE = "adamw"
RATE_SIZE = {"cpu": 1024, "cuda": 4096}  # of the square product that measures the rate of training
REFRESH_ROUNDS = 3
# Gradients in the statistics before refreshes are timed. One more then weighs 1 %, as much as an interval of ten steps
# does in the long run at betas[1] = 0.999; and as it is one sample and not ten, a warm start has rather more to do.
SETTLING = 100

Say = Callable[[str], None]


@dataclass
class Row:
    """What one optimizer costs; times in milliseconds, None where there is no such thing."""

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
    versions: dict[str, str]
    refresh_ms: float | None = None  # from here on CASPR's own, see RefreshCosts
    lapack_ms: float | None = None
    refresh_ratio: float | None = None
    warm_ms: float | None = None
    warm_ratio: float | None = None
    warm_residual: float | None = None


@dataclass(frozen=True)
class RefreshCosts:
    """New roots for all blocks at once, against eigendecompositions of as many matrices of the same sizes."""

    refresh_ms: float
    lapack_ms: float
    refresh_ratio: float  # refresh_ms / lapack_ms
    warm_ms: float  # warm-started
    warm_ratio: float  # warm_ms / lapack_ms
    warm_residual: float  # the largest, after the last refresh


class Clock:
    """Seconds that something takes on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, run: Callable[[], Any]) -> float:
        start = self.now()
        run()
        return self.now() - start


class Phases:
    """Seconds of a step by phase: the hook of :class:`KroneckerOptimizer`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._clock.now()
        try:
            yield
        finally:
            self._seconds[name] += self._clock.now() - start

    def take(self) -> dict[str, float]:
        """Of what came since the last call."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken


@dataclass
class Lane:
    """Something that has its turn in every round."""

    name: str
    run: Callable[[], Any]
    turns: int = 1  # a round
    phases: Phases | None = None
    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)

    def turn(self, clock: Clock) -> None:
        for _ in range(self.turns):
            if self.phases:
                self.phases.take()
            self.seconds.append(clock.seconds(self.run))
            if self.phases:
                self.parts.append(self.phases.take())

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


@dataclass
class Entry:
    """A contender's lanes: at its own interval, without refreshes (the same one where there are none), and floor."""

    name: str
    optimizer: Optimizer
    own: Lane
    still: Lane
    floor: Lane | None

    @property
    def lanes(self) -> list[Lane]:
        distinct = [self.own] if self.still is self.own else [self.own, self.still]
        return [*distinct, *([self.floor] if self.floor else [])]


def measure(
    workload: Workload, names: list[str], settings: Settings, *, rounds: int, device: torch.device, say: Say
) -> list[Row]:
    """A row for each of ``names``.

    Args:
        rounds: in each, every contender makes a step; one with an interval as many as it takes to make two intervals
            in all.
        say: is told what goes on.

    Raises:
        ConfigError: an optimizer refuses an option, or fails on this set or machine.
    """
    clock = Clock(device)
    entries = []
    for name in dict.fromkeys([*names, REFERENCE]):
        say(f"warm-up: {name}")
        with blamed(name):
            entries.append(_entry(name, workload, settings, rounds, clock))
    rate = _rate_lane(workload, device)
    take_turns([*(lane for entry in entries for lane in entry.lanes), rate], rounds, clock, say)
    size = RATE_SIZE[device.type]
    train = workload.train_flops * rate.median / (2.0 * size**3)
    adamw = next(entry for entry in entries if entry.name == REFERENCE).own.median
    rows = [_row(entry, workload, settings, train, adamw, device) for entry in entries if entry.name in names]
    for i, row in enumerate(rows):
        if row.optimizer == "caspr" and row.floor_ms is not None:  # else there is nothing that has a root
            with blamed("caspr, its roots"):
                rows[i] = replace(row, **vars(refresh_costs(workload, settings, clock, say)))
    return rows


def _entry(name: str, workload: Workload, settings: Settings, rounds: int, clock: Clock) -> Entry:
    refreshes = has_interval(name)
    first = _warm(enter(name, workload.copies(), settings, settings.interval))
    own = Lane(name, first.step, math.ceil(2 * settings.interval / rounds) if refreshes else 1)
    if isinstance(first, KroneckerOptimizer):
        own.phases = Phases(clock)
        first.phase = own.phases
    still, held = own, first
    if refreshes:
        held = _warm(enter(name, workload.copies(), settings, NEVER))
        still = Lane(name, held.step)
    floor = floor_of(held, clock.device, clock.seconds)
    return Entry(name, first, own, still, Lane(f"{name}, its floor", floor) if floor else None)


def _warm(optimizer: Optimizer) -> Optimizer:
    for _ in range(WARM_UP):
        optimizer.step()
    return optimizer


def _rate_lane(workload: Workload, device: torch.device) -> Lane:
    size, dtype = RATE_SIZE[device.type], next(iter(workload.grads)).dtype
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    torch.mm(a, b, out=out)
    return Lane("matrix product", lambda: torch.mm(a, b, out=out))


def take_turns(lanes: list[Lane], rounds: int, clock: Clock, say: Say) -> None:
    """Every lane in every round. Who begins goes around, and so does who comes after whom: what a lane leaves in the
    caches must not always be found by the same one. No garbage is collected meanwhile.
    """
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    try:
        for i in range(rounds):
            left = (time.perf_counter() - start) / i * (rounds - i) if i else 0.0
            say(f"round {i + 1}/{rounds}" + (f", about {left:.0f} s to go" if left >= 1 else ""))
            for place in order(i, len(lanes)):
                with blamed(lanes[place].name):
                    lanes[place].turn(clock)
    finally:
        if collecting:
            gc.enable()


def order(turn: int, count: int) -> list[int]:
    """A row of Williams' square: in ``count`` rows (if it is even) everyone follows every other just once."""
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]  # 0, 1, -1, 2, -2, ...
    return [(turn + offset) % count for offset in zigzag]


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """Whatever an optimizer, this project's or not, raises is told in one line that names it."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        why = (str(error).splitlines() or [""])[0]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in why:
            raise ConfigError(f"{name}: there is not enough memory here; try a smaller set") from error
        raise ConfigError(f"{name} fails here: {type(error).__name__}: {why}") from error


def _row(entry: Entry, workload: Workload, settings: Settings, train: float, adamw: float, device: torch.device) -> Row:
    seconds, refreshes = entry.own.seconds, has_interval(entry.name)
    whole = len(seconds) - len(seconds) % settings.interval if refreshes else len(seconds)  # as many refreshes as due
    mean, step = float(np.mean(seconds[:whole])), entry.still.median
    floor = entry.floor.median if entry.floor else None
    parts = split(seconds, entry.own.parts)
    return Row(
        optimizer=entry.name,
        median_ms=1e3 * entry.own.median,
        p99_ms=1e3 * float(np.percentile(seconds, 99)),
        mean_ms=1e3 * mean,
        step_ms=1e3 * step,
        floor_ms=None if floor is None else 1e3 * floor,
        floor_ratio=None if floor is None else step / floor,
        adamw_ratio=entry.own.median / adamw,
        statistics_ms=parts.get("statistics"),
        roots_ms=parts.get("roots"),
        apply_ms=parts.get("apply"),
        rest_ms=parts.get("rest"),
        state_bytes_per_parameter=bytes_of_state(entry.optimizer) / workload.parameters,
        share=mean / (mean + train),
        parameters=workload.parameters,
        train_ms=1e3 * train,
        steps=len(seconds),
        set=workload.name,
        interval=settings.interval if refreshes else None,
        block_size=settings.block_size,
        dtype=str(next(iter(workload.grads)).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        device=device_name(device),
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "pytorch-optimizer", "caspr-cli")},
        },
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def split(seconds: list[float], parts: list[dict[str, float]]) -> dict[str, float]:
    """Where the time of a median step goes, in ms; the parts add up to the median. Empty without ``parts``.

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


def refresh_costs(workload: Workload, settings: Settings, clock: Clock, say: Say) -> RefreshCosts:
    """CASPR's roots, all at once: with its options, and warm-started, in turns with LAPACK.

    Gradients are new ones in every step, so that statistics move and a warm start has something to do.
    """
    say("roots: gathering statistics")
    fresh = enter("caspr", workload.copies(), settings, interval=1)
    assert isinstance(fresh, KroneckerOptimizer)
    _settle(fresh)
    warm = deepcopy(fresh)
    for group in warm.param_groups:
        group["solver"] = "warm"
    lanes = {"fresh": _root_lane(fresh, clock), "warm": _root_lane(warm, clock)}
    lapack = Lane("LAPACK", eigendecompositions(fresh))
    say("roots: the first")
    for lane in lanes.values():
        lane.run()  # whose start is a cold one in any case
    take_turns([*lanes.values(), lapack], REFRESH_ROUNDS, clock, lambda text: say(f"roots: {text}"))
    spent = {name: 1e3 * float(np.median([part["roots"] for part in lane.parts])) for name, lane in lanes.items()}
    reference = 1e3 * lapack.median
    return RefreshCosts(
        refresh_ms=spent["fresh"],
        lapack_ms=reference,
        refresh_ratio=spent["fresh"] / reference,
        warm_ms=spent["warm"],
        warm_ratio=spent["warm"] / reference,
        warm_residual=float(diagnose(warm)["residual"].max()),
    )


def _settle(optimizer: KroneckerOptimizer) -> None:
    """Steps that gather statistics and do little else; the first roots come with the next one."""
    for group in optimizer.param_groups:
        group["start_step"] = SETTLING + 1
    for _ in range(SETTLING):
        _step_with_new_gradients(optimizer)


def _root_lane(optimizer: KroneckerOptimizer, clock: Clock) -> Lane:
    optimizer.phase = phases = Phases(clock)
    return Lane("caspr, its roots", partial(_step_with_new_gradients, optimizer), phases=phases)


def _step_with_new_gradients(optimizer: KroneckerOptimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()


def eigendecompositions(optimizer: KroneckerOptimizer) -> Callable[[], None]:
    """``torch.linalg.eigh`` of as many matrices, of the same sizes, as the optimizer keeps statistics of."""
    counts: Counter[tuple[int, torch.dtype, torch.device]] = Counter()
    for group, p, sizes, _, count in blocks_of(optimizer):
        for d in sizes:
            counts[d, factor_dtype(p, group), p.device] += count
    stacks = [_positive_definite(count, *key) for key, count in counts.items()]

    def run() -> None:
        for stack in stacks:
            torch.linalg.eigh(stack)

    return run


def _positive_definite(count: int, d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[count, d, d]``: statistics of random gradients."""
    X = torch.randn(count, d, 2 * d, dtype=dtype, device=device)
    return torch.bmm(X, X.mT) / (2 * d)
