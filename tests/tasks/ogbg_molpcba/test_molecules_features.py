"""SMILES to graphs, against OGB's published examples and graphs that OGB's own code made."""

import csv
import gzip

import numpy as np
import pytest

from caspr_cli.recipe.schema import Source
from caspr_cli.tasks.ogbg_molpcba.features import atom_features, bond_features, canonical, graph, parse
from caspr_cli.tasks.ogbg_molpcba.graphs import ATOM_SIZES, BOND_SIZES
from caspr_cli.tasks.ogbg_molpcba.sources import molecules
from caspr_cli.tasks.registry import MolPCBAConf


def test_the_examples_in_ogbs_source():
    molecule = parse("Cl[C@H](/C=C/C)Br")
    assert atom_features(molecule.GetAtomWithIdx(1)) == [5, 2, 4, 5, 1, 0, 2, 0, 0]
    assert bond_features(molecule.GetBondWithIdx(2)) == [1, 2, 0]


@pytest.mark.parametrize(
    ("smiles", "features"),
    [
        ("C", [5, 0, 4, 5, 4, 0, 2, 0, 0]),
        ("[O-]C", [7, 0, 1, 4, 0, 0, 2, 0, 0]),
        ("c1ccccc1", [5, 0, 3, 5, 1, 0, 1, 1, 1]),
        ("[CH3]", [5, 0, 3, 5, 3, 1, 2, 0, 0]),
        ("C#N", [5, 0, 2, 5, 1, 0, 0, 0, 0]),
        ("[Fe+6]", [25, 0, 0, 11, 0, 0, 5, 0, 0]),  # a charge and a hybridization that have no place of their own
        ("*C", [118, 0, 1, 5, 0, 0, 5, 0, 0]),  # nor has an unknown element
    ],
)
def test_first_atoms(smiles, features):
    assert atom_features(parse(smiles).GetAtomWithIdx(0)) == features


@pytest.mark.parametrize(
    ("smiles", "bond", "features"),
    [
        ("CC", 0, [0, 0, 0]),
        ("C=C", 0, [1, 0, 0]),
        ("C#C", 0, [2, 0, 0]),
        ("c1ccccc1", 0, [3, 0, 1]),
        ("F/C=C\\F", 1, [1, 1, 0]),
        ("C=CC=C", 1, [0, 0, 1]),
        ("N->[Cu]", 0, [4, 0, 0]),  # a dative bond
    ],
)
def test_bonds(smiles, bond, features):
    assert bond_features(parse(smiles).GetBondWithIdx(bond)) == features


def test_a_bond_is_two_edges_and_a_lone_atom_has_none():
    nodes, edges, bonds = graph(parse("CC=O"))
    assert nodes[:, 0].tolist() == [5, 5, 7]
    assert edges.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]
    assert bonds[:, 0].tolist() == [0, 0, 1, 1]
    nodes, edges, bonds = graph(parse("O"))
    assert (nodes.shape, edges.shape, bonds.shape) == ((1, len(ATOM_SIZES)), (0, 2), (0, len(BOND_SIZES)))
    assert (nodes.dtype, edges.dtype, bonds.dtype) == (np.uint8, np.uint16, np.uint8)


def test_odd_smiles_are_none_and_say_nothing(capfd):
    assert parse("C1CC") is None
    assert parse("C(C)(C)(C)(C)C") is None
    assert capfd.readouterr() == ("", "")


def test_canonical_smiles():
    assert canonical(parse("OC(C)=O")) == canonical(parse("CC(=O)O")) == ("CC(=O)O", "CC(=O)O")
    left, right = (canonical(parse(s)) for s in ("F[C@H](Cl)Br", "F[C@@H](Cl)Br"))
    assert left[0] != right[0]
    assert left[1] == right[1]


@pytest.mark.release
def test_toxcasts_graphs_are_those_of_ogb(shared):
    conf = MolPCBAConf(data=Source.files, root=str(shared / "molecules/ogb_layout/toxcast128"))
    graphs, _ = molecules(conf).read()
    with gzip.open(shared / "molecules/toxcast128.csv.gz", "rt", encoding="utf8") as file:
        made = [graph(parse(row["smiles"])) for row in csv.DictReader(file)]
    assert [len(nodes) for nodes, _, _ in made] == graphs.node_counts.tolist()
    assert [len(edges) for _, edges, _ in made] == graphs.edge_counts.tolist()
    for name, parts in zip(("nodes", "edges", "bonds"), zip(*made, strict=True), strict=True):
        assert np.array_equal(np.concatenate(parts), getattr(graphs, name)), name
