"""A task of a few lines: your data sets, your model and its measures."""

from __future__ import annotations

import hashlib
import pickle
from abc import abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from caspr_cli.optim.groups import last_linear, left_to_adamw
from caspr_cli.recipe.task import TaskConf
from caspr_cli.tasks.base import SPLITS, DataError, Split, Task

if TYPE_CHECKING:
    from torchmetrics import Metric

HASHED = 1000  # samples of a split, evenly spaced, of whose content the hash of the data is


class SimpleTask(Task):
    """A task of a few lines. A class gives :meth:`datasets`, :meth:`model` and :meth:`measure`, and :attr:`measures`.

    A sample is what ``torch.utils.data.default_collate`` can put into a batch, as a pair of tensors. AdamW takes
    embeddings, norms, biases and the output layer: those that :attr:`heads` names, or else the last ``nn.Linear``.
    """

    #: what :meth:`measure` returns
    measures: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(self, conf: TaskConf, seed: int) -> None:
        self.conf = conf
        self.data = _Given(self)

    @abstractmethod
    def datasets(self) -> Mapping[Split, Dataset[Any]]:
        """Return ``train``, ``validation`` and ``test``, with length and integer index; the same in every process.

        Raises DataError if they cannot be used.
        """

    @abstractmethod
    def measure(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Return the means over a batch by name; ``loss`` is what is trained on."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.measure(model, batch)["loss"]

    def metrics(self) -> Metric:
        from caspr_cli.tasks.metrics import Measures  # slow to import, and not needed to check data

        return Measures(self.measures)

    def evaluate(self, model: nn.Module, batch: Any, metrics: Metric) -> None:
        metrics.update(self.measure(model, batch), self.units(batch))

    def plain(self, model: nn.Module) -> dict[str, str]:
        return left_to_adamw(model, self.heads or last_linear(model))

    def units(self, batch: Any) -> int:
        """Return the number of samples in a batch: the length of its first tensor."""
        while not isinstance(batch, Tensor):
            batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
        return len(batch)

    def train_flops(self, model: nn.Module) -> float:
        """Return three times the FLOPs of the forward pass, as torch counts them for two samples."""
        data = cast(Any, self.dataset("train"))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.measure(deepcopy(model).cpu().eval(), self.collate([data[0], data[len(data) - 1]]))
        return 3 * float(counter.get_total_flops()) * self.conf.batch_size / 2


class _Given:
    """The data of a :class:`SimpleTask`."""

    def __init__(self, task: SimpleTask) -> None:
        self._task = task

    @cached_property
    def _datasets(self) -> Mapping[Split, Dataset[Any]]:
        found = self._task.datasets()
        for split in SPLITS:
            if split not in found or not len(cast(Any, found[split])):
                raise DataError(f"task={self._task.conf.name}: its datasets() have no {split} samples")
        return found

    def check(self) -> None:
        _ = self._datasets

    def dataset(self, split: Split) -> Dataset[Any]:
        return self._datasets[split]

    def describe(self) -> dict[str, Any]:
        """Return sizes, and the hash of up to 1,000 samples of each split."""
        digest = hashlib.sha256()
        for split in SPLITS:
            data = cast(Any, self._datasets[split])
            digest.update(f"{split} {len(data)}".encode())
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # for samples that are drawn when they are read
                for index in range(0, len(data), -(-len(data) // HASHED)):
                    digest.update(_bytes(data[index]))
        name, unit = self._task.conf.name, self._task.unit
        sizes = {split: {unit: len(cast(Any, self._datasets[split]))} for split in SPLITS}
        return {"name": name, "source": self._task.conf.data.name, "hash": digest.hexdigest()[:16], "splits": sizes}


def _bytes(sample: Any) -> bytes:
    """Return the content of a sample, whatever the layout of its tensors."""
    if isinstance(sample, Tensor):
        content = sample.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return f"{sample.dtype}{list(sample.shape)}".encode() + content
    if isinstance(sample, (list, tuple)):
        return b"".join(map(_bytes, sample))
    if isinstance(sample, Mapping):
        return b"".join(str(key).encode() + _bytes(value) for key, value in sample.items())
    return pickle.dumps(sample, protocol=4)
