r"""What a step of the optimizer does, from shapes alone: FLOPs, bytes, and how long they take on a given machine.

For a block of m x n, on average over steps (:mod:`caspr_cli.optim.cost` has the FLOPs), with t_d = packed_length(d) /
d, at most d, for the panels of one triangle:

    statistics   2 m n (t_m + t_n)
    application  2 q m n (m + n); once for a product
    roots        c (m^3 + n^3) / interval: c = 25 for an eigendecomposition on a CPU (in units of products), and for
                 Newton on a GPU 2 (steps) (products a step), which is 160 or so
    traffic      4 bytes times: 2 (m t_m + n t_n) for statistics and q (m^2 + n^2) for roots
    entries      4 bytes times PASSES m n, for all that is done entry by entry (moments, graft, scaling, weights)
    state        4 bytes times: 2 m n for the moments, m t_m + n t_n for statistics, m^2 + n^2 for roots, and m + n
                 for what is remembered of the statistics that roots were computed from

With blocks of b x b a step costs about 12 b FLOPs a parameter (q = 2) and its roots, whatever the size of the model,
against 6 for each token of a batch in training. What grows with the model and the number of devices, relative to
training, is what is sent.

A step takes the sum of these, each at the rate of its machine: nothing is assumed to overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch

from caspr_cli.optim.blocks import is_vector
from caspr_cli.optim.caspr import CASPR
from caspr_cli.optim.combine import root_exponent
from caspr_cli.optim.cost import blocks_of, passes, step_flops
from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.roots import newton_steps
from caspr_cli.optim.symmetric import packed_length
from caspr_cli.theory.solving import newton_products

PASSES = 16  # of reading or writing a number for each weight, counted in the engine, without what stays in a cache
FLOAT = 4  # bytes
OF_ONE_BLOCK = ("largest", "largest_factors")
TRAINING = 6  # FLOPs for each parameter and token: two products forward, four backward


@dataclass(frozen=True)
class Work:
    """Of an average step; FLOPs and bytes."""

    parameters: float  # that are preconditioned
    statistics: float
    apply: float
    roots: float  # by eigendecomposition, in units of products
    newton: float  # by Newton's iteration
    traffic: float  # bytes of statistics and roots that pass through memory
    entries: float  # and of what is a number a weight
    moments: float  # bytes of state that are where the weights are
    factors: float  # bytes of statistics and roots, which are with a block's owner
    largest: float  # FLOPs of one block, the largest, in a step that refreshes its roots by Newton
    largest_factors: float  # bytes of its statistics and roots

    def times(self, count: float) -> Work:
        """As many of the same."""
        products = {f.name: count * getattr(self, f.name) for f in fields(Work)}
        return Work(**products | {name: getattr(self, name) for name in OF_ONE_BLOCK})

    @property
    def products(self) -> float:
        return self.statistics + self.apply

    @property
    def state(self) -> float:
        return self.moments + self.factors


def work_of(optimizer: KroneckerOptimizer) -> Work:
    """Of an optimizer, on any device ("meta" holds no numbers), with factors and moments in float32."""
    flops = step_flops(optimizer)
    parameters = newton = traffic = factors = largest = largest_factors = 0.0
    for group, _, sizes, shape, count in blocks_of(optimizer):
        m_n, q = math.prod(shape), passes(group["order"], len(sizes))
        packed, full = sum(map(packed_length, sizes)), sum(d * d for d in sizes)
        p = root_exponent(group["order"], len(sizes), group["exponent"])
        condition = 1 + 1 / group["eps"] if group["damping"] == "relative" else math.inf
        own = 2.0 * newton_steps(condition, p) * newton_products(p) * sum(d**3 for d in sizes)
        parameters += count * m_n
        newton += count * own / group["interval"]
        traffic += FLOAT * count * (2 * packed / group["statistics_interval"] + q * full)
        held = FLOAT * float(packed + full + (0 if is_vector(shape) else sum(sizes)))
        factors += count * held
        largest = max(largest, own + 2.0 * m_n * (1 + q) * sum(sizes))
        largest_factors = max(largest_factors, held)
    return Work(
        parameters=parameters,
        statistics=flops["statistics"],
        apply=flops["apply"],
        roots=flops["roots"],
        newton=newton,
        traffic=traffic,
        entries=float(FLOAT) * PASSES * parameters,
        moments=2.0 * FLOAT * parameters,
        factors=factors,
        largest=largest,
        largest_factors=largest_factors,
    )


def work_of_shapes(shapes: list[tuple[int, ...]], **options: object) -> Work:
    """Of CASPR over matrices of these shapes."""
    matrices = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    return work_of(CASPR(matrices, **options))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Machine:
    """What a device does in a second.

    Args:
        products: FLOPs of products in float32.
        roots: FLOPs of what roots are made of, in their own unit: products of eigendecompositions, or Newton's.
        memory: bytes that are read or written.
        low: FLOPs of products in bfloat16.
        network: bytes that a rank receives over its own link.
        room: bytes of memory.
        newton: whether roots are made by Newton's iteration.
    """

    products: float
    roots: float
    memory: float
    low: float = math.nan
    network: float = math.inf
    room: float = math.inf
    newton: bool = False


@dataclass(frozen=True)
class Seconds:
    """Of an average step, by part."""

    statistics: float
    roots: float
    apply: float
    traffic: float
    communication: float = 0.0

    @property
    def total(self) -> float:
        return self.statistics + self.roots + self.apply + self.traffic + self.communication


def seconds(work: Work, machine: Machine, *, low: bool = False, sent: float = 0.0) -> Seconds:
    """How long a step takes.

    Args:
        low: whether roots are applied in bfloat16.
        sent: bytes that come over this rank's link.
    """
    return Seconds(
        work.statistics / machine.products,
        (work.newton if machine.newton else work.roots) / machine.roots,
        work.apply / (machine.low if low else machine.products),
        (work.traffic + work.entries) / machine.memory,
        sent / machine.network,
    )


# ---- many ranks --------------------------------------------------------------------------------------------------


def share_of(work: Work, ranks: int, *, divided: bool) -> Work:
    """The most that a rank has to do and to keep: its part, and at most one block more, refreshed in this step (the
    longest first, each to who has least: Graham, SIAM J. Appl. Math. 17, 1969).

    Args:
        divided: whether weights and moments are, as under ``fully_shard``; else each rank has all of them.
    """
    part, more = work.times(1 / ranks), 1 - 1 / ranks
    if not divided:
        part = replace(part, entries=work.entries, moments=work.moments)
    grown = 1 + more * work.largest / (part.products + part.newton)
    return replace(
        part,
        statistics=part.statistics * grown,
        apply=part.apply * grown,
        roots=part.roots * grown,
        newton=part.newton * grown,
        factors=part.factors + more * work.largest_factors,
    )


def gathered(work: Work, size: int = FLOAT) -> float:
    """Bytes that each rank receives under data parallelism: all updates."""
    return size * work.parameters


def exchanged(work: Work, ranks: int, size: int = FLOAT) -> float:
    """Bytes that each rank receives under ``fully_shard``: of its blocks the gradient and the momentum, of its rows the
    update; nothing of what it has itself."""
    return 3 * size * work.parameters / ranks * (1 - 1 / ranks)
