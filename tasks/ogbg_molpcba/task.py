"""Many yes-or-no questions about a molecule: mean average precision over those that a split answers both ways."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Batch
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_average_precision

from caspr_cli.recipe.schema import MolPCBAConf
from tasks.base import DataError, Split, Task
from tasks.ogbg_molpcba.data import Graph, GraphSet, Library, batch_of
from tasks.ogbg_molpcba.graphs import MISSING
from tasks.ogbg_molpcba.model import GraphNetwork


class MeanAveragePrecision(Metric):
    """Cross entropy and average precision over all graphs seen, whatever the batches they came in.

    ``compute()`` gives ``loss`` (nats an observed cell) and ``map``: average precision (the sum of precision times
    gain in recall, as scikit-learn and OGB have it) of each label's observed cells, averaged over the labels that
    have both classes. It is NaN where none has; a data set of which that is true of a split is refused when it is
    prepared.

    Args:
        tasks: labels of a graph (``T``).
    """

    full_state_update = False
    nats: Tensor
    cells: Tensor
    logits: list[Tensor] | Tensor
    labels: list[Tensor] | Tensor

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self._tasks = tasks
        for state in ("nats", "cells"):
            # float64: a float32 sum stops counting single cells at 2^24
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for state in ("logits", "labels"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add ``logits`` ``[B, T]`` and ``labels`` ``[B, T]``, 0, 1 or MISSING."""
        nats, cells = cross_entropy(logits, labels)
        self.nats += nats.double()
        self.cells += cells
        self.logits.append(logits.detach().float())  # type: ignore[union-attr]
        self.labels.append(labels)  # type: ignore[union-attr]

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name."""
        loss = self.nats / self.cells
        logits, labels = self._whole(self.logits), self._whole(self.labels)
        scores = [average_precision(logits[:, t], labels[:, t]) for t in range(self._tasks)]
        found = [score for score in scores if score is not None]
        return {"loss": loss, "map": torch.stack(found).mean() if found else torch.full_like(loss, torch.nan)}

    def _whole(self, parts: list[Tensor] | Tensor) -> Tensor:
        """One tensor of the batches, which is what torchmetrics has made of them already where there are ranks."""
        if isinstance(parts, Tensor):
            return parts
        return torch.cat(parts) if parts else torch.empty(0, self._tasks)


def average_precision(logits: Tensor, labels: Tensor) -> Tensor | None:
    """Of one label's ``logits`` ``[n]`` and values ``[n]``; None where the observed ones are not of both classes."""
    observed = labels != MISSING
    logits, truth = logits[observed], labels[observed].long()
    positive = truth.sum()
    if positive == 0 or positive == len(truth):
        return None
    # By rank, in [0, 1]: torchmetrics puts what is outside through a sigmoid, where large logits become equal.
    ranks = logits.unique(return_inverse=True)[1].double()
    return binary_average_precision(ranks / ranks.max().clamp(min=1), truth)


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the observed cells, in nats, and how many there are."""
    observed = labels != MISSING
    losses = F.binary_cross_entropy_with_logits(logits.float(), labels.clamp(min=0).float(), reduction="none")
    return (losses * observed).sum(), observed.sum()


class MolPCBA(Task):
    """A graph network on molecules: a sample of measured properties, an OGB data set on disk, or ogbg-molpcba.

    Batches are those of :func:`tasks.ogbg_molpcba.data.batch_of`.

    Raises:
        DataError: a shape that no model has.
    """

    unit: ClassVar[str] = "graphs"
    heads: ClassVar[tuple[str, ...]] = ("decoder",)

    def __init__(self, conf: MolPCBAConf, seed: int) -> None:
        # ``seed`` is every task's second argument; here the splits are the data's own, and nothing is drawn.
        _check(conf)
        self.conf = conf
        self._library = Library(conf)

    def prepare(self) -> None:
        """Build the arrays of the graphs, or find them in the cache."""
        self._library.check()

    def dataset(self, split: Split) -> GraphSet:
        """The graphs of a split."""
        return self._library.graphs(split)

    def collate(self, samples: list[Graph]) -> Batch:
        """See :func:`tasks.ogbg_molpcba.data.batch_of`."""
        return batch_of(samples)

    def model(self) -> GraphNetwork:
        """A fresh graph network, with an output for each label of the data."""
        return GraphNetwork(self._library.tasks, self.conf.width, self.conf.steps, self.conf.dropout)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy over the observed cells of the batch, in nats; 0 where none was observed.

        A batch that is dealt out to ranks or to several passes is averaged over these parts, each with its own number
        of cells: a cell in a part with few weighs a little more.
        """
        nats, cells = cross_entropy(model(batch), batch.y)
        return nats / cells.clamp(min=1)

    def metrics(self) -> MeanAveragePrecision:
        """An empty :class:`MeanAveragePrecision`."""
        return MeanAveragePrecision(self._library.tasks)

    def evaluate(self, model: nn.Module, batch: Batch, metrics: Metric) -> None:
        """Add a batch to ``metrics``."""
        metrics.update(model(batch), batch.y)

    def units(self, batch: Batch) -> int:
        """Graphs in a batch."""
        return int(batch.num_graphs)

    def train_flops(self, model: nn.Module) -> float:
        """FLOPs of one global batch of graphs of the training split's mean size: the matrix products, 2 a multiply-add.

        The backward pass is twice the forward pass, but once for the embeddings: features need no gradient.
        """
        nodes, edges = self._library.mean_size()
        total = 0.0
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                rows = edges if "edge" in name else nodes if "node" in name else 1.0  # else the globals of a graph
                passes = 2 if name.endswith("embedding") else 3
                total += 2 * passes * rows * layer.weight.numel()
        return total * self.conf.batch_size

    def describe_data(self) -> dict[str, Any]:
        """See :meth:`tasks.ogbg_molpcba.data.Library.describe`."""
        return self._library.describe()


def _check(conf: MolPCBAConf) -> None:
    for key in ("steps", "width", "batch_size"):
        if getattr(conf, key) < 1:
            raise DataError(f"task.{key}: {getattr(conf, key)} is too small, it must be at least 1")
    if not 0 <= conf.dropout < 1:
        raise DataError(f"task.dropout: {conf.dropout} is not in [0, 1)")
