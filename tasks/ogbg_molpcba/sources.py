"""Where the graphs come from: measured properties of a package, OGB's files on disk, or ogbg-molpcba on the hub.

A source gives all graphs and the places of each split in them, and an *identity*: cheap strings that change when the
graphs may have changed, so that a second start need not read them.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from caspr_cli.recipe.schema import Source
from caspr_cli.tasks.archives import Files as Archive
from caspr_cli.tasks.archives import Folder, Zip, files_of
from caspr_cli.tasks.errors import DataError
from caspr_cli.tasks.files import entries_below, reaching, root_of, stamps
from caspr_cli.tasks.names import SPLITS, Split, call_split, resembles_split, split_named
from caspr_cli.tasks.ogbg_molpcba.graphs import ATOM_SIZES, BOND_SIZES, MISSING, MOST_NODES, Array, Graphs, both_ways
from caspr_cli.tasks.ogbg_molpcba.measured import Measured
from caspr_cli.tasks.ogbg_molpcba.smiles import Smiles, is_table
from caspr_cli.tasks.ogbg_molpcba.tables import out_of_range, read_table
from caspr_cli.tasks.registry import MolPCBAConf

log = logging.getLogger("caspr")


class Molecules(Protocol):
    name: str

    def identity(self) -> list[str]:
        """Return strings that change whenever the graphs may have changed. Reads no graph."""

    def read(self) -> tuple[Graphs, dict[Split, Array]]:
        """Return all graphs, and for each split the indices of its graphs, int64, in order."""


def molecules(conf: MolPCBAConf) -> Molecules:
    """Return the source that ``conf.data`` names. Raises :class:`DataError` where it is not to be found."""
    if conf.data is Source.files:
        given = Path(conf.root or "").expanduser()
        return Smiles(given) if is_table(given) else Files(conf)
    return Hub() if conf.data is Source.hub else Measured()


def samples(conf: MolPCBAConf) -> Iterator[None]:
    """Read the user's own table, a molecule at each step. Raises :class:`DataError` as the sources."""
    source = molecules(conf)
    return source.steps() if isinstance(source, Smiles) else iter(())


# ---- files: OGB's own --------------------------------------------------------------------------------------------

HOLDS = "raw/ and split/scaffold/ of OGB's pcba.zip"
OR_TABLE = "or task.root should be a .csv file of SMILES and labels"  # smiles.py
RAW = ("num-node-list", "num-edge-list", "node-feat", "edge", "edge-feat", "graph-label")
SPLIT_FOLDER = "split/scaffold/"


