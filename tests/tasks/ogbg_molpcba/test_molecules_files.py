"""OGB's files: what is read from them, and what is said of whatever is wrong with them."""

import gzip
import os
import re
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from caspr_cli.recipe.schema import Source
from caspr_cli.tasks.archives import Folder
from caspr_cli.tasks.base import DataError
from caspr_cli.tasks.ogbg_molpcba import tables as tables_module
from caspr_cli.tasks.ogbg_molpcba.data import Library
from caspr_cli.tasks.ogbg_molpcba.graphs import MISSING
from caspr_cli.tasks.ogbg_molpcba.sources import SPLITS, molecules
from caspr_cli.tasks.registry import MolPCBAConf


def rows(lines):
    return [[float(cell) if cell not in ("", "nan") else MISSING for cell in line.split(",")] for line in lines]


def test_every_number_of_the_files_is_in_its_graph(conf, tables):
    library = Library(conf())
    nodes, bonds = iter(rows(tables["raw/node-feat"])), iter(rows(tables["raw/edge-feat"]))
    edges, labels = iter(rows(tables["raw/edge"])), iter(rows(tables["raw/graph-label"]))
    sets = {split: library.dataset(split) for split in SPLITS}
    graphs = [graph for split in SPLITS for graph in sets[split]]  # the splits are in the order of the files
    assert [len(sets[split]) for split in SPLITS] == [12, 4, 4]
    for i, graph in enumerate(graphs):
        n, b = int(tables["raw/num-node-list"][i]), int(tables["raw/num-edge-list"][i])
        assert graph.nodes.tolist() == [next(nodes) for _ in range(n)]
        forth = [next(edges) for _ in range(b)]
        assert graph.edges[0::2].tolist() == forth
        assert graph.edges[1::2].tolist() == [end[::-1] for end in forth]
        features = [next(bonds) for _ in range(b)]
        assert graph.bonds[0::2].tolist() == graph.bonds[1::2].tolist() == features
        assert graph.labels.tolist() == next(labels)
    assert any(MISSING in graph.labels for graph in graphs)
    assert all(next(rest, None) is None for rest in (nodes, bonds, edges, labels))


def test_files_are_the_same_read_by_the_line_and_at_once(conf, monkeypatch):
    whole = molecules(conf()).read()
    monkeypatch.setattr(tables_module, "BLOCK", 1)
    graphs, splits = molecules(conf()).read()
    assert all(np.array_equal(a, b) for a, b in zip(vars(graphs).values(), vars(whole[0]).values(), strict=True))
    assert all(np.array_equal(splits[split], whole[1][split]) for split in SPLITS)


def test_lines_may_end_as_on_windows_and_the_last_without_an_end(conf, tables):
    expected = Library(conf()).meta["hash"]
    for name, lines in tables.items():
        tables[name] = ["\r\n".join(lines)]
    library = Library(conf())
    assert library.meta["hash"] == expected


def test_blocks_are_whole_lines_with_their_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_module, "BLOCK", 1)
    path = tmp_path / "x.csv.gz"
    text = b"".join(b"%d,1\n" % i for i in range(300_000))  # more than two pieces
    path.write_bytes(gzip.compress(text[:-1], 1))
    blocks = list(tables_module._blocks(Folder(tmp_path), path.name))
    assert len(blocks) > 2
    assert b"".join(block for _, block in blocks) == text
    assert all(block.endswith(b"\n") and block.startswith(b"%d," % (line - 1)) for line, block in blocks)


