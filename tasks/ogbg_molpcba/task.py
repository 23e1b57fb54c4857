"""Many yes-or-no questions about a molecule: mean average precision over those that a split answers both ways."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Batch
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_average_precision

from caspr_cli.tasks.base import Task
from caspr_cli.tasks.metrics import Means
from caspr_cli.tasks.ogbg_molpcba.data import Graph, Library, batch_of
from caspr_cli.tasks.ogbg_molpcba.graphs import MISSING
from caspr_cli.tasks.ogbg_molpcba.model import GraphNetwork
from caspr_cli.tasks.registry import MolPCBAConf


class MeanAveragePrecision(Means):
    """Cross entropy and average precision over all graphs.

    ``compute()`` gives ``loss`` (nats an observed cell) and ``map``: average precision (the sum of precision times
    gain in recall, as scikit-learn and OGB have it) of each label's observed cells, averaged over the labels that
    have both classes. It is NaN if no label has; a data set with such a split is refused when it is prepared.

    Args:
        tasks: labels of a graph (``T``).
    """

    means = (("loss", "nats", "cells"),)
    logits: list[Tensor] | Tensor
    labels: list[Tensor] | Tensor

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self._tasks = tasks
        for state in ("logits", "labels"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add ``logits`` ``[B, T]`` and ``labels`` ``[B, T]``, 0, 1 or MISSING."""
        nats, cells = cross_entropy(logits, labels)
        self.add(nats=nats.double(), cells=cells)
        self.logits.append(logits.detach().float())  # type: ignore[union-attr]
        self.labels.append(labels)  # type: ignore[union-attr]

    def compute(self) -> dict[str, Tensor]:
        """Return the scalars by name."""
        loss = super().compute()["loss"]
        logits, labels = self._whole(self.logits), self._whole(self.labels)
        scores = [average_precision(logits[:, t], labels[:, t]) for t in range(self._tasks)]
        found = [score for score in scores if score is not None]
        return {"loss": loss, "map": torch.stack(found).mean() if found else torch.full_like(loss, torch.nan)}

    def _whole(self, parts: list[Tensor] | Tensor) -> Tensor:
        """Return the batches as one tensor, which torchmetrics has made of them already where there are ranks."""
        if isinstance(parts, Tensor):
            return parts
        return torch.cat(parts) if parts else torch.empty(0, self._tasks)


def average_precision(logits: Tensor, labels: Tensor) -> Tensor | None:
    """Return the average precision of one label's ``logits`` ``[n]``; None unless both classes were observed."""
    observed = labels != MISSING
    logits, truth = logits[observed], labels[observed].long()
    positive = truth.sum()
    if positive == 0 or positive == len(truth):
        return None
    # By rank, in [0, 1]: torchmetrics puts what is outside through a sigmoid, where large logits become equal.
    ranks = logits.unique(return_inverse=True)[1].double()
    return binary_average_precision(ranks / ranks.max().clamp(min=1), truth)


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over the observed cells, in nats, and how many there are."""
    observed = labels != MISSING
    losses = F.binary_cross_entropy_with_logits(logits.float(), labels.clamp(min=0).float(), reduction="none")
    return (losses * observed).sum(), observed.sum()


class MolPCBA(Task):
    """A graph network on molecules: a sample of measured properties, an OGB data set on disk, or ogbg-molpcba.

    Batches are those of :func:`caspr_cli.tasks.ogbg_molpcba.data.batch_of`.
    """

    unit: ClassVar[str] = "graphs"
    heads: ClassVar[tuple[str, ...]] = ("decoder",)

    def __init__(self, conf: MolPCBAConf, seed: int) -> None:
        # ``seed`` is every task's second argument; here the splits are the data's own, and nothing is drawn.
        self.conf = conf
        self.data: Library = Library(conf)

    def collate(self, samples: list[Graph]) -> Batch:
        return batch_of(samples)

    def model(self) -> GraphNetwork:
        return GraphNetwork(self.data.tasks, self.conf.width, self.conf.steps, self.conf.dropout)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross entropy over the observed cells of the batch, in nats; 0 where none was observed.

        A batch that is divided over ranks or passes is averaged over these parts: a cell in a part with few observed
        cells weighs a little more.
        """
        nats, cells = cross_entropy(model(batch), batch.y)
        return nats / cells.clamp(min=1)

    def metrics(self) -> MeanAveragePrecision:
        return MeanAveragePrecision(self.data.tasks)

    def evaluate(self, model: nn.Module, batch: Batch, metrics: Metric) -> None:
        metrics.update(model(batch), batch.y)

    def units(self, batch: Batch) -> int:
        """Return the number of graphs in a batch."""
        return int(batch.num_graphs)

    def train_flops(self, model: nn.Module) -> float:
        """Return the FLOPs of the matrix products of one global batch, its graphs of the training split's mean size.

        The backward pass is twice the forward pass, but once for the embeddings: features need no gradient.
        """
        nodes, edges = self.data.mean_size()
        total = 0.0
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                rows = edges if "edge" in name else nodes if "node" in name else 1.0  # else the globals of a graph
                passes = 2 if name.endswith("embedding") else 3
                total += 2 * passes * rows * layer.weight.numel()
        return total * self.conf.batch_size
