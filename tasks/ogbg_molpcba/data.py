"""The graphs as arrays in the cache, memory-mapped, and as data sets whose batches are those of torch_geometric."""

import hashlib
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch_geometric.data import Batch

from caspr_cli.tasks import cache
from caspr_cli.tasks.base import SPLITS, DataError, Split
from caspr_cli.tasks.files import reading
from caspr_cli.tasks.ogbg_molpcba.graphs import MISSING, Array, Graphs
from caspr_cli.tasks.ogbg_molpcba.sources import Molecules, molecules
from caspr_cli.tasks.registry import MolPCBAConf

log = logging.getLogger("caspr")

KIND = "ogbg_molpcba"  # folder of the cache
FORMAT = 1  # of the files; raised when they change
ARRAYS = tuple(f.name for f in fields(Graphs))


class Graph(NamedTuple):
    """One molecule of ``n`` atoms and ``b`` bonds; see :class:`caspr_cli.tasks.ogbg_molpcba.graphs.Graphs`."""

    nodes: Array  # [n, 9]
    edges: Array  # [2 b, 2]
    bonds: Array  # [2 b, 3]
    labels: Array  # [T]


class GraphSet(cache.MappedData[Graph]):
    """The graphs of a split, from a directory of the cache with an array for each field of :class:`Graphs`."""

    def __init__(self, directory: Path, split: Split) -> None:
        super().__init__(directory, split)
        # as plain arrays, which are still the mapped files: NumPy takes its time over each slice of a memmap
        self._graphs = Graphs(**{name: np.asarray(cache.read_array(directory / f"{name}.npy")) for name in ARRAYS})
        self._places = cache.read_array(directory / f"{split}.npy")
        # where each graph begins, and the last ends: [G + 1]
        self._nodes = np.concatenate(([0], np.cumsum(self._graphs.node_counts)))
        self._edges = np.concatenate(([0], np.cumsum(self._graphs.edge_counts)))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Graph:
        i = self._places[index]  # IndexError beyond the end, which `for` relies on
        nodes = slice(self._nodes[i], self._nodes[i + 1])
        edges = slice(self._edges[i], self._edges[i + 1])
        whole = self._graphs
        return Graph(whole.nodes[nodes], whole.edges[edges], whole.bonds[edges], whole.labels[i])


def batch_of(graphs: list[Graph]) -> Batch:
    """Return a batch of torch_geometric.

    It holds ``x`` ``[n, 9]`` uint8, ``edge_index`` ``[2, e]``, ``edge_attr`` ``[e, 3]`` uint8, ``y`` ``[B, T]`` int8
    (0, 1, or MISSING), ``batch`` ``[n]`` and ``ptr`` ``[B + 1]``. ``Batch.from_data_list`` gives the same in fourteen
    times the time, which would be a third of a training step.
    """
    counts = np.array([len(g.nodes) for g in graphs])
    edges = np.array([len(g.edges) for g in graphs])
    ptr = np.concatenate(([0], np.cumsum(counts)))
    ends = np.concatenate([g.edges for g in graphs]).astype(np.int64) + np.repeat(ptr[:-1], edges)[:, None]
    return Batch(
        x=torch.from_numpy(np.concatenate([g.nodes for g in graphs])),
        edge_index=torch.from_numpy(np.ascontiguousarray(ends.T)),
        edge_attr=torch.from_numpy(np.concatenate([g.bonds for g in graphs])),
        y=torch.from_numpy(np.stack([g.labels for g in graphs])),
        batch=torch.from_numpy(np.repeat(np.arange(len(graphs)), counts)),
        ptr=torch.from_numpy(ptr),
    )


class Library(cache.Built):
    def __init__(self, conf: MolPCBAConf) -> None:
        self._conf = conf

    @reading("task.data: the graphs")
    def build(self) -> Path:
        source = molecules(self._conf)
        name = cache.digest([f"format {FORMAT}", self._conf.data.value, *source.identity()])
        return cache.build_once(cache.cache_root(KIND) / name, lambda whole: _build(source, whole))

    @property
    def tasks(self) -> int:
        return int(self.meta["tasks"])

    def check(self) -> None:
        """Raise :class:`DataError` unless the files have the sizes that they were written with."""
        with cache.whole(self.directory / cache.META):
            shapes = {name: self.meta["shapes"][name] for name in (*ARRAYS, *SPLITS)}
        for name, shape in shapes.items():
            self.array(name, shape)

    def dataset(self, split: Split) -> GraphSet:
        """Return the data set of a split; raises as :meth:`check`."""
        self.check()
        return GraphSet(self.directory, split)

    def mean_size(self) -> tuple[float, float]:
        """Return the nodes and the edges of a graph, on average over the training split."""
        train = self.meta["splits"]["train"]
        return train["nodes"] / train["graphs"], train["edges"] / train["graphs"]

    def describe(self) -> dict[str, Any]:
        """Return also the number of labels of a graph."""
        found = {"name": self.meta["name"], "source": self._conf.data.value, "hash": self.meta["hash"]}
        return found | {"labels": self.tasks, "splits": self.meta["splits"]}


def _build(source: Molecules, whole: Path) -> dict[str, Any]:
    """Write the arrays into the directory ``whole``, and return what ``meta.json`` is to hold."""
    graphs, splits = source.read()
    described = {split: _describe(graphs, splits[split], split, source.name) for split in SPLITS}
    arrays = {name: getattr(graphs, name) for name in ARRAYS} | splits
    content = hashlib.sha256()
    for name, array in arrays.items():
        cache.write_array(whole / f"{name}.npy", array)
        content.update(f"{name} {array.dtype} {array.shape}".encode())
        content.update(np.ascontiguousarray(array).data)
    return {
        "name": source.name,
        "hash": content.hexdigest()[:16],
        "tasks": graphs.labels.shape[1],
        "shapes": {name: array.shape for name, array in arrays.items()},
        "splits": described,
    }


def _describe(graphs: Graphs, places: Array, split: Split, name: str) -> dict[str, int]:
    """Return the sizes of a split. Raises :class:`DataError` if it cannot be scored."""
    if not len(places):
        raise DataError(f"{name}: the {split} split is empty")
    labels = graphs.labels[places]  # [graphs, T]
    both = ((labels == 1).any(0) & (labels == 0).any(0)).sum()
    if not both:
        raise DataError(f"{name}: no label of the {split} split has both a 0 and a 1: there is nothing to score")
    return {
        "graphs": len(places),
        "nodes": int(graphs.node_counts[places].sum()),
        "edges": int(graphs.edge_counts[places].sum()),
        "observed": int((labels != MISSING).sum()),  # cells
        "positive": int((labels == 1).sum()),
        "scored_labels": int(both),  # with both classes
    }
