"""Many yes-or-no questions about a molecule: mean average precision over those that a split answers both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from torch_geometric.data import Batch

from caspr_cli.tasks.base import Task
from caspr_cli.tasks.ogbg_molpcba.data import Graph, Library, batch_of
from caspr_cli.tasks.ogbg_molpcba.model import GraphNetwork, cross_entropy
from caspr_cli.tasks.registry import MolPCBAConf

if TYPE_CHECKING:  # imported when a metric is made: torchmetrics takes seconds, and is not needed to check data
    from torchmetrics import Metric


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

    def metrics(self) -> Metric:
        from caspr_cli.tasks.ogbg_molpcba.metric import MeanAveragePrecision

        return MeanAveragePrecision(self.data.tasks)

    def evaluate(self, model: nn.Module, batch: Batch, metrics: Metric) -> None:
        metrics.update(model(batch), batch.y)

    def units(self, batch: Batch) -> int:
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
