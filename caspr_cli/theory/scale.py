"""A step on many GPUs, on paper: memory, traffic, balance and time, from shapes and data sheets."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from caspr_cli.bench.baselines import Settings, enter
from caspr_cli.bench.shapes import MODELS
from caspr_cli.optim.cost import products_dtype, step_flops
from caspr_cli.optim.dealing import APPLIED, BUCKET, Block, Loads, deal, group_size, received
from caspr_cli.optim.divide import blocks_of
from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.plan import Plan, plan_key
from caspr_cli.optim.solve import root_flops
from caspr_cli.optim.symmetric import packed_length
from caspr_cli.theory.choices import Assumed
from caspr_cli.theory.work import FLOAT, stand_ins, steps_of, work_of

GPU = torch.device("cuda")
NODE = 8  # GPUs that share what comes over their links, by far faster ones


@dataclass(frozen=True)
class Gpu:
    """A data sheet: rates; and bytes a second that a GPU receives from its node, at most."""

    name: str
    rates: Assumed
    node: float


# NVIDIA's data sheets, of SXM modules without sparsity, in DGX machines: a link of 400 (A100: 200) Gb/s for each GPU.
GPUS = {
    "h100": Gpu("H100 SXM", Assumed(), 450e9),
    "h200": Gpu("H200 SXM", Assumed(memory=4.8), 450e9),
    "a100": Gpu("A100 SXM 80GB", Assumed(float32=19.5, bfloat16=312.0, memory=2.04, network=25.0), 300e9),
}


@dataclass(frozen=True)
class ScaleRow:
    """A step on so many GPUs; of the GPU that has most. In float32, but for the products that an optimizer takes in
    bfloat16, and their roots."""

    gpus: int
    mode: str  # "DDP", or "fully_shard" over all of them
    group: int  # GPUs that share the work
    blocks: int
    balance: float  # FLOPs of the busiest over the average, in the steps of an interval
    factor_bytes: float  # statistics and roots
    state_bytes: float  # with the moments of all parameters
    buffer_bytes: float  # for what travels
    received_bytes: float
    received_ratio: float  # over the bytes of all updates
    compute_seconds: float
    exchange_seconds: float
    dealing_seconds: float  # measured here


def on_paper(model: str, gpus: Sequence[int], sheet: Gpu, name: str, settings: Settings) -> Iterator[ScaleRow]:
    """Yield two rows for each number of GPUs, of a model in ``MODELS`` and an optimizer of the Kronecker family."""
    matrices, rest = MODELS[model]
    optimizer = enter(name, [{"params": stand_ins(matrices), "precondition": True}], settings)
    assert isinstance(optimizer, KroneckerOptimizer)
    (group,), work = optimizer.param_groups, work_of(optimizer)
    known = list(blocks_of(0, group, Plan.of(group, plan_key(group))))
    blocks, sizes = [block for _, block, _ in known], [size for *_, size in known]
    root = root_flops(group, len(blocks[0][1]), GPU)
    low, rates = products_dtype(optimizer, GPU) == torch.bfloat16, sheet.rates
    # FLOPs of products (in float32 without TF32, and in bfloat16) and bytes of memory a second that are reached
    products, low_products, memory = (
        1e12 * rates.efficiency * x for x in (rates.float32, rates.bfloat16, rates.memory)
    )
    applied = step_flops(optimizer, GPU)["apply"] / (low_products if low else products)
    for count in gpus:
        for sharded in (False, True):
            start = time.process_time()
            n = count if sharded else group_size(blocks, sizes, count)
            loads, parts = Loads(n, root), count if sharded else 1
            owners = deal(blocks, sizes, loads)
            dealing = time.process_time() - start
            turns = steps_of(loads)
            busiest = sum(map(max, turns)) / len(turns)
            share = busiest * len(turns) / sum(map(sum, turns))
            factors, most = _kept(blocks, owners, n, torch.bfloat16.itemsize if low else FLOAT)
            taken, buffers = _travels(sizes, owners, n, sharded=sharded)
            # the part of ``loads`` that is application, with two passes in float32, is replaced by what it is
            more = applied - sum(loads.always) * APPLIED / products
            passes = (work.traffic / n + work.entries / parts) / memory
            yield ScaleRow(
                gpus=count,
                mode="fully_shard" if sharded else "DDP",
                group=n,
                blocks=most,
                balance=share * n,
                factor_bytes=factors,
                state_bytes=factors + (2.0 * FLOAT * rest + work.moments) / parts,
                buffer_bytes=buffers,
                received_bytes=taken,
                received_ratio=taken / sum(sizes),
                compute_seconds=busiest / products + share * more + passes,
                exchange_seconds=_exchange(taken, n, sheet, sharded=sharded),
                dealing_seconds=dealing,
            )


def _kept(blocks: Sequence[Block], owners: Sequence[int], ranks: int, of_root: int) -> tuple[float, int]:
    """Return the bytes of statistics and roots of the rank that has most of them, and the most blocks of a rank.

    ``of_root``: bytes of a number of a root.
    """
    held, counts = [0.0] * ranks, [0] * ranks
    for (_, lengths, _), owner in zip(blocks, owners, strict=True):
        held[owner] += sum(FLOAT * (packed_length(d) + d) + of_root * d * d for d in lengths)
        counts[owner] += 1
    return max(held), max(counts)


def _travels(sizes: Sequence[int], owners: Sequence[int], ranks: int, *, sharded: bool) -> tuple[float, float]:
    """Return the bytes that a rank receives in a step, and those of its buffers.

    Of rows, gradients, momenta and updates. Two buckets of inputs and two of updates are sent and received at a time.
    """
    if sharded:
        part = sum(sizes) / ranks
        return 3 * part, 8 * min(part, BUCKET / 4)
    each = received(sizes, owners, ranks)
    return sum(each), sum(sorted(each)[-2:]) * (1 + 1 / ranks)


def _exchange(taken: float, ranks: int, sheet: Gpu, *, sharded: bool) -> float:
    """Return the seconds until so many bytes are here. Links of a node bring once what all of its GPUs receive."""
    if ranks <= NODE:
        return taken / sheet.node
    return max(taken / sheet.node, taken / (1 if sharded else NODE) / (1e9 * sheet.rates.network))
