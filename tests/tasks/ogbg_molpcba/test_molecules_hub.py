"""ogbg-molpcba of the hub, on small data sets of the same columns."""

import datasets
import numpy as np
import pytest

from caspr_cli.recipe.schema import Source
from caspr_cli.tasks.base import DataError
from caspr_cli.tasks.ogbg_molpcba import sources
from caspr_cli.tasks.ogbg_molpcba.data import Library
from caspr_cli.tasks.ogbg_molpcba.graphs import ATOM_SIZES, BOND_SIZES, MISSING
from caspr_cli.tasks.ogbg_molpcba.sources import SPLITS
from caspr_cli.tasks.registry import MolPCBAConf

HUB = MolPCBAConf(data=Source.hub)


def hub_rows(seed, count=5):
    """Columns as on the hub: both edges of each bond, labels in one list, missing ones null or NaN."""
    draw = np.random.default_rng(seed)
    rows = {name: [] for name in ("edge_index", "edge_attr", "node_feat", "y", "num_nodes")}
    for i in range(count):
        nodes = 1 if i == 1 else int(draw.integers(2, 6))
        bonds = [] if i == 1 else [draw.choice(nodes, 2, replace=False).tolist() for _ in range(i + 1)]
        edges = [pair for a, b in bonds for pair in ([a, b], [b, a])]
        rows["edge_index"].append([[a for a, _ in edges], [b for _, b in edges]])
        rows["edge_attr"].append([draw.integers(0, BOND_SIZES).tolist() for _ in edges])
        rows["node_feat"].append([draw.integers(0, ATOM_SIZES).tolist() for _ in range(nodes)])
        rows["y"].append([[float(i % 2), 1.0 - i % 2, None, float("nan"), *draw.integers(0, 2, 124).astype(float)]])
        rows["num_nodes"].append(nodes)
    return rows


@pytest.fixture
def hub(monkeypatch):
    """The rows of each split, and the hub that serves them; two rows are read at a time."""
    rows = {split: hub_rows(seed) for seed, split in enumerate(SPLITS)}

    def load_dataset(name, *, split):
        assert name == "OGB/ogbg-molpcba"
        return datasets.Dataset.from_dict(rows[split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "ROWS", 2)
    return rows


def test_every_row_is_a_graph(hub):
    library = Library(HUB)
    for split in SPLITS:
        graphs = list(library.dataset(split))
        assert len(graphs) == 5
        for i, graph in enumerate(graphs):
            assert graph.nodes.tolist() == hub[split]["node_feat"][i]
            assert graph.edges.T.tolist() == hub[split]["edge_index"][i]
            assert graph.bonds.tolist() == hub[split]["edge_attr"][i]
            labels = [MISSING if y is None or y != y else int(y) for y in hub[split]["y"][i][0]]
            assert graph.labels.tolist() == labels
            assert labels[2:4] == [MISSING, MISSING]
    described = library.describe()
    assert (described["name"], described["source"], described["labels"]) == ("OGB/ogbg-molpcba", "hub", 128)


def test_what_was_fetched_once_serves_without_a_network(hub, monkeypatch):
    Library(HUB).check()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("fetched again"))
    Library(HUB).check()


def changed(column, row, value):
    def change(rows):
        rows[column][row] = value

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (changed("node_feat", 3, [[0] * 8]), "row 3: node_feat has 8 numbers in a list, not 9"),
        (changed("node_feat", 3, []), "row 3: node_feat is empty: a graph needs at least one node"),
        (
            changed("node_feat", 1, [[0, 9, *[0] * 7]]),
            "row 1: node_feat holds 9, it must be a whole number from 0 to 4",
        ),
        (changed("edge_attr", 0, [[0, 0, 0]]), "row 0: edge_index and edge_attr differ in length"),
        (changed("edge_index", 0, [[0, 1]]), "row 0: edge_index must be two lists"),
        (changed("edge_index", 0, [[0, 7], [1, 0]]), "row 0: edge_index holds node 7 in a graph of "),
        (changed("edge_index", 0, [[0, -1], [1, 0]]), "row 0: edge_index holds a negative number"),
        (changed("y", 4, [[1.0] * 127]), "row 4: y has 127 numbers in a list, not 128"),
        (changed("y", 4, [[1.0] * 128] * 2), "row 4: y must be one list"),
        (changed("y", 4, [[0.5] * 128]), "row 4: y holds 0.5, it must be a whole number from 0 to 1, or missing"),
        (lambda rows: rows.pop("y"), "no column y (there are edge_attr, edge_index, node_feat, num_nodes)"),
    ],
)
def test_malformed_rows_are_named(hub, change, expected):
    change(hub["validation"])
    with pytest.raises(DataError) as found:
        Library(HUB).check()
    text = str(found.value)
    assert text.startswith("OGB/ogbg-molpcba validation")
    assert expected in text
    assert "\n" not in text
