"""The sample: measured properties of 21,000 organic compounds, from the tables of the package `chemicals`.

Its tables are read in place; the package itself is not imported. As in ogbg-molpcba there are 128 yes-or-no labels a
molecule, and most cells are missing: a compound was measured for some of 14 properties. For each property there is a
label at each of nine quantiles, "is the value beyond this one?", and two more for the melting point, which was
measured most often. The thresholds come from the training split alone.
"""

import csv
import gzip
import hashlib
import logging
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path

import numpy as np

from caspr_cli.tasks.errors import DataError
from caspr_cli.tasks.names import SPLITS, Split
from caspr_cli.tasks.ogbg_molpcba.graphs import MISSING, Array, Graphs

log = logging.getLogger("caspr")

PACKAGE = "chemicals"
IDENTIFIERS = tuple(f"Identifiers/chemical identifiers pubchem {size}.tsv" for size in ("large", "small"))
COLUMNS = {  # that are read of each table
    "Phase Change/OpenNotebook Melting Points.tsv": ("Tm",),
    "Phase Change/Yaws Boiling Points.tsv": ("Tb",),
    "Misc/Physical Constants of Organic Compounds.csv": ("Tm", "Tb", "rho", "RI"),
    "Critical Properties/Yaws Collection.tsv": ("Tc", "Pc", "Vc", "omega"),
    "Environment/Syrres logP data.csv.gz": ("logP",),
    "Reactions/Yaws Hf S0 (g).tsv": ("Hfg", "S0g"),
    "Phase Change/Ghazerati Appendix Vaporization Enthalpy.tsv": ("Hvap298",),
}
PROPERTIES = tuple((table, column) for table, columns in COLUMNS.items() for column in columns)
QUANTILES = (0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
# which property and quantile each label is at: 14 x 9, and two more of the first property
LABELS = (*((p, q) for p in range(len(PROPERTIES)) for q in QUANTILES), (0, 0.275), (0, 0.725))
CARBON = 6
EVERY = 5000  # molecules between two lines of progress


class Measured:
    """The compounds that have a structure with carbon and a measured property.

    A hash of its SMILES without stereo puts a molecule into a split, 80 / 10 / 10: the split of a molecule depends on
    no other and on no order, and stereoisomers, of much the same properties, stay together. A split by scaffold
    would put all acyclic molecules, for which many of these properties were measured, on one side.
    """

    name = "chemicals"

    def __init__(self) -> None:
        try:
            self._versions = [f"{package} {version(package)}" for package in (PACKAGE, "rdkit")]
        except PackageNotFoundError as error:
            raise DataError(f"task.data=sample: needs the package {error.name} (pip install {error.name})") from None
        self._paths = {str(file): Path(str(file.locate())) for file in files(PACKAGE) or ()}

    def identity(self) -> list[str]:
        return self._versions

    def read(self) -> tuple[Graphs, dict[Split, Array]]:
        """Return the graphs and their splits; takes some twenty seconds."""
        from caspr_cli.tasks.ogbg_molpcba.features import canonical, graph, parse  # needs RDKit

        log.info("reading the properties in %s", self._versions[0])
        measured = self._measured()
        structures = [(smiles, measured[cas]) for cas, smiles in self._structures().items() if cas in measured]
        found: dict[str, int] = {}  # place of each molecule
        graphs: list[tuple[Array, Array, Array]] = []
        splits: list[Split] = []
        values: list[Array] = []
        for number, (smiles, row) in enumerate(structures):
            if number % EVERY == 0:
                log.info("making graphs of molecules: %d of %d", number, len(structures))
            molecule = parse(smiles)
            if molecule is None or not any(atom.GetAtomicNum() == CARBON for atom in molecule.GetAtoms()):
                continue
            whole, flat = canonical(molecule)
            if whole in found:  # registered under two numbers: what the first lacks comes from the second
                earlier = values[found[whole]]
                values[found[whole]] = np.where(np.isnan(earlier), row, earlier)
                continue
            found[whole] = len(graphs)
            graphs.append(graph(molecule))
            splits.append(split_of(flat))
            values.append(row)
        places: dict[Split, Array] = {s: np.flatnonzero(np.array(splits) == s) for s in SPLITS}
        return Graphs.of(graphs, labels_of(np.stack(values), places["train"])), places

    def _structures(self) -> dict[str, str]:
        """Return the SMILES of each compound by its CAS number."""
        found: dict[str, str] = {}
        for name in IDENTIFIERS:
            with self._path(name).open(encoding="utf8") as file:
                for line in file:
                    _, cas, _, _, smiles, *_ = line.split("\t", 5)  # the hundred synonyms that follow stay unread
                    found.setdefault(cas, smiles)
        return found

    def _measured(self) -> dict[str, Array]:
        """Return the values of the properties ``[14]`` by CAS number, NaN where not measured."""
        found: dict[str, Array] = {}
        for place, (name, column) in enumerate(PROPERTIES):
            path = self._path(name)
            with gzip.open(path, "rt", encoding="utf8") if path.suffix == ".gz" else path.open(encoding="utf8") as file:
                for row in csv.DictReader(file, delimiter="\t"):
                    if row[column]:
                        values = found.setdefault(row["CAS"], np.full(len(PROPERTIES), np.nan))
                        values[place] = float(row[column])
        return found

    def _path(self, name: str) -> Path:
        try:
            return self._paths[f"{PACKAGE}/{name}"]
        except KeyError:
            raise DataError(f"task.data=sample: no {name} in {self._versions[0]} (1.5.2 has it)") from None


def split_of(name: str) -> Split:
    """Return the split of a molecule: 80 % train, 10 % validation, 10 % test."""
    tenth = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 10
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def labels_of(values: Array, train: Array) -> Array:
    """Return labels ``[G, 128]`` int8 of measured values ``[G, 14]``, MISSING where those are NaN.

    A label is 1 below its quantile of the training values where that is a lower one, above it where it is the
    median or a higher one, so that no label is 1 for more than half of the molecules.
    """
    labels = np.full((len(values), len(LABELS)), MISSING, np.int8)
    for label, (place, q) in enumerate(LABELS):
        column = values[:, place]
        threshold = np.nanquantile(column[train], q)
        beyond = column < threshold if q < 0.5 else column > threshold
        labels[:, label] = np.where(np.isnan(column), MISSING, beyond)
    return labels
