"""The sample of measured properties."""

import gzip
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest

from caspr_cli.tasks.base import DataError
from caspr_cli.tasks.ogbg_molpcba import measured
from caspr_cli.tasks.ogbg_molpcba.data import Library
from caspr_cli.tasks.ogbg_molpcba.features import canonical, parse
from caspr_cli.tasks.ogbg_molpcba.graphs import MISSING
from caspr_cli.tasks.ogbg_molpcba.measured import LABELS, PROPERTIES, Measured, labels_of, split_of
from caspr_cli.tasks.ogbg_molpcba.sources import SPLITS
from caspr_cli.tasks.registry import MolPCBAConf


@pytest.mark.release
def test_true_sample():
    library = Library(MolPCBAConf())
    found = library.describe()
    assert (found["name"], found["source"], found["labels"]) == ("chemicals", "sample", 128)
    sizes = found["splits"]
    total = {key: sum(sizes[split][key] for split in SPLITS) for key in sizes["train"]}
    assert 20_000 < total["graphs"] < 23_000
    assert total["nodes"] / total["graphs"] == pytest.approx(13.3, abs=0.3)
    assert total["observed"] / (128 * total["graphs"]) == pytest.approx(0.254, abs=0.02)
    assert total["positive"] / total["observed"] == pytest.approx(0.207, abs=0.01)
    for split, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
        assert sizes[split]["graphs"] / total["graphs"] == pytest.approx(share, abs=0.01)
        assert sizes[split]["scored_labels"] == 128


# A package of the same files: 30 alcohols of 1..30 carbons with a few properties, and some that are left out.
ALCOHOLS = [(f"{n}-00-0", "C" * n + "O") for n in range(1, 31)]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Small files in the place of the package's."""
    others = [("7732-18-5", "O"), ("91-00-0", "C1CC"), ("92-00-0", "OCC"), ("93-00-0", "CCCC=O")]
    # ethanol again under another number, in the other file; and a compound of which nothing was measured
    listed = {measured.IDENTIFIERS[0]: ALCOHOLS + others[:2], measured.IDENTIFIERS[1]: others[2:]}
    tables = {name: ["CAS", *(c for n, c in PROPERTIES if n == name)] for name, _ in PROPERTIES}
    lines = {name: ["\t".join(columns)] for name, columns in tables.items()}
    for number, (cas, _) in enumerate([*ALCOHOLS, *others[:3]]):
        for name, columns in tables.items():
            values = ["" if (number + place) % 3 == 0 else str(number + 1) for place, _ in enumerate(columns[1:])]
            lines[name].append("\t".join([cas, *values]))
    for name, rows in listed.items():
        lines[name] = [f"1\t{cas}\tCH\t1.0\t{smiles}\tname\tsynonym" for cas, smiles in rows]
    for name, text in lines.items():
        path = tmp_path / "chemicals" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{line}\n" for line in text).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)

    class File:
        def __init__(self, name):
            self.name = f"chemicals/{name}"

        def __str__(self):
            return self.name

        def locate(self):
            return tmp_path / self.name

    monkeypatch.setattr(measured, "files", lambda _: [File(name) for name in lines])


def test_molecules_without_carbon_without_structure_and_twice_are_left_out(package):
    graphs, splits = Measured().read()
    assert len(graphs.node_counts) == 30
    assert sorted(graphs.node_counts.tolist()) == list(range(2, 32))
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(30))
    for split, places in splits.items():
        assert {split_of("C" * (graphs.node_counts[i] - 1) + "O") for i in places} <= {split}
    assert graphs.labels.shape == (30, 128)


def test_a_compound_with_two_numbers_has_the_values_of_both(package):
    source = Measured()
    rows = source._measured()
    ethanol, again = rows["2-00-0"], rows["92-00-0"]
    assert np.isnan(ethanol).any()
    assert (np.isnan(ethanol) & ~np.isnan(again)).any()
    graphs, _ = source.read()
    labels = graphs.labels[1]
    expected = ~(np.isnan(ethanol) & np.isnan(again))
    assert [labels[j] != MISSING for j, _ in enumerate(LABELS)] == [expected[p] for p, _ in LABELS]


def test_a_package_without_the_tables(package, monkeypatch):
    monkeypatch.setattr(measured, "files", lambda _: [])
    expected = rf"^task\.data=sample: no .*\.tsv in chemicals {version('chemicals')} \(1\.5\.2 has it\)$"
    with pytest.raises(DataError, match=expected):
        Measured().read()


def test_no_package(monkeypatch):
    def none(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(measured, "version", none)
    expected = r"^task\.data=sample: needs the package chemicals \(pip install chemicals\)$"
    with pytest.raises(DataError, match=expected):
        Measured()


def test_128_labels_of_which_none_says_what_another_says():
    assert len(LABELS) == len(set(LABELS)) == 128


def test_labels_are_beyond_a_quantile_of_the_training_values():
    values = np.full((1100, len(PROPERTIES)), np.nan)
    values[0, 1:] = 1.0  # a threshold needs one value
    values[:1000, 0] = np.random.default_rng(0).permutation(1000)
    values[1000:1050, 0] = 5000.0  # validation: must move no threshold
    labels = labels_of(values, np.arange(1000))
    assert (labels[1050:] == MISSING).all()
    assert (labels[1:, [p != 0 for p, _ in LABELS]] == MISSING).all()
    for label, (place, q) in enumerate(LABELS):
        if place == 0:
            beyond = values[:1000, 0] < q * 999 if q < 0.5 else values[:1000, 0] > q * 999
            assert labels[:1000, label].tolist() == beyond.tolist()
            assert set(labels[1000:1050, label]) == {int(q >= 0.5)}
            assert labels[:1000, label].mean() == pytest.approx(min(q, 1 - q), abs=2e-3)


def test_split_by_hash():
    names = [canonical(parse("C" * n + "O" * m))[1] for n in range(1, 40) for m in range(1, 40)]
    found = [split_of(name) for name in names]
    assert [found.count(split) / len(names) for split in SPLITS] == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    # as it was on the first day: another hash would be another data set
    for split, lengths in (("validation", [3, 4, 5]), ("test", [17, 28, 29])):
        assert [n for n in range(1, 31) if split_of("C" * n) == split] == lengths
