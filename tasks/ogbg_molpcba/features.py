"""From SMILES to graphs: OGB's nine features of an atom and three of a bond, computed with RDKit.

The lists and their order are those of OGB 1.3.6 (ogb/utils/features.py, mol.py): a feature is the place of a value in
its list, and what is not in the list has the last place.
"""

from typing import Any

import numpy as np
from rdkit import Chem, RDLogger

from caspr_cli.tasks.ogbg_molpcba.graphs import ATOM_SIZES, BOND_SIZES, Array, both_ways

RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]  # it writes a line for each odd valence and each SMILES that it cannot read


def _places(kind: Any, names: str) -> dict[Any, int]:
    return {getattr(kind, name): place for place, name in enumerate(names.split())}


_CHIRALITY = _places(Chem.ChiralType, "CHI_UNSPECIFIED CHI_TETRAHEDRAL_CW CHI_TETRAHEDRAL_CCW CHI_OTHER")
_HYBRIDIZATION = _places(Chem.HybridizationType, "SP SP2 SP3 SP3D SP3D2")
_BOND = _places(Chem.BondType, "SINGLE DOUBLE TRIPLE AROMATIC")
_STEREO = _places(Chem.BondStereo, "STEREONONE STEREOZ STEREOE STEREOCIS STEREOTRANS STEREOANY")
# where the lists of numbers begin; the last place of each is for all others
_FIRST_ELEMENT, _FIRST_CHARGE = 1, -5


def _place(number: int, first: int, size: int) -> int:
    return number - first if first <= number < first + size - 1 else size - 1


def atom_features(atom: Any) -> list[int]:
    elements, chiralities, degrees, charges, hydrogens, radicals, hybrids, *_ = ATOM_SIZES
    return [
        _place(atom.GetAtomicNum(), _FIRST_ELEMENT, elements),
        _CHIRALITY.get(atom.GetChiralTag(), chiralities - 1),
        _place(atom.GetTotalDegree(), 0, degrees),
        _place(atom.GetFormalCharge(), _FIRST_CHARGE, charges),
        _place(atom.GetTotalNumHs(), 0, hydrogens),
        _place(atom.GetNumRadicalElectrons(), 0, radicals),
        _HYBRIDIZATION.get(atom.GetHybridization(), hybrids - 1),
        int(atom.GetIsAromatic()),
        int(atom.IsInRing()),
    ]


def bond_features(bond: Any) -> list[int]:
    """Return the three features of an RDKit bond (atropisomers, a newer stereo that OGB refuses: last place, too)."""
    types, stereos, _ = BOND_SIZES
    return [
        _BOND.get(bond.GetBondType(), types - 1),
        _STEREO.get(bond.GetStereo(), stereos - 1),
        int(bond.GetIsConjugated()),
    ]


def parse(smiles: str) -> Any:
    """Return the RDKit molecule that a SMILES string stands for; None if it is not valid."""
    return Chem.MolFromSmiles(smiles)


def canonical(molecule: Any) -> tuple[str, str]:
    """Return the canonical SMILES of a molecule with stereo, and without."""
    return Chem.MolToSmiles(molecule), Chem.MolToSmiles(molecule, isomericSmiles=False)


def graph(molecule: Any) -> tuple[Array, Array, Array]:
    """Return nodes ``[n, 9]`` uint8, edges ``[2 b, 2]`` uint16 and their features ``[2 b, 3]`` uint8; no hydrogens."""
    nodes = np.array([atom_features(atom) for atom in molecule.GetAtoms()], np.uint8).reshape(-1, len(ATOM_SIZES))
    bonds = list(molecule.GetBonds())
    ends = np.array([(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in bonds], np.uint16).reshape(-1, 2)
    features = np.array([bond_features(b) for b in bonds], np.uint8).reshape(-1, len(BOND_SIZES))
    return nodes, *both_ways(ends, features)
