r"""The work of a step of the optimizer, from shapes alone: FLOPs, bytes, and the time on a given machine.

For a block of m x n, on average over steps (:mod:`caspr_cli.optim.cost` has the FLOPs), with t_d = packed_length(d) /
d, at most d, for the panels of one triangle:

    statistics   2 m n (t_m + t_n)
    application  2 q m n (m + n); once for a product
    roots        c (m^3 + n^3) / interval: c = 25 for an eigendecomposition on a CPU (in units of products)
    traffic      4 bytes times: 2 (m t_m + n t_n) for statistics and q (m^2 + n^2) for roots
    entries      4 bytes times PASSES m n, for all that is done entry by entry (moments, graft, scaling, weights)
    state        4 bytes times: 2 m n for the moments (m n where all updates have one length), m t_m + n t_n for
                 statistics, m^2 + n^2 for roots, and m + n for what is remembered of the statistics that roots were
                 computed from

With blocks of b x b a step costs about 12 b FLOPs a parameter (q = 2) and its roots, whatever the size of the model,
against 6 for each token of a batch in training. What grows with the model and the number of devices, relative to
training, is what is sent (:mod:`caspr_cli.theory.scale`). A step takes the sum of these, each at the rate of its
machine; nothing overlaps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn

from caspr_cli.optim.blocks import is_vector
from caspr_cli.optim.cost import blocks_of, passes, step_flops
from caspr_cli.optim.dealing import Loads
from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.graft import graft_of, needs_second_moment
from caspr_cli.optim.symmetric import packed_length

PASSES = 16  # of reading or writing a number for each weight, counted in the engine, without what stays in a cache
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Work:
    """The FLOPs and bytes of an average step."""

    parameters: float  # that are preconditioned
    statistics: float
    apply: float
    roots: float  # by eigendecomposition, in units of products
    traffic: float  # bytes of statistics and roots that pass through memory
    entries: float  # and of what is a number a weight
    moments: float  # bytes of state that are where the weights are
    factors: float  # bytes of statistics and roots, which are with a block's owner

    @property
    def products(self) -> float:
        return self.statistics + self.apply

    @property
    def state(self) -> float:
        return self.moments + self.factors


def work_of(optimizer: KroneckerOptimizer) -> Work:
    """Return the work of an optimizer, on any device, with factors and moments in float32."""
    found = dict.fromkeys((f.name for f in fields(Work)), 0.0) | step_flops(optimizer)
    for group, _, sizes, shape, count in blocks_of(optimizer):
        m_n, q = math.prod(shape), passes(group, len(sizes))
        packed, full = sum(map(packed_length, sizes)), sum(d * d for d in sizes)
        found["parameters"] += count * m_n
        found["traffic"] += FLOAT * count * (2 * packed + q * full)
        second = needs_second_moment(graft_of(group, preconditioned=True)) + (group["measured"] > 0)
        found["moments"] += FLOAT * count * m_n * (1 + second)
        found["factors"] += FLOAT * count * (packed + full + (0 if is_vector(shape) else sum(sizes)))
    found["entries"] = float(FLOAT) * PASSES * found["parameters"]
    return Work(**found)


def stand_ins(shapes: Sequence[Sequence[int]]) -> list[nn.Parameter]:
    """Return parameters of these shapes on the "meta" device, with gradients."""
    made = [nn.Parameter(torch.empty(tuple(shape), device="meta")) for shape in shapes]
    for p in made:
        p.grad = torch.empty_like(p)
    return made


def steps_of(loads: Loads) -> list[list[float]]:
    """Return the FLOPs of each rank in a step of each turn of roots."""
    return [[own + turn for own, turn in zip(loads.always, roots, strict=True)] for roots in loads.roots.values()]


def seconds(work: Work, products: float, memory: float) -> dict[str, float]:
    """Return the seconds of an average step by part, at these FLOPs of products and bytes of memory a second."""
    return {
        "statistics": work.statistics / products,
        "roots": work.roots / products,
        "apply": work.apply / products,
        "rest": (work.traffic + work.entries) / memory,
    }
