r"""The work of a step of the optimizer, from shapes alone: FLOPs, bytes, and the time on a given machine.

For a block of m x n, on average over steps (:mod:`caspr_cli.optim.cost` has the FLOPs), with t_d = packed_length(d) /
d, at most d, for the panels of one triangle:

    statistics   2 m n (t_m + t_n)
    application  2 q m n (m + n); once for a product
    roots        c (m^3 + n^3) / interval: c = 25 for an eigendecomposition on a CPU (in units of products), and for
                 Newton on a GPU 2 (steps) (products a step), which is 72 for p = 4 and eps = 1e-6
    traffic      4 bytes times: 2 (m t_m + n t_n) for statistics and q (m^2 + n^2) for roots
    entries      4 bytes times PASSES m n, for all that is done entry by entry (moments, graft, scaling, weights)
    state        4 bytes times: 2 m n for the moments, m t_m + n t_n for statistics, m^2 + n^2 for roots, and m + n
                 for what is remembered of the statistics that roots were computed from

With blocks of b x b a step costs about 12 b FLOPs a parameter (q = 2) and its roots, whatever the size of the model,
against 6 for each token of a batch in training. What grows with the model and the number of devices, relative to
training, is what is sent. A step takes the sum of these, each at the rate of its machine; nothing overlaps.

Decoders that are too large for this machine have the shapes of published models of the Llama family: 1B of TinyLlama
(Zhang et al., arXiv:2401.02385), 7B of LLaMA (Touvron et al., arXiv:2302.13971), 70B of Llama 2 (Touvron et al.,
arXiv:2307.09288). Embeddings and output heads are not preconditioned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from caspr_cli.bench.shapes import Shape, gated_layer
from caspr_cli.bench.workload import TRAINING_FLOPS
from caspr_cli.optim.blocks import is_vector
from caspr_cli.optim.caspr import CASPR
from caspr_cli.optim.cost import blocks_of, passes, step_flops
from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.solve import root_flops
from caspr_cli.optim.symmetric import packed_length
from caspr_cli.theory.choices import Assumed

PASSES = 16  # of reading or writing a number for each weight, counted in the engine, without what stays in a cache
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Work:
    """The FLOPs and bytes of an average step."""

    parameters: float  # that are preconditioned
    statistics: float
    apply: float
    roots: float  # by eigendecomposition, in units of products
    newton: float  # by Newton's iteration, as on a GPU
    traffic: float  # bytes of statistics and roots that pass through memory
    entries: float  # and of what is a number a weight
    moments: float  # bytes of state that are where the weights are
    factors: float  # bytes of statistics and roots, which are with a block's owner
    largest: float  # FLOPs of one block, the largest, in a step that refreshes its roots by Newton
    largest_factors: float  # bytes of its statistics and roots

    def times(self, count: float) -> Work:
        """Return as many of the same; the largest block stays what it is."""
        many = Work(**{f.name: count * getattr(self, f.name) for f in fields(Work)})
        return replace(many, largest=self.largest, largest_factors=self.largest_factors)

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
        by_newton = group | {"solver": "newton", "measured": 0.0}
        own = root_flops(by_newton, len(sizes), torch.device("cuda")) * sum(d**3 for d in sizes) if sizes else 0.0
        held = FLOAT * float(packed + full + (0 if is_vector(shape) else sum(sizes)))
        found["parameters"] += count * m_n
        found["newton"] += count * own / group["interval"]
        found["traffic"] += FLOAT * count * (2 * packed + q * full)
        found["factors"] += count * held
        found["largest"] = max(found["largest"], own + 2.0 * m_n * (1 + q) * sum(sizes))
        found["largest_factors"] = max(found["largest_factors"], held)
    found["entries"] = float(FLOAT) * PASSES * found["parameters"]
    found["moments"] = 2.0 * FLOAT * found["parameters"]
    return Work(**found)


def stand_ins(shapes: Sequence[Sequence[int]] | Sequence[Tensor]) -> list[nn.Parameter]:
    """Return parameters of these shapes, or those of these tensors, on the "meta" device, with gradients."""
    made = []
    for shape in shapes:
        made.append(nn.Parameter(torch.empty(shape.shape if isinstance(shape, Tensor) else shape, device="meta")))
        made[-1].grad = torch.empty_like(made[-1])
    return made


def work_of_shapes(shapes: Sequence[Sequence[int]], **options: object) -> Work:
    """Return the work of CASPR over matrices of these shapes."""
    return work_of(CASPR(stand_ins(shapes), **options))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Machine:
    """The rates of a device, for a second.

    Args:
        products: FLOPs of products in float32.
        roots: FLOPs of what roots are made of, in their own unit: products of eigendecompositions, or Newton's.
        memory: bytes that are read or written.
        low: FLOPs of products in bfloat16.
        network: bytes that a rank receives over its own link.
        capacity: bytes of memory.
        newton: whether roots are made by Newton's iteration.
    """

    products: float
    roots: float
    memory: float
    low: float = math.nan
    network: float = math.inf
    capacity: float = math.inf
    newton: bool = False


def seconds(work: Work, machine: Machine, *, low: bool = False, sent: float = 0.0) -> dict[str, float]:
    """Return the seconds of an average step, by part.

    Args:
        low: whether roots are applied in bfloat16.
        sent: bytes that come over this rank's link.
    """
    return {
        "statistics": work.statistics / machine.products,
        "roots": (work.newton if machine.newton else work.roots) / machine.roots,
        "apply": work.apply / (machine.low if low else machine.products),
        "traffic": (work.traffic + work.entries) / machine.memory,
        "communication": sent / machine.network,
    }


# ---- many ranks --------------------------------------------------------------------------------------------------


def share_of(work: Work, ranks: int, *, divided: bool) -> Work:
    """Return the most that a rank has to do and to keep: its part, and at most one block more, refreshed in this step.

    The longest block goes first, each to the rank with the least work (Graham, SIAM J. Appl. Math. 17, 1969).

    Args:
        divided: whether weights and moments are, as under ``fully_shard``; else each rank has all of them.
    """
    part, more = work.times(1 / ranks), 1 - 1 / ranks
    if not divided:
        part = replace(part, entries=work.entries, moments=work.moments)
    grown = 1 + more * work.largest / (part.products + part.newton)
    scaled = {name: getattr(part, name) * grown for name in ("statistics", "apply", "roots", "newton")}
    return replace(part, **scaled, factors=part.factors + more * work.largest_factors)


def gathered(work: Work, size: int = FLOAT) -> float:
    """Return the bytes that each rank receives under data parallelism: all updates."""
    return size * work.parameters


def exchanged(work: Work, ranks: int, size: int = FLOAT) -> float:
    """Return the bytes that each rank receives under ``fully_shard``, without those that it has itself.

    These are the gradient and the momentum of its blocks, and the update of its rows.
    """
    return 3 * size * work.parameters / ranks * (1 - 1 / ranks)


# ---- decoders ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoder:
    """Pre-norm layers of grouped-query attention and a gated MLP, without biases."""

    name: str
    width: int
    layers: int
    hidden: int  # of the MLP
    keys: int  # columns of keys, and of values: width unless heads share them
    vocabulary: int = 32000

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Return the matrices of one layer."""
        return gated_layer(self.width, self.hidden, self.keys)

    @property
    def parameters(self) -> int:
        """Return the parameters with embeddings and head, without norms."""
        return self.layers * sum(m * n for m, n in self.shapes) + 2 * self.vocabulary * self.width

    def work(self, **options: object) -> Work:
        """Return the work of CASPR on all layers."""
        return work_of_shapes(self.shapes, **options).times(self.layers)


