"""A cache of its own for each test, and small molecule files in OGB's layout."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from caspr_cli.recipe.schema import MolPCBAConf, Source
from tasks.ogbg_molpcba.graphs import ATOM_SIZES, BOND_SIZES

Tables = dict[str, list[str]]
GRAPHS, LABELS = 20, 5


def molecule_tables(seed: int = 0) -> Tables:
    """Lines of each file: 20 random graphs of up to six atoms, the first of one, with 5 labels; split 12 / 4 / 4."""
    draw = np.random.default_rng(seed)
    names = ("num-node-list", "num-edge-list", "node-feat", "edge", "edge-feat", "graph-label")
    tables: Tables = {f"raw/{name}": [] for name in names}

    def add(name: str, *cells: object) -> None:
        tables[f"raw/{name}"].append(",".join(map(str, cells)))

    for graph in range(GRAPHS):
        nodes = 1 if graph == 0 else int(draw.integers(2, 7))
        edges = 0 if graph == 0 else int(draw.integers(1, 7))
        add("num-node-list", nodes)
        add("num-edge-list", edges)
        for _ in range(nodes):
            add("node-feat", *draw.integers(0, ATOM_SIZES))
        for _ in range(edges):
            add("edge", *draw.choice(nodes, 2, replace=False))
            add("edge-feat", *draw.integers(0, BOND_SIZES))
        # of every four graphs one has all labels 0, one all 1; the others some
        sure = ["0.0"] * LABELS if graph % 4 == 0 else ["1.0"] * LABELS
        add("graph-label", *(sure if graph % 4 < 2 else draw.choice(["0.0", "1.0", "", "nan"], LABELS)))
    for name, places in (("train", range(12)), ("valid", range(12, 16)), ("test", range(16, 20))):
        tables[f"split/scaffold/{name}"] = [str(i) for i in places]
    return tables


def write_molecules(root: Path, tables: Tables) -> Path:
    for name, lines in tables.items():
        path = root / f"{name}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode("utf8", "surrogateescape")))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's arrays go."""
    monkeypatch.setenv("CASPR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ogbg_molpcba"


@pytest.fixture
def tables() -> Tables:
    """What :func:`molecule_tables` gives, to be changed before it is written."""
    return molecule_tables()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Tables], Path]:
    """Write tables as the data set ``tmp_path/pcba``."""
    return lambda tables: write_molecules(tmp_path / "pcba", tables)


@pytest.fixture
def conf(write: Callable[[Tables], Path], tables: Tables) -> Callable[..., MolPCBAConf]:
    """Recipes with a small model over files written from ``tables``."""

    def make(**changes: object) -> MolPCBAConf:
        small = {"width": 8, "steps": 2, "batch_size": 4, "data": Source.files, "root": str(write(tables))}
        return MolPCBAConf(**{**small, **changes})  # type: ignore[arg-type]

    return make
