"""What the runner needs to know of a task."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset, default_collate
from torchmetrics import Metric

from tasks.errors import DataError

__all__ = ["SPLITS", "DataError", "Split", "Task", "place_of"]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def place_of(name: str) -> float:
    """A number in [0, 1) that hangs on the name alone: deals out what has no split of its own."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


class Task(ABC):
    """A data set, a model for it, a loss, and what is reported. Built as ``Task(conf, seed)``.

    The runner calls, in this order: :meth:`prepare` (every process, perhaps at once), :meth:`dataset`,
    :meth:`model`, then :meth:`loss` for each training batch and :meth:`evaluate` for each validation
    or test batch. What :meth:`loss` draws from torch's global generator (dropout, augmentation of a batch) is a
    function of (seed, step, part, rank), and what a training sample draws when it is read is one of (seed, epoch,
    index): no random state has to be saved, and a resumed run goes on bit for bit.
    """

    #: what one sample is counted in, for "tokens a second" and the like
    unit: ClassVar[str] = "samples"
    #: modules of the model that are output layers, by name
    heads: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def prepare(self) -> None:
        """Build what is cached on disk (tokenizer, token files). Idempotent; safe to be killed."""

    @abstractmethod
    def dataset(self, split: Split) -> Dataset[Any]:
        """A map-style data set (``len`` and integer index), the same on every rank and every run.

        Training samples may be augmented with what they draw from torch's global generator; no other generator.
        """

    def collate(self, samples: list[Any]) -> Any:
        """A batch from samples: tensors, or what holds tensors and can be moved with ``.to(device)``."""
        return default_collate(samples)

    @abstractmethod
    def model(self) -> nn.Module:
        """A freshly initialised model. Its initial weights depend on torch's global seed alone."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean training loss of a batch, a scalar."""

    @abstractmethod
    def metrics(self) -> Metric:
        """An accumulator whose ``compute()`` gives ``{name: scalar}``; it must hold ``loss``."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batch: Any, metrics: Metric) -> None:
        """Add one validation or test batch to ``metrics``."""

    def plain(self, model: nn.Module) -> dict[str, str]:
        """Names, as in ``model.named_parameters()``, of what is left to AdamW, with the reason for each.

        Everything else is preconditioned. Here: vectors, embeddings and the layers in :attr:`heads`.
        """
        found = {}
        for prefix, module in model.named_modules():
            head = any(prefix == name or prefix.startswith(f"{name}.") for name in self.heads)
            for name, p in module.named_parameters(prefix, recurse=False):
                if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _BatchNorm)):
                    found[name] = "norm"
                elif p.ndim < 2:
                    found[name] = "bias" if name.endswith("bias") else "vector"
                elif isinstance(module, nn.Embedding):
                    found[name] = "embedding"  # a batch sees few of its rows
                elif head:
                    found[name] = "head"
        return found

    @abstractmethod
    def units(self, batch: Any) -> int:
        """How many of :attr:`unit` the batch holds (tokens, graphs, images)."""

    @abstractmethod
    def train_flops(self, model: nn.Module) -> float:
        """FLOPs of forward and backward for one global batch (2 per multiply-add), from the model's shapes."""

    @abstractmethod
    def describe_data(self) -> dict[str, Any]:
        """Which data these are: ``name``, ``source``, ``hash`` of their content, and ``splits`` with sizes of each.

        ``splits[split][unit]`` is what the header of a run shows; it goes into the record as it is.
        """
