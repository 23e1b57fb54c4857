"""Many small graphs in a few arrays, with OGB's features of atoms and bonds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# How many values each feature can take, 0 the first (OGB 1.3.6, ogb/utils/features.py); the lists are in features.py.
# Atomic number, chirality, degree, charge, hydrogens, radical electrons, hybridization, aromatic, in a ring:
ATOM_SIZES = (119, 5, 12, 12, 10, 6, 6, 2, 2)
# Type, stereo, conjugated:
BOND_SIZES = (5, 6, 2)

MISSING = -1  # a label that was not measured
MOST_NODES = 2**16  # in one graph: nodes are numbered in two bytes


@dataclass(frozen=True)
class Graphs:
    """``G`` graphs with ``N`` nodes and ``E`` edges in all; the rows of a graph follow those of the one before.

    A bond is two edges, one each way.
    """

    node_counts: Array  # [G], int64
    edge_counts: Array  # [G], int64
    nodes: Array  # [N, 9], uint8: features of each atom
    edges: Array  # [E, 2], uint16: sender and receiver, numbered from 0 within their graph
    bonds: Array  # [E, 3], uint8: features of each edge
    labels: Array  # [G, T], int8: 0, 1 or MISSING

    @classmethod
    def of(cls, graphs: list[tuple[Array, Array, Array]], labels: Array) -> Graphs:
        """Return single graphs (nodes, edges and bonds of each) with their labels ``[G, T]``."""
        nodes, edges, bonds = zip(*graphs, strict=True)
        counts = np.array([len(n) for n in nodes]), np.array([len(e) for e in edges])
        return cls(*counts, np.concatenate(nodes), np.concatenate(edges), np.concatenate(bonds), labels)

    @classmethod
    def joined(cls, parts: list[Graphs]) -> Graphs:
        """Return the graphs of all ``parts`` (one or more), in order."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


def both_ways(bonds: Array, features: Array) -> tuple[Array, Array]:
    """Return two edges for each bond ``[B, 2]``, one after the other as OGB has them, and features for each."""
    return np.stack((bonds, bonds[:, ::-1]), axis=1).reshape(-1, 2), features.repeat(2, axis=0)
