"""Decoder language models that are too large for this machine: their shapes, and what trains them.

Shapes are those of published models of the Llama family: 1B of TinyLlama (Zhang et al., arXiv:2401.02385), 7B of LLaMA
(Touvron et al., arXiv:2302.13971), 70B of Llama 2 (Touvron et al., arXiv:2307.09288). Embeddings and output heads are
not preconditioned.
"""

from __future__ import annotations

from dataclasses import dataclass

from caspr_cli.theory.work import (
    FLOAT,
    TRAINING,
    Machine,
    Seconds,
    Work,
    exchanged,
    gathered,
    seconds,
    share_of,
    work_of_shapes,
)


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
    def shapes(self) -> list[tuple[int, int]]:
        """Matrices of one layer."""
        attention = [
            (self.width, self.width),
            (self.keys, self.width),
            (self.keys, self.width),
            (self.width, self.width),
        ]
        return [*attention, (self.hidden, self.width), (self.hidden, self.width), (self.width, self.hidden)]

    @property
    def parameters(self) -> int:
        """With embeddings and head, without norms."""
        return self.layers * sum(m * n for m, n in self.shapes) + 2 * self.vocabulary * self.width

    def work(self, **options: object) -> Work:
        """Of CASPR on all layers."""
        return work_of_shapes(list(self.shapes), **options).times(self.layers)


DECODERS = (
    Decoder("1B", width=2048, layers=22, hidden=5632, keys=256),
    Decoder("7B", width=4096, layers=32, hidden=11008, keys=4096),
    Decoder("70B", width=8192, layers=80, hidden=28672, keys=1024),
)
NODE = 8  # GPUs that share what comes over their links, by far faster ones
GPUS = {"1B": (8, 64), "7B": (64, 256), "70B": (256, 1024, 4096)}


@dataclass(frozen=True)
class Assumed:
    """What is assumed of a large training run; see :func:`caspr_cli.theory.cost.answer`."""

    tokens: float
    efficiency: float
    mfu: float
    float32: float
    bfloat16: float
    memory: float
    network: float

    def machine(self) -> Machine:
        """One GPU, at the share of its peaks that the optimizer reaches. Products in float32 use no TF32."""
        return Machine(
            products=1e12 * self.efficiency * self.float32,
            roots=1e12 * self.efficiency * self.float32,
            memory=1e12 * self.efficiency * self.memory,
            low=1e12 * self.efficiency * self.bfloat16,
            network=1e9 * self.network,
            room=80e9,
            newton=True,
        )

    def training(self, parameters: float, gpus: int) -> float:
        """Seconds of forward and backward."""
        return TRAINING * parameters * self.tokens / (gpus * 1e12 * self.bfloat16 * self.mfu)


@dataclass(frozen=True)
class Scaled:
    """A step of a large model."""

    decoder: Decoder
    gpus: int
    mode: str
    variant: str
    training: float  # seconds
    seconds: Seconds
    gigabytes: float  # of weights, gradients and state on one GPU
    fits: bool

    @property
    def share(self) -> float:
        return self.seconds.total / (self.seconds.total + self.training)


VARIANTS: tuple[tuple[str, int, bool], ...] = (
    ("float32, interval 10", 10, False),
    ("bfloat16, interval 100", 100, True),  # roots are applied, and updates sent, in it
)


def scaled(decoder: Decoder, gpus: int, assumed: Assumed) -> list[Scaled]:
    """Under data parallelism, where every rank has all weights and moments and is sent all updates, and under
    ``fully_shard``; with the options of each variant."""
    machine, found = assumed.machine(), []
    for variant, interval, low in VARIANTS:
        whole = decoder.work(interval=interval)
        size = 2 if low else FLOAT
        both = 2.0 * FLOAT * decoder.parameters  # weights and gradients
        plain = 2.0 * FLOAT * (decoder.parameters - whole.parameters)  # AdamW's moments of the rest
        for mode, sent, parts in (
            ("DDP", gathered(whole, size) / NODE, 1),  # the same for all of a node: it comes once
            ("fully_shard", exchanged(whole, gpus, size), gpus),
        ):
            mine = share_of(whole, gpus, divided=parts > 1)
            held = (both + plain) / parts + mine.moments + mine.factors
            found.append(
                Scaled(
                    decoder,
                    gpus,
                    mode,
                    variant,
                    assumed.training(decoder.parameters, gpus),
                    seconds(mine, machine, low=low, sent=sent),
                    held / 1e9,
                    held <= machine.room,
                )
            )
    return found
