"""Steps of the optimizer that are taken here, against what their shapes say."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tasks
from caspr_cli.bench.measure import Clock, Phases
from caspr_cli.optim.caspr import CASPR
from caspr_cli.optim.cost import blocks_of, state_bytes
from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.schedule import EIGH_FLOPS, phases
from caspr_cli.optim.shard import Loads
from caspr_cli.recipe.errors import ConfigError, nearest
from caspr_cli.recipe.schema import TASKS
from caspr_cli.theory.solving import least_seconds, product_rate
from caspr_cli.theory.work import Machine, Work, gathered, seconds, work_of

WARM_UP = 2  # steps
COPIED = 2**24  # numbers, more than caches hold
Shape = tuple[int, ...]
Say = Callable[[str], None]


class Processors(Clock):
    """Seconds of this process's processors: on one thread, those it takes where nothing else runs."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def now(self) -> float:
        return time.process_time()


@dataclass(frozen=True)
class Run:
    """An average step over matrices, in milliseconds, measured and predicted; bytes of state the same."""

    width: int
    options: dict[str, Any]
    work: Work
    measured: dict[str, float]  # statistics, roots, apply, rest
    predicted: dict[str, float]
    state: int

    @property
    def milliseconds(self) -> float:
        return sum(self.measured.values())

    @property
    def ratio(self) -> float:
        """Predicted over measured, of the whole."""
        return sum(self.predicted.values()) / self.milliseconds


def layer(width: int) -> list[Shape]:
    """The matrices of a transformer's layer: attention in and out, MLP up and down; 12 width^2 numbers."""
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def this_machine(size: int) -> Machine:
    """One thread of this CPU: the rate of float32 products of ``size`` rows, and of a copy."""
    source, target = torch.randn(COPIED), torch.empty(COPIED)
    target.copy_(source)
    memory = 2.0 * source.nbytes / least_seconds(lambda: target.copy_(source))
    rate = product_rate(size)
    return Machine(products=rate, roots=rate, memory=memory)


def run(width: int, **options: Any) -> Run:
    """One layer for an interval of steps, in which each block has new roots once; at least five."""
    generator = torch.Generator().manual_seed(width)
    matrices = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in layer(width)]
    for matrix in matrices:
        matrix.grad = torch.randn(matrix.shape, generator=generator)
    optimizer = CASPR(matrices, start_step=1, **options)
    for _ in range(WARM_UP):
        optimizer.step()
    work = work_of(optimizer)
    machine = this_machine(min(width, optimizer.param_groups[0]["block_size"]))
    clock = Processors()
    optimizer.phase = spent = Phases(clock)
    steps = max(5, optimizer.param_groups[0]["interval"])
    total = clock.seconds(lambda: [optimizer.step() for _ in range(steps)])
    parts = spent.take()
    named = {name: 1e3 * parts.get(name, 0.0) / steps for name in ("statistics", "roots", "apply")}
    measured = named | {"rest": 1e3 * total / steps - sum(named.values())}
    expected = seconds(work, machine)
    predicted = {"statistics": expected.statistics, "roots": expected.roots, "apply": expected.apply}
    predicted = {name: 1e3 * value for name, value in (predicted | {"rest": expected.traffic}).items()}
    return Run(width, options, work, measured, predicted, state_bytes(optimizer.state))


# ---- a task's model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What ``debug=plan`` says of a task's model with CASPR, in one line."""

    task: str
    parameters: int
    work: Work
    training: float  # FLOPs of forward and backward of a batch
    state: int  # bytes, as steps on the "meta" device make it, of what is preconditioned


def model_of(name: str, batch: int | None, **options: Any) -> Model:
    """The model of a task at its sample scale.

    Args:
        batch: samples in a step; the task's own if there is none given.

    Raises:
        ConfigError: no such task; a batch of nothing.
    """
    if name not in TASKS:
        raise ConfigError(f"--model {name}: no such task.{nearest(name, TASKS)} (choices: {', '.join(TASKS)})")
    if batch is not None and batch < 1:
        raise ConfigError(f"--batch {batch}: a batch has at least 1 sample")
    conf = TASKS[name]()
    conf.batch_size = batch or conf.batch_size
    task = tasks.load(conf, 0)
    model = task.model()
    plain = task.plain(model)
    matrices = [p for n, p in model.named_parameters() if n not in plain]
    optimizer = CASPR(stand_ins(matrices), start_step=1, **options)
    for _ in range(2):  # some only make their state in the first
        optimizer.step()
    return Model(
        name,
        sum(p.numel() for p in model.parameters()),
        work_of(optimizer),
        task.train_flops(model),
        state_bytes(optimizer.state),
    )


def stand_ins(tensors: Sequence[Tensor]) -> list[nn.Parameter]:
    """Of the same shapes on the "meta" device, which holds no numbers; with gradients."""
    made = [nn.Parameter(torch.empty_like(tensor, device="meta")) for tensor in tensors]
    for one in made:
        one.grad = torch.empty_like(one)
    return made


# ---- ranks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dealt:
    """Blocks as they are dealt out to ranks."""

    ranks: int
    blocks: int
    alone: float  # FLOPs of one rank that does everything, in its longest step
    most: float  # of the rank that has most
    average: float
    bound: float  # no rank has more
    received: float  # bytes, by each rank in each step
    factors: float  # bytes, on average

    @property
    def speedup(self) -> float:
        return self.alone / self.most

    @property
    def balance(self) -> float:
        return self.average / self.most


def dealt(optimizer: KroneckerOptimizer, ranks: int) -> Dealt:
    """What the optimizer's own rule comes to, whose unit for roots are decompositions (``EIGH_FLOPS``).

    The bound: a block goes to the rank whose step, with the roots of its turn, is then the shortest, so that no rank is
    above the average by more than one block and its roots, of those dealt out till then.
    """
    blocks = [(shape, sizes) for *_, sizes, shape, count in blocks_of(optimizer) for _ in range(count)]
    interval = optimizer.param_groups[0]["interval"]
    turns = phases([float(sum(d**3 for d in sizes)) for _, sizes in blocks], interval)
    entries = [(*block, (0, turn)) for block, turn in zip(blocks, turns, strict=True)]
    alone, loads, work = Loads(1), Loads(ranks), work_of(optimizer)
    alone.assign(entries)
    loads.assign(entries)
    longest = [[own + turn for own, turn in zip(loads.always, roots, strict=True)] for roots in loads.roots.values()]
    average = max(sum(step) for step in longest) / ranks
    block = max(6.0 * math.prod(shape) * sum(sizes) + EIGH_FLOPS * sum(d**3 for d in sizes) for shape, sizes in blocks)
    return Dealt(
        ranks,
        len(blocks),
        alone=max(alone.always[0] + roots[0] for roots in alone.roots.values()),
        most=max(max(step) for step in longest),
        average=average,
        bound=average + (1 - 1 / ranks) * block,
        received=gathered(work) if ranks > 1 else 0.0,
        factors=work.factors / ranks,
    )