class Files:
    """The files of an OGB graph property data set, as they lie in its zip: ``raw/`` and ``split/scaffold/``.

    ``task.root`` is the directory with these two, the one above it, the zip, or the directory with the zip. OGB's
    package is not used: its reader fails on a second start with PyTorch 2.6 or later (snap-stanford/ogb#497).
    """

    def __init__(self, conf: MolPCBAConf) -> None:
        self._files, self._prefix = _data_set(conf)
        top = self._files.root / self._prefix
        self.name = top.name
        names = {name.removeprefix(self._prefix) for name in self._files.names() if name.startswith(self._prefix)}
        self._splits = _split_files(names, top)
        for name in (*(f"raw/{name}.csv.gz" for name in RAW), *self._splits.values()):
            if name not in names:
                raise DataError(f"task.root: no {name} in {top}")

    def identity(self) -> list[str]:
        if self._files.root.is_file():
            return [self.name, *stamps([self._files.root])]
        names = [*(f"raw/{name}.csv.gz" for name in RAW), *self._splits.values()]
        return [self.name, *stamps(self._files.root / name for name in names)]

    def read(self) -> tuple[Graphs, dict[Split, Array]]:
        log.info("reading the graphs in %s", self._files.root)
        node_counts = self._raw("num-node-list", np.int64, [MOST_NODES + 1])[:, 0]
        edge_counts = self._raw("num-edge-list", np.int64, [2**32])[:, 0]
        nodes = self._raw("node-feat", np.uint8, ATOM_SIZES)
        ends = self._raw("edge", np.uint16, [MOST_NODES] * 2)
        bonds = self._raw("edge-feat", np.uint8, BOND_SIZES)
        log.info("reading their labels")
        labels = self._raw("graph-label", np.int8, 2, missing=True)
        _agree("num-edge-list", "rows", len(edge_counts), "num-node-list", "rows", len(node_counts))
        _agree("graph-label", "rows", len(labels), "num-node-list", "rows", len(node_counts))
        _agree("node-feat", "rows", len(nodes), "num-node-list", "nodes in all", node_counts.sum())
        _agree("edge", "rows", len(ends), "num-edge-list", "edges in all", edge_counts.sum())
        _agree("edge-feat", "rows", len(bonds), "num-edge-list", "edges in all", edge_counts.sum())
        bare = np.flatnonzero(node_counts == 0)
        if len(bare):
            raise DataError(f"num-node-list.csv.gz:{bare[0] + 1}: a graph needs at least one node")
        lone = lone_end(ends, node_counts, edge_counts)
        if lone is not None:
            edge, end, count = lone
            raise DataError(f"edge.csv.gz:{edge + 1}: node {end} in a graph of {count} (they are numbered from 0)")
        splits = self._read_splits(len(node_counts))
        # a bond is one edge in the files
        return Graphs(node_counts, 2 * edge_counts, nodes, *both_ways(ends, bonds), labels), splits

    def _raw(self, name: str, dtype: type[np.generic], sizes: Sequence[int] | int, *, missing: bool = False) -> Array:
        return read_table(self._files, f"{self._prefix}raw/{name}.csv.gz", dtype, sizes, missing=missing)

    def _read_splits(self, graphs: int) -> dict[Split, Array]:
        owner = np.full(graphs, -1)  # which split each graph is in
        names = [name.removeprefix(SPLIT_FOLDER) for name in self._splits.values()]
        splits = {}
        for number, split in enumerate(self._splits):
            found = read_table(self._files, self._prefix + self._splits[split], np.int64, [graphs])[:, 0]
            first = np.zeros(len(found), bool)
            first[np.unique(found, return_index=True)[1]] = True
            again = np.flatnonzero(~first | (owner[found] >= 0))
            if len(again):
                row = again[0]
                other = names[owner[found[row]]] if owner[found[row]] >= 0 else names[number]
                raise DataError(f"{names[number]}:{row + 1}: graph {found[row]} is in {other} already")
            owner[found] = number
            splits[split] = found
        return splits


def _split_files(names: set[str], top: Path) -> dict[Split, str]:
    """Return the file of each split; OGB's name for it if there is no such file."""
    found: dict[Split, str] = {}
    for name in sorted(names):
        stem = name.removeprefix(SPLIT_FOLDER).removesuffix(".csv.gz")
        if name != f"{SPLIT_FOLDER}{stem}.csv.gz":
            continue
        if split := split_named(stem):
            call_split(found, split, name, f"task.root: {top}")
        if resembles_split(stem):
            raise DataError(f"task.root: {name} in {top} is no name of a split (they are train, valid, test)")
    ogb: tuple[tuple[Split, str], ...] = (("train", "train"), ("validation", "valid"), ("test", "test"))
    return {split: found.get(split, f"{SPLIT_FOLDER}{name}.csv.gz") for split, name in ogb}


