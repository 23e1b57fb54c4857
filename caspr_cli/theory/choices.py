"""The flags of ``caspr-verify``, each written once: its type, default and help. No torch."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from caspr_cli.common import plugins
from caspr_cli.common.errors import positive
from caspr_cli.tasks.registry import TASKS

OURS = [name for name in TASKS if plugins.package(plugins.TASKS, name) is None]  # tasks with small models to record


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"should be 0, 1, 2, ... but is {text}")
    return int(text)


def flag(default: Any, text: str, kind: Callable[[str], Any] = float, metavar: str | None = "N", **more: Any) -> Any:
    """Return a field that is a flag of the command line; ``more`` goes to argparse."""
    return field(default=default, metadata={"help": text, "type": kind, "metavar": metavar, **more})


@dataclass(frozen=True)
class Choice:
    """The options of every question."""

    quick: bool = False  # less of everything: seconds
    seed: int = flag(0, "the first seed", natural)


@dataclass(frozen=True)
class Seeds(Choice):
    """The options of a question about random problems."""

    seeds: int = flag(3, "number of seeds, for bands", positive)

    @property
    def all_seeds(self) -> range:
        return range(self.seed, self.seed + (1 if self.quick else self.seeds))


@dataclass(frozen=True)
class Layers(Seeds):
    """The options of a question about recorded gradients."""

    task: str | None = flag(None, f"gradients of this task alone: {', '.join(OURS)}", str, "NAME")
    parameter: str | None = flag(None, "layers whose names contain this, of at most 1,024 numbers", str, "TEXT")
    optim: str = flag(
        "caspr_sum", "the optimizer that trains: caspr_sum or adamw", str, "NAME", choices=("caspr_sum", "adamw")
    )


@dataclass(frozen=True)
class Assumed:
    """Assumptions about a large training run.

    Source of the GPU's rates: the data sheets of NVIDIA's H100 SXM, without sparsity, and of the DGX H100, which has a
    link of 400 Gb/s for each of its eight.
    """

    tokens: float = flag(4e6, "tokens in a step of the large models")
    efficiency: float = flag(0.7, "fraction of a GPU's peak rates that the optimizer reaches")
    mfu: float = flag(0.4, "fraction of a GPU's bfloat16 peak that training reaches")
    float32: float = flag(67.0, "TFLOP/s of a GPU; this and the next three: an H100's data sheet")
    bfloat16: float = flag(989.0, "TFLOP/s of a GPU")
    memory: float = flag(3.35, "TB/s of a GPU's memory")
    network: float = flag(50.0, "GB/s of a GPU's link to other nodes")


@dataclass(frozen=True)
class Costs(Assumed, Choice):
    """The options of the question about costs; a seed changes none of its numbers."""

    model: str = flag("c4_lm", "the task whose model is costed, at its sample scale", str, "NAME")
    batch: int | None = flag(None, "samples in a step of that model (default: as in the task)", positive)
