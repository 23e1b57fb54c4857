"""The keys that every task has, in a module of their own, so that a package with a task can import them."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Source(Enum):
    """Where a task's data come from."""

    sample = "sample"  # bundled, nothing to download
    files = "files"  # local files under task.root
    hub = "hub"  # the real data set, fetched by `datasets` or torchvision


@dataclass
class Target:
    """The value of a metric that counts as reached; steps and seconds to it are reported."""

    metric: str = "val/loss"
    value: float | None = None
    higher_is_better: bool = False


@dataclass
class TaskConf:
    """The keys of every task; each task adds its own."""

    name: str = MISSING
    data: Source = Source.sample
    root: str | None = None  # directory of the data, for task.data=files
    batch_size: int = 32  # samples in one optimizer step, over all ranks and accumulation
    target: Target = field(default_factory=Target)