def _data_set(conf: MolPCBAConf) -> tuple[Archive, str]:
    """Return a directory or a zip, and the path in it to the folder with raw/: empty, or with a slash at its end."""
    given = Path(conf.root or "").expanduser()
    if given.is_file() and given.suffix.lower() != ".zip":
        kinds = "neither a .csv of SMILES and labels, nor a directory or a .zip of OGB"
        raise DataError(f"task.root: {conf.root} is {kinds}")
    disk = given if given.suffix.lower() == ".zip" and given.is_file() else root_of(conf, HOLDS)
    if disk.is_dir():
        tops = entries_below(disk, deep=False)
        zips = [name for name in tops if name.lower().endswith(".zip")]
        folders = [top for top in ("", *tops) if (not top or top.endswith("/")) and (disk / top / "raw").is_dir()]
        if not folders and len(zips) == 1:
            disk = disk / zips[0]
    if disk.is_file():
        names = Zip(disk).names()
        folders = sorted({name[: name.index("raw/")] for name in names if re.match("([^/]+/)?raw/", name)})
    if "" in folders:
        return files_of(disk), ""
    if not folders:
        known = f"it should hold {HOLDS}, {OR_TABLE}"
        raise DataError(f"task.root: no raw/ in {conf.root}, nor in a folder of it ({known})")
    if len(folders) > 1:
        raise DataError(f"task.root: {' and '.join(f[:-1] for f in folders)} are in {conf.root}; name one of them")
    return (Zip(disk), folders[0]) if disk.is_file() else (Folder(disk / folders[0]), "")


def _agree(name: str, what: str, count: int, other: str, others: str, expected: int) -> None:
    if count != expected:
        raise DataError(f"{name}.csv.gz has {count} {what}, but {other}.csv.gz has {expected} {others}")


def lone_end(ends: Array, node_counts: Array, edge_counts: Array) -> tuple[int, int, int] | None:
    """Return the first edge ``[E, 2]`` with an end that its graph lacks: its index, that end, the graph's nodes."""
    count = np.repeat(node_counts, edge_counts)[:, None]  # of each edge's graph
    beyond = ends >= count
    if not beyond.any():
        return None
    edge, side = np.argwhere(beyond)[0]
    return int(edge), int(ends[edge, side]), int(count[edge, 0])


# ---- hub: ogbg-molpcba itself ------------------------------------------------------------------------------------

ROWS = 10_000  # read at once
LABELS = 128


class Hub:
    """``OGB/ogbg-molpcba`` on the Hugging Face hub: 437,929 molecules, 128 assays, split by scaffold."""

    name = "OGB/ogbg-molpcba"

    def identity(self) -> list[str]:
        return [self.name]  # data that were fetched once serve without a network

    def read(self) -> tuple[Graphs, dict[Split, Array]]:
        import datasets  # takes a second, and only this source needs it

        instead = (
            "take task.data=sample for molecules that need no network, or task.data=files task.root=DIR with OGB's "
            "pcba.zip (http://snap.stanford.edu/ogb/data/graphproppred/csv_mol_download/pcba.zip)"
        )
        parts: list[Graphs] = []
        splits: dict[Split, Array] = {}
        start = 0
        for split in SPLITS:
            log.info("fetching the %s graphs of %s", split, self.name)
            with reaching("the Hugging Face hub", instead):
                rows = datasets.load_dataset(self.name, split=split)
            _columns(f"{self.name} {split}", rows.column_names)
            for first in range(0, len(rows), ROWS):
                table = rows.with_format("arrow")[first : first + ROWS]
                parts.append(graphs_of(table, f"{self.name} {split}", first))
            splits[split] = np.arange(start, start + len(rows))
            start += len(rows)
        if not parts:
            raise DataError(f"{self.name}: no rows")
        return Graphs.joined(parts), splits


def _columns(where: str, names: list[str]) -> None:
    for name in ("node_feat", "edge_index", "edge_attr", "y"):
        if name not in names:
            raise DataError(f"{where}: no column {name} (there are {', '.join(sorted(names))})")


