"""The graph network of AlgoPerf's OGBG workload, which is that of init2winit."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Batch
from torch_geometric.utils import scatter

from caspr_cli.tasks.ogbg_molpcba.graphs import ATOM_SIZES, BOND_SIZES, MISSING


class Update(nn.Module):
    """Dense, LayerNorm, ReLU and dropout on concatenated arguments."""

    def __init__(self, inputs: int, width: int, dropout: float) -> None:
        super().__init__()
        # One matrix for all arguments, as in the original: split by argument, it would be another to precondition.
        self.dense = nn.Linear(inputs, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)  # Flax's eps
        self.dropout = nn.Dropout(dropout)

    def forward(self, *arguments: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.norm(self.dense(torch.cat(arguments, dim=-1))).relu())
        return out


class MessagePassing(nn.Module):
    """One step: edges, then nodes, then globals, as in jraph's GraphNetwork.

    That is algorithm 1 of Battaglia et al. (arXiv:1806.01261) with sums, but that a node gets the sum of the edges
    it sends beside the sum of those it receives.

    Args:
        width: of nodes and edges that come in (``w``), and of all that goes out.
        globals_width: of the globals that come in (``u``).
    """

    def __init__(self, width: int, globals_width: int, dropout: float) -> None:
        super().__init__()
        self.edge = Update(3 * width + globals_width, width, dropout)
        self.node = Update(3 * width + globals_width, width, dropout)
        self.globals = Update(2 * width + globals_width, width, dropout)

    def forward(
        self, nodes: Tensor, edges: Tensor, u: Tensor, senders: Tensor, receivers: Tensor, graph: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return new nodes ``[n, w]``, edges ``[e, w]`` and globals ``[B, w]``; ``graph`` ``[n]`` is each node's."""
        count, edge_graph = len(nodes), graph[senders]
        edges = self.edge(edges, nodes[senders], nodes[receivers], u[edge_graph])
        sent = scatter(edges, senders, dim=0, dim_size=count, reduce="sum")  # [n, w]
        received = scatter(edges, receivers, dim=0, dim_size=count, reduce="sum")
        nodes = self.node(nodes, sent, received, u[graph])
        of_nodes = scatter(nodes, graph, dim=0, dim_size=len(u), reduce="sum")  # [B, w]
        of_edges = scatter(edges, edge_graph, dim=0, dim_size=len(u), reduce="sum")
        return nodes, edges, self.globals(of_nodes, of_edges, u)


class GraphNetwork(nn.Module):
    """Embeds atoms and bonds, passes messages, and reads the labels off the globals.

    Features go in as the numbers they are, as in the original: no table of embeddings. At width 256, 5 steps and 128
    tasks it has 3,554,176 parameters. Initial weights are Flax's: truncated normal of variance 1 / inputs, and no bias.

    Args:
        tasks: labels of a graph (``T``), and the width of the first globals, which are zero.
        width: of nodes, edges and globals.
        steps: of message passing, each with weights of its own.
        dropout: probability, after each update.
    """

    def __init__(self, tasks: int, width: int, steps: int, dropout: float) -> None:
        super().__init__()
        self.tasks = tasks
        self.node_embedding = nn.Linear(len(ATOM_SIZES), width)
        self.edge_embedding = nn.Linear(len(BOND_SIZES), width)
        self.steps = nn.ModuleList(MessagePassing(width, width if step else tasks, dropout) for step in range(steps))
        self.decoder = nn.Linear(width, tasks)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # cut off at two deviations, a normal keeps this part of its own
                std = 1 / math.sqrt(module.in_features) / 0.87962566103423978
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(module.bias)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits ``[B, T]`` of a batch as made by :func:`caspr_cli.tasks.ogbg_molpcba.data.batch_of`."""
        senders, receivers = batch.edge_index
        dtype = self.decoder.weight.dtype
        nodes = self.node_embedding(batch.x.to(dtype))  # [n, w]
        edges = self.edge_embedding(batch.edge_attr.to(dtype))  # [e, w]
        u = nodes.new_zeros(batch.num_graphs, self.tasks)  # [B, T]
        for step in self.steps:
            nodes, edges, u = step(nodes, edges, u, senders, receivers, batch.batch)
        logits: Tensor = self.decoder(u)
        return logits


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over the observed cells, in nats, and how many there are."""
    observed = labels != MISSING
    losses = F.binary_cross_entropy_with_logits(logits.float(), labels.clamp(min=0).float(), reduction="none")
    return (losses * observed).sum(), observed.sum()
