"""The interface of a task, as the runner uses it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from caspr_cli.optim.groups import grouped, left_to_adamw
from caspr_cli.tasks.errors import DataError
from caspr_cli.tasks.names import SPLITS, Split, split_of

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["SPLITS", "Data", "DataError", "Split", "Task", "split_of"]


class Data(Protocol):
    """The data of one recipe. Nothing is read or built before it is asked for."""

    def check(self) -> None:
        """Read the data, or build what is kept of them on disk. Idempotent, and safe to be killed.

        Raises DataError if they cannot be used.
        """

    def dataset(self, split: Split) -> Dataset[Any]:
        """Return a map-style data set (``len`` and integer index), the same on every rank and in every run.

        Training samples may be augmented with what they draw from torch's global generator; no other generator. A true
        ``reading_costs`` of a data set asks for processes that read ahead.
        """

    def describe(self) -> dict[str, Any]:
        """Return ``name``, ``source``, ``hash`` of the content, ``splits`` with the sizes of each, and what else helps.

        ``splits[split][unit]`` is what the header of a run shows; the whole goes into the record as it is.
        """


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
    data: Data

    def prepare(self) -> None:
        """Build what is cached on disk (tokenizer, token files). Raises as :meth:`Data.check`."""
        self.data.check()

    def dataset(self, split: Split) -> Dataset[Any]:
        """Return the data set of a split, see :meth:`Data.dataset`."""
        return self.data.dataset(split)

    def describe_data(self) -> dict[str, Any]:
        """Return what the record says of the data, see :meth:`Data.describe`."""
        return self.data.describe()

    def collate(self, samples: list[Any]) -> Any:
        """Return a batch of samples: tensors, or what holds tensors and can be moved with ``.to(device)``."""
        return default_collate(samples)

    @abstractmethod
    def model(self) -> nn.Module:
        """Return a new model. Its initial weights depend on torch's global seed alone."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean training loss of a batch, a scalar."""

    @abstractmethod
    def metrics(self) -> Metric:
        """Return an accumulator whose ``compute()`` gives ``{name: scalar}``; it must hold ``loss``.

        Best imported here: torchmetrics takes seconds, and data are checked before.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, batch: Any, metrics: Metric) -> None:
        """Add one validation or test batch to ``metrics``."""

    def plain(self, model: nn.Module) -> dict[str, str]:
        """Return which parameters are left to AdamW, by name, with the reason for each; the others are preconditioned.

        Here: vectors, embeddings and the layers in :attr:`heads`.
        """
        return left_to_adamw(model, self.heads)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the groups of :func:`caspr_cli.optim.groups.grouped`, each with ``precondition``: for an optimizer."""
        return [{"precondition": True} | group for group in grouped(model, self.plain(model))]

    @abstractmethod
    def units(self, batch: Any) -> int:
        """Return how many of :attr:`unit` the batch holds (tokens, graphs, images)."""

    @abstractmethod
    def train_flops(self, model: nn.Module) -> float:
        """Return the FLOPs of forward and backward for one global batch, from the model's shapes (2 a multiply-add)."""