def zipped(root, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in root.rglob("*.gz"):
            archive.write(file, file.relative_to(root.parent))
    return path


def test_root_may_be_the_directory_above_or_a_zip(conf, tmp_path):
    small = conf()
    root = Path(small.root)
    expected = Library(small).describe()
    assert expected["name"] == "pcba"
    assert Library(conf(root=str(tmp_path))).describe() == expected
    archive = zipped(root, tmp_path / "pcba.zip")
    assert Library(MolPCBAConf(data=Source.files, root=str(archive))).describe() == expected
    alone = tmp_path / "alone"
    alone.mkdir()
    archive.rename(alone / "pcba.zip")
    assert Library(MolPCBAConf(data=Source.files, root=str(alone))).describe() == expected


# ---- what is wrong with a directory -------------------------------------------------------------------------------


def message(root):
    with pytest.raises(DataError) as found:
        Library(MolPCBAConf(data=Source.files, root=str(root))).check()
    text = str(found.value)
    assert "\n" not in text
    return text


def test_errors_of_the_root(tmp_path, tables, write):
    assert message(tmp_path) == (
        f"task.root: no raw/ in {tmp_path}, nor in a folder of it "
        "(it should hold raw/ and split/scaffold/ of OGB's pcba.zip, or task.root should be a .csv file of SMILES and "
        "labels)"
    )
    (tmp_path / "notes.txt").write_text("no table")
    assert message(tmp_path / "notes.txt").startswith(f"task.root: {tmp_path}/notes.txt is neither a .csv of SMILES")
    root = write(tables)
    assert message(root / "raw/edge.csv.gz").startswith("edge.csv.gz: no column smiles (it has ")
    shutil.copytree(root, tmp_path / "hiv")
    assert message(tmp_path) == f"task.root: hiv and pcba are in {tmp_path}; name one of them"
    (root / "raw/edge.csv.gz").unlink()
    assert message(root) == f"task.root: no raw/edge.csv.gz in {root}"
    shutil.rmtree(root / "raw")
    (root / "raw").write_text("a file")
    assert message(root).startswith(f"task.root: no raw/ in {root}")


# ---- what is wrong with a file ------------------------------------------------------------------------------------

ATOM = "5,0,0,0,0,0,0,0,0"
NUMBER = "it must be a whole number from 0 to"
MALFORMED = [  # file, line from 1, what it becomes, message
    ("raw/node-feat", 3, "1,2,3", "3 columns, not 9"),
    ("raw/node-feat", 3, f"{ATOM},1", "10 columns, not 9"),
    ("raw/node-feat", 1, "", "1 columns, not 9"),
    ("raw/node-feat", 4, "5,x,0,0,0,0,0,0,0", f"column 2 is 'x', {NUMBER} 4"),
    ("raw/node-feat", 4, "\udcff,0,0,0,0,0,0,0,0", f"column 1 is '\ufffd', {NUMBER} 118"),
    ("raw/node-feat", 2, "5,0,0,0,,0,0,0,0", f"column 5 is '', {NUMBER} 9"),
    ("raw/node-feat", 2, "119,0,0,0,0,0,0,0,0", f"column 1 is '119', {NUMBER} 118"),
    ("raw/edge-feat", 5, "0,0,0.5", f"column 3 is '0.5', {NUMBER} 1"),
    ("raw/edge-feat", 5, '0,"0",1', f"column 2 is '\"0\"', {NUMBER} 5"),
    ("raw/edge", 1, "0,-1", f"column 2 is '-1', {NUMBER} 65535"),
    ("raw/edge", 2, "0,9", "node 9 in a graph of "),
    ("raw/num-edge-list", 2, "1e", f"column 1 is '1e', {NUMBER} "),
    ("raw/graph-label", 7, "0.0,,2.0,,", f"column 3 is '2.0', {NUMBER} 1, or empty"),
    ("raw/graph-label", 7, "0.0,,no,,", f"column 3 is 'no', {NUMBER} 1, or empty"),
    ("split/scaffold/valid", 2, "20", f"column 1 is '20', {NUMBER} 19"),
    ("split/scaffold/valid", 5, "13", "graph 13 is in valid.csv.gz already"),
    ("split/scaffold/test", 1, "3", "graph 3 is in train.csv.gz already"),
]


@pytest.mark.parametrize(("name", "line", "text", "expected"), MALFORMED)
def test_malformed_lines_are_named(write, tables, name, line, text, expected):
    tables[name][line - 1 : line] = [text]
    assert message(write(tables)).startswith(f"{name.rpartition('/')[2]}.csv.gz:{line}: {expected}")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("edge", "0,1", r"edge\.csv\.gz has \d+ rows, but num-edge-list\.csv\.gz has \d+ edges in all"),
        ("edge-feat", "0,0,0", r"edge-feat\.csv\.gz has \d+ rows, but num-edge-list\.csv\.gz has \d+ edges"),
        ("node-feat", ATOM, r"node-feat\.csv\.gz has \d+ rows, but num-node-list\.csv\.gz has \d+ nodes in all"),
        ("num-node-list", "3", r"num-edge-list\.csv\.gz has 20 rows, but num-node-list\.csv\.gz has 21 rows"),
        ("graph-label", "0,0,0,0,0", r"graph-label\.csv\.gz has 21 rows, but num-node-list\.csv\.gz has 20 rows"),
    ],
)
def test_files_that_do_not_agree_are_named(write, tables, name, text, expected):
    tables[f"raw/{name}"].append(text)
    assert re.match(expected, message(write(tables)))


def test_a_graph_without_nodes(write, tables):
    count = int(tables["raw/num-node-list"][0])
    assert count == 1  # and no edges
    tables["raw/num-node-list"][0] = "0"
    del tables["raw/node-feat"][0]
    assert message(write(tables)) == "num-node-list.csv.gz:1: a graph needs at least one node"


def test_a_split_that_cannot_be_scored_is_refused(write, tables):
    for i in range(12, 16):
        tables["raw/graph-label"][i] = "1,1,1,,"
    expected = "pcba: no label of the validation split has both a 0 and a 1: there is nothing to score"
    assert message(write(tables)) == expected


# ---- the cache ----------------------------------------------------------------------------------------------------


def test_what_is_built_is_built_again_when_a_file_changes(conf, tables, write):
    small = conf()
    first = Library(small)
    first.check()
    tables["raw/graph-label"][0] = "1,1,1,1,1"
    os.utime(write(tables) / "raw/graph-label.csv.gz", (time.time() + 5,) * 2)
    changed = Library(small)
    assert changed.directory != first.directory
    assert changed.meta["hash"] != first.meta["hash"]


# ---- real ones ----------------------------------------------------------------------------------------------------


def test_toxcast(shared):
    library = Library(MolPCBAConf(data=Source.files, root=str(shared / "molecules/ogb_layout/toxcast128")))
    found = library.describe()
    assert found["name"] == "toxcast128"
    assert found["labels"] == 128
    assert {split: sizes["graphs"] for split, sizes in found["splits"].items()} == {
        "train": 6863,
        "validation": 857,
        "test": 859,
    }
    assert {sizes["scored_labels"] for sizes in found["splits"].values()} == {128}
    observed = sum(sizes["observed"] for sizes in found["splits"].values())
    positive = sum(sizes["positive"] for sizes in found["splits"].values())
    assert observed / (8579 * 128) == pytest.approx(0.537, abs=5e-4)
    assert positive / observed == pytest.approx(0.125, abs=5e-4)
