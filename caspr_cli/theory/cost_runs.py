"""Measured steps of the optimizer, and the blocks of each rank, beside what is predicted from shapes."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from caspr_cli import tasks
from caspr_cli.bench.shapes import layer
from caspr_cli.common.errors import nearest
from caspr_cli.optim.caspr import CASPR
from caspr_cli.optim.cost import called_flops, state_bytes
from caspr_cli.optim.dealing import Loads
from caspr_cli.optim.divide import blocks_of
from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.plan import Plan, plan_key
from caspr_cli.optim.schedule import EIGH_FLOPS
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.tasks.registry import CONFS
from caspr_cli.theory.solvers import least_seconds, product_rate
from caspr_cli.theory.work import FLOAT, Work, seconds, stand_ins, steps_of, work_of
from caspr_cli.training.timing import PhaseTimer

WARM_UP = 2  # steps
COPIED = 2**24  # numbers, more than caches hold
PARTS = ("statistics", "roots", "apply", "rest")
COUNTED = 256  # width of the layer whose products are counted


def rates(size: int) -> tuple[float, float]:
    """Return FLOPs and bytes a second of one thread: of float32 products of ``size`` rows, and of a copy."""
    source, target = torch.randn(COPIED), torch.empty(COPIED)
    target.copy_(source)
    memory = 2.0 * source.nbytes / least_seconds(lambda: target.copy_(source))
    return product_rate(size), memory


def run(width: int, **options: Any) -> dict[str, Any]:
    """Return an average step over one layer, in milliseconds, measured and predicted, as a row.

    Measured are as many steps as an interval has, at least five: each block has new roots once.
    """
    generator = torch.Generator().manual_seed(width)
    matrices = [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in layer(width)]
    for matrix in matrices:
        matrix.grad = torch.randn(matrix.shape, generator=generator)
    optimizer = CASPR(matrices, start_step=1, **options)
    for _ in range(WARM_UP):
        optimizer.step()
    work = work_of(optimizer)
    (group,) = optimizer.param_groups
    expected = seconds(work, *rates(min(width, group["block_size"])))
    optimizer.phase = spent = PhaseTimer(torch.device("cpu"), now=time.process_time)
    steps = max(5, group["interval"])
    start = time.process_time()
    for _ in range(steps):
        optimizer.step()
    total, parts = 1e3 * (time.process_time() - start) / steps, spent.take()
    measured = {name: 1e3 * parts.get(name, 0.0) / steps for name in PARTS[:-1]}
    measured["rest"] = total - sum(measured.values())
    state, predicted = state_bytes(optimizer.state), 1e3 * sum(expected.values())
    row = {"width": width, **options, "parameters": work.parameters, "flops": work.products + work.roots,
           "traffic": work.traffic + work.entries, "bytes": state / work.parameters, "total": total,
           "total_predicted": predicted, "ratio": predicted / total}  # fmt: skip
    for part in PARTS:
        row |= {part: measured[part], f"{part}_predicted": 1e3 * expected[part]}
    return row | {"apply_flops": work.apply, "state": state, "state_predicted": work.state}


def called_products() -> float:
    """Return the FLOPs of the products that a step without a refresh calls, over those of the formula."""
    optimizer = CASPR(stand_ins(layer(COUNTED)), start_step=1, interval=1000)
    optimizer.step()  # has roots to make
    return called_flops(optimizer) / work_of(optimizer).products


@dataclass(frozen=True)
class Model:
    """The cost of a task's model with the published sum, as ``debug=plan`` prints it for ``optim=caspr_sum``."""

    task: str
    parameters: int
    work: Work
    training: float  # FLOPs of forward and backward of a batch
    state: int  # bytes, as steps on the "meta" device make it, of what is preconditioned


def model_of(name: str, batch: int | None) -> Model:
    """Return the cost of a task's model at its sample scale, with the task's own batch where none is given.

    Raises ConfigError for an unknown task.
    """
    if name not in CONFS:
        raise ConfigError(f"--model {name}: no such task.{nearest(name, CONFS)} (choices: {', '.join(CONFS)})")
    conf = CONFS[name]()
    conf.batch_size = batch or conf.batch_size
    task = tasks.load(conf, 0)
    model = task.model()
    plain = task.plain(model)
    optimizer = CASPR(stand_ins([p.shape for n, p in model.named_parameters() if n not in plain]), start_step=1)
    for _ in range(2):  # some only make their state in the first
        optimizer.step()
    parameters = sum(p.numel() for p in model.parameters())
    return Model(name, parameters, work_of(optimizer), task.train_flops(model), state_bytes(optimizer.state))


def divided(optimizer: KroneckerOptimizer, ranks: int) -> dict[str, Any]:
    """Return a row that says how the optimizer divides its blocks among ranks; roots are in units of ``EIGH_FLOPS``.

    Keys:
        most: FLOPs of the rank that has most, in its longest step.
        bound: no rank has more. A block goes to the rank whose step, with the roots of its turn, is then the shortest,
            so that no rank is above the average by more than one block and its roots, of those divided until then.
        speedup: over one rank that does everything; ``balance``: the average over the most.
        received: bytes, by each rank in each step; ``factors``: bytes that a rank keeps, on average.
    """
    (group,), work = optimizer.param_groups, work_of(optimizer)
    blocks = [block for _, block, _ in blocks_of(0, group, Plan.of(group, plan_key(group)))]

    def steps(count: int) -> list[list[float]]:
        loads = Loads(count)
        loads.assign(blocks)
        return steps_of(loads)

    own = steps(ranks)
    most, average = max(map(max, own)), max(map(sum, own)) / ranks
    block = max(
        6.0 * math.prod(shape) * sum(sizes) + EIGH_FLOPS * sum(d**3 for d in sizes) for shape, sizes, _ in blocks
    )
    return {"ranks": ranks, "most": most, "bound": average + (1 - 1 / ranks) * block,
            "speedup": max(map(max, steps(1))) / most, "balance": average / most,
            "received": FLOAT * work.parameters if ranks > 1 else 0.0, "factors": work.factors / ranks}  # fmt: skip
