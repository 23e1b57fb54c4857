"""What the runner needs to know of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric

Split = Literal["train", "validation", "test"]


class DataError(Exception):
    """What a user can mend: one to three lines that name the key, or the file and line."""


class Task(ABC):
    """A data set, a model for it, a loss, and what is reported. Built as ``Task(conf, seed)``.

    The runner calls, in this order: :meth:`prepare` (one process of a machine), :meth:`dataset`,
    :meth:`model`, then :meth:`loss` for each training batch and :meth:`evaluate` for each validation
    or test batch. Batches are what the default collate function of torch makes of the samples.
    """

    #: what one sample is counted in, for "tokens a second" and the like
    unit: ClassVar[str] = "samples"

    @abstractmethod
    def prepare(self) -> None:
        """Build what is cached on disk (tokenizer, token files). Idempotent; safe to be killed."""

    @abstractmethod
    def dataset(self, split: Split) -> Dataset[Any]:
        """A map-style data set (``len`` and integer index), the same on every rank and every run."""

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

    @abstractmethod
    def preconditioned(self, model: nn.Module) -> set[str]:
        """Names, as in ``model.named_parameters()``, of what is to be preconditioned; AdamW takes the rest."""

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
