"""Molecules of the user: a CSV file with a column of SMILES and columns of labels."""

import csv
import logging
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np

from caspr_cli.tasks.errors import DataError
from caspr_cli.tasks.files import lines, reading, result, stamps
from caspr_cli.tasks.names import SPLITS, Split
from caspr_cli.tasks.ogbg_molpcba.graphs import MISSING, MOST_NODES, Array, Graphs
from caspr_cli.tasks.ogbg_molpcba.measured import split_of

log = logging.getLogger("caspr")

LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "": MISSING, "nan": MISSING}
HOLDS = 'a first line of names, one of them "smiles"; labels are 0, 1 or empty'


def is_table(file: Path) -> bool:
    return file.is_file() and file.name.lower().removesuffix(".gz").endswith(".csv")


class Smiles:
    """The rows of a CSV file. A column whose first value is no label is left out.

    The structure of a molecule without stereo decides its split, 80 / 10 / 10, as in the sample.
    """

    def __init__(self, file: Path) -> None:
        self._file, self.name = file, file.name

    def identity(self) -> list[str]:
        return [self.name, *stamps([self._file])]

    def read(self) -> tuple[Graphs, dict[Split, Array]]:
        """Return the graphs and their splits. Raises as :meth:`steps`."""
        return result(self.steps())

    def steps(self) -> Generator[None, None, tuple[Graphs, dict[Split, Array]]]:
        """Read the molecules, one at each step, and return the graphs and their splits.

        Raises DataError, which names the line.
        """
        from caspr_cli.tasks.ogbg_molpcba.features import canonical, graph, parse  # needs RDKit

        log.info("reading the molecules in %s", self._file)
        rows = self._rows()
        names = [name.strip() for name in next(rows)[1]]
        place = next((i for i, name in enumerate(names) if name.lower() == "smiles"), None)
        if place is None:
            raise DataError(f"{self.name}: no column smiles (it has {', '.join(names[:8])}); it should have {HOLDS}")
        graphs: list[tuple[Array, Array, Array]] = []
        splits: list[Split] = []
        cells: list[list[str]] = []
        wheres: list[str] = []
        for where, row in rows:
            if len(row) != len(names):
                raise DataError(f"{where}: {len(row)} values, but {len(names)} names in the first line")
            molecule = parse(row[place])
            if molecule is None or not 0 < molecule.GetNumAtoms() <= MOST_NODES:
                raise DataError(f"{where}: {row[place]!r} is no SMILES of a molecule")
            graphs.append(graph(molecule))
            splits.append(split_of(canonical(molecule)[1]))
            cells.append([value.strip().lower() for value in row])
            wheres.append(where)
            yield
        if not graphs:
            raise DataError(f"{self.name}: has no molecules")
        labels = [self._labels(name, [row[i] for row in cells], wheres) for i, name in enumerate(names) if i != place]
        kept = [column for column in labels if column is not None]
        if not kept:
            found = [f"{name} begins with {cells[0][i]!r}" for i, name in enumerate(names) if i != place]
            said = f" ({', '.join(found[:4])})" if found else ""
            raise DataError(f"{self.name}: no column of labels{said}; it should have {HOLDS}")
        return Graphs.of(graphs, np.stack(kept, axis=1)), {s: np.flatnonzero(np.array(splits) == s) for s in SPLITS}

    def _rows(self) -> Iterator[tuple[str, list[str]]]:
        """Yield where a row stands, and its values; empty lines are left out."""
        where = self.name

        def text() -> Iterator[str]:
            nonlocal where
            for number, line in lines(self._file):
                where = f"{self.name}:{number}"
                yield line

        with reading(lambda: where):
            for row in csv.reader(text(), strict=True):
                if row:
                    yield where, row

    def _labels(self, name: str, values: list[str], wheres: list[str]) -> Array | None:
        """Return the labels of a column ``[G]``, int8; None if it has none."""
        first = next((value for value in values if LABELS.get(value) != MISSING), None)
        if first not in LABELS:
            log.info("left out: column %s, whose first value is no label", name)
            return None
        for value, where in zip(values, wheres, strict=True):
            if value not in LABELS:
                raise DataError(f"{where}: {name} is {value!r}, and should be 0, 1 or empty")
        return np.array([LABELS[value] for value in values], np.int8)