def graphs_of(table: Any, where: str, first: int) -> Graphs:
    """Return the graphs of an Arrow table of the hub: columns ``node_feat``, ``edge_index``, ``edge_attr`` and ``y``.

    Raises DataError for a row that is no molecule, which names it by table and number (the first row's is ``first``).
    """
    rows = _Rows(table, where, first)
    node_counts, nodes = rows.matrices("node_feat", ATOM_SIZES)
    edge_counts, bonds = rows.matrices("edge_attr", BOND_SIZES)
    edges = rows.pairs("edge_index", edge_counts)
    label_rows, labels = rows.matrices("y", (2,) * LABELS, missing=True)
    rows.refuse(label_rows != 1, "y", "must be one list")
    rows.refuse(node_counts == 0, "node_feat", "is empty: a graph needs at least one node")
    rows.refuse(node_counts > MOST_NODES, "node_feat", f"has more than {MOST_NODES} nodes")
    if (lone := lone_end(edges, node_counts, edge_counts)) is not None:
        edge, end, count = lone
        row = np.repeat(np.arange(len(edge_counts)), edge_counts)[edge]
        raise rows.error(row, "edge_index", f"holds node {end} in a graph of {count} (they are numbered from 0)")
    features = nodes.astype(np.uint8), edges.astype(np.uint16), bonds.astype(np.uint8)
    return Graphs(node_counts, edge_counts, *features, np.where(np.isnan(labels), MISSING, labels).astype(np.int8))


class _Rows:
    """Columns of lists of lists of numbers, without a loop over the rows."""

    def __init__(self, table: Any, where: str, first: int) -> None:
        self._table, self._where, self._first = table, where, first

    def error(self, row: int, column: str, problem: str) -> DataError:
        return DataError(f"{self._where}, row {self._first + row}: {column} {problem}")

    def refuse(self, bad: Array, column: str, problem: str) -> None:
        """Raise for the first row where ``bad`` ``[rows]`` holds."""
        if bad.any():
            raise self.error(int(np.argmax(bad)), column, problem)

    def lists(self, column: str) -> tuple[Array, Array, Array]:
        """Return how many lists a row has ``[rows]``, how many numbers a list has ``[lists]``, and all numbers."""
        outer = self._table[column].combine_chunks()
        inner = outer.flatten()
        counts, lengths = (a.value_lengths().fill_null(0).to_numpy(zero_copy_only=False) for a in (outer, inner))
        return counts.astype(np.int64), lengths.astype(np.int64), inner.flatten().to_numpy(zero_copy_only=False)

    def matrices(self, column: str, sizes: Sequence[int], *, missing: bool = False) -> tuple[Array, Array]:
        """Return how many lists a row has ``[rows]``, and the numbers of all lists ``[lists, len(sizes)]``, checked."""
        counts, lengths, values = self.lists(column)
        owners = np.repeat(np.arange(len(counts)), counts)  # the row of each list
        if (bad := np.flatnonzero(lengths != len(sizes))).size:
            raise self.error(owners[bad[0]], column, f"has {lengths[bad[0]]} numbers in a list, not {len(sizes)}")
        values = values.reshape(-1, len(sizes))
        if wrong := out_of_range(values, sizes, "missing" if missing else ""):
            at, place, must = wrong
            raise self.error(owners[at], column, f"holds {values[at, place]:g}, it must be {must}")
        return counts, values

    def pairs(self, column: str, expected: Array) -> Array:
        """Return the two lists of each row, ``expected`` ``[rows]`` long, as pairs ``[sum of expected, 2]``."""
        counts, lengths, values = self.lists(column)
        self.refuse(counts != 2, column, "must be two lists")
        self.refuse((lengths.reshape(-1, 2) != expected[:, None]).any(1), column, "and edge_attr differ in length")
        starts = np.cumsum(expected) - expected  # [rows]
        # row r has its senders from 2 starts[r] on, and its receivers behind them
        senders = np.arange(expected.sum()) + np.repeat(starts, expected)
        pairs: Array = values[np.stack((senders, senders + np.repeat(expected, expected)), axis=1)]
        if (pairs < 0).any():
            row = np.repeat(np.arange(len(expected)), expected)[np.argwhere(pairs < 0)[0, 0]]
            raise self.error(row, column, "holds a negative number")
        return pairs
