"""The recipe: every key that a run can be given, with its type, default and meaning.

Plain dataclasses; importing this module imports no torch. Hydra checks YAML and command line against them,
and the worker gets the frozen result as one :class:`Recipe`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Source(Enum):
    """Where a task's data come from."""

    sample = "sample"  # bundled, nothing to download
    files = "files"  # local files under task.root
    hub = "hub"  # the real data set, fetched by `datasets`


@dataclass
class Target:
    """The value of a metric that counts as reached; steps and seconds to it are reported."""

    metric: str = "val/loss"
    value: float | None = None


@dataclass
class TaskConf:
    """What every task has; each task adds its own keys."""

    name: str = MISSING
    data: Source = Source.sample
    root: str | None = None  # directory of the data, for task.data=files
    batch_size: int = 32  # samples in one optimizer step, over all ranks and accumulation
    target: Target = field(default_factory=Target)


@dataclass
class C4LMConf(TaskConf):
    """A decoder-only transformer language model on English text."""

    name: str = "c4_lm"
    vocab_size: int = 2048  # size of the byte-level BPE, trained on the training split
    sequence: int = 128  # tokens a sample
    layers: int = 4
    width: int = 128
    heads: int = 4
    dropout: float = 0.0
    train_documents: int | None = None  # use only the first so many documents (required for task.data=hub)
    eval_documents: int | None = None  # the same for validation and for test, each
