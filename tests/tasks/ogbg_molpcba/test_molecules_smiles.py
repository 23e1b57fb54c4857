"""A CSV file of SMILES and labels."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from caspr_cli.recipe.schema import Source
from caspr_cli.tasks import own
from caspr_cli.tasks.base import SPLITS, DataError
from caspr_cli.tasks.ogbg_molpcba.sources import molecules
from caspr_cli.tasks.registry import MolPCBAConf

pytest.importorskip("rdkit")
ROWS = [f"{'C' * (i % 30 + 1)}O,m{i},{i % 2},{'' if i % 3 else 1}" for i in range(90)]


def read(file: Path, text: str):
    (gzip.open if file.suffix == ".gz" else open)(file, "wb").write(text.encode())
    return molecules(MolPCBAConf(data=Source.files, root=str(file))).read()


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_molecules_are_dealt_out_by_structure(name: str, tmp_path: Path) -> None:
    graphs, splits = read(tmp_path / name, "\n".join(["SMILES,id,toxic,soluble", *ROWS, ""]))
    assert graphs.labels.shape == (90, 2)
    assert graphs.labels[:4].tolist() == [[0, 1], [1, -1], [0, -1], [1, 1]]
    assert graphs.node_counts[:3].tolist() == [2, 3, 4]
    assert sorted(np.concatenate([splits[s] for s in SPLITS])) == list(range(90))
    assert min(map(len, splits.values())) > 0
    split_of = {i % 30: s for s in SPLITS for i in splits[s]}
    assert all(split_of[i % 30] == s for s in SPLITS for i in splits[s])  # the same molecule: the same split


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,y\nC,1", r"a\.csv: no column smiles \(it has name, y\); it should have a first line of names"),
        ("smiles,y\nC,1\n\nxyz,0", r"a\.csv:4: 'xyz' is no SMILES of a molecule"),
        ("smiles,y\nC,1\nCC,2", r"a\.csv:3: y is '2', and should be 0, 1 or empty"),
        ("smiles,y\nC,1\nCC", r"a\.csv:3: 1 values, but 2 names in the first line"),
        ("smiles,y\nC,high", r"a\.csv: no column of labels \(y begins with 'high'\); it should"),
        ("smiles,y\n", r"a\.csv: has no molecules"),
        ("", r"a\.csv: is empty"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^{message}"):
        read(tmp_path / "a.csv", text)
    with pytest.raises(DataError, match=f"^{message}"):
        own.check(MolPCBAConf(data=Source.files, root=str(tmp_path / "a.csv")))