DECODERS = (
    Decoder("1B", width=2048, layers=22, hidden=5632, keys=256),
    Decoder("7B", width=4096, layers=32, hidden=11008, keys=4096),
    Decoder("70B", width=8192, layers=80, hidden=28672, keys=1024),
)
NODE = 8  # GPUs that share what comes over their links, by far faster ones
GPUS = {"1B": (8, 64), "7B": (64, 256), "70B": (256, 1024, 4096)}


def gpu(assumed: Assumed) -> Machine:
    """Return one GPU, at the share of its peaks that the optimizer reaches. Products in float32 use no TF32."""
    peaks = (assumed.float32, assumed.bfloat16, assumed.memory)
    float32, low, memory = (1e12 * assumed.efficiency * peak for peak in peaks)
    return Machine(float32, float32, memory, low, network=1e9 * assumed.network, capacity=80e9, newton=True)


def training_seconds(assumed: Assumed, parameters: float, gpus: int) -> float:
    """Return the seconds of forward and backward of a step."""
    return TRAINING_FLOPS * parameters * assumed.tokens / (gpus * 1e12 * assumed.bfloat16 * assumed.mfu)


VARIANTS: tuple[tuple[str, int, bool], ...] = (
    ("float32, interval 10", 10, False),
    ("bfloat16, interval 100", 100, True),  # roots are applied, and updates sent, in it
)


def scaled(decoder: Decoder, gpus: int, assumed: Assumed) -> Iterator[dict[str, Any]]:
    """Yield a step for each variant, under data parallelism and under ``fully_shard``; seconds by part have an ``s_``.

    Under data parallelism every rank has all weights and moments and receives all updates.
    """
    machine, training = gpu(assumed), training_seconds(assumed, decoder.parameters, gpus)
    for variant, interval, low in VARIANTS:
        whole, size = decoder.work(interval=interval), 2 if low else FLOAT
        # Weights and gradients, and AdamW's moments of what is not preconditioned.
        plain = 2.0 * FLOAT * (2 * decoder.parameters - whole.parameters)
        for mode, sent, parts in (
            ("DDP", gathered(whole, size) / NODE, 1),  # the same for all of a node: it comes once
            ("fully_shard", exchanged(whole, gpus, size), gpus),
        ):
            mine = share_of(whole, gpus, divided=parts > 1)
            held, spent = plain / parts + mine.state, seconds(mine, machine, low=low, sent=sent)
            total = sum(spent.values())
            yield {"model": decoder.name, "gpus": gpus, "mode": mode, "variant": variant, "training": training,
                   "total": total, "share": total / (total + training), "gigabytes": held / 1e9,
                   "fits": "yes" if held <= machine.capacity else "no",
                   **{f"s_{part}": value for part, value in spent.items()}}  # fmt: skip
