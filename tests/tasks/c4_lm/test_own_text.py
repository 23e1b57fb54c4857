"""The user's own text, in each format."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caspr_cli.recipe.schema import Source
from caspr_cli.tasks.base import SPLITS, DataError
from caspr_cli.tasks.c4_lm.own import OwnText
from caspr_cli.tasks.c4_lm.sources import Shards, documents
from caspr_cli.tasks.registry import C4LMConf

TEXTS = [f"document {i} " + "word " * 300 for i in range(200)]


def write(file: Path, texts: list[str]) -> Path:
    import pandas

    file.parent.mkdir(parents=True, exist_ok=True)
    name = file.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pandas.DataFrame({"id": range(len(texts)), "text": texts}).to_parquet(file)
        return file
    records: Any = [{"text": text, "url": "x"} for text in texts]
    content = {
        ".txt": "\n\n".join(texts),
        ".jsonl": "\n".join(map(json.dumps, records)),
        ".json": json.dumps(texts, indent=1),
    }[Path(name).suffix]
    (gzip.open if file.suffix == ".gz" else open)(file, "wb").write(content.encode())
    return file


def source(root: Path, **keys: Any) -> Any:
    return documents(C4LMConf(data=Source.files, root=str(root), **keys))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"])
@pytest.mark.parametrize("alone", [True, False])
def test_every_document_is_in_one_split_by_its_content(name: str, alone: bool, tmp_path: Path) -> None:
    file = write(tmp_path / "data" / name, TEXTS)
    (tmp_path / "data" / "README.pdf").write_bytes(b"\xff")
    found = source(file if alone else file.parent)
    assert isinstance(found, OwnText)
    splits = {split: [text.strip() for text in found.split(split)] for split in SPLITS}
    assert sorted(text for texts in splits.values() for text in texts) == sorted(text.strip() for text in TEXTS)
    assert len(splits["train"]) > 150
    assert min(map(len, splits.values())) > 0
    again = source(write(tmp_path / "other" / "b.jsonl", TEXTS[::-1]).parent)  # in another file, another order
    assert {split: sorted(text.strip() for text in again.split(split)) for split in SPLITS} == {
        split: sorted(texts) for split, texts in splits.items()
    }


def test_names_of_files_or_folders_say_the_split(tmp_path: Path) -> None:
    write(tmp_path / "wiki.train.txt", TEXTS[:5])
    write(tmp_path / "valid" / "part1.jsonl", TEXTS[5:15])
    found = source(tmp_path)
    assert [text.strip() for text in found.split("train")] == [text.strip() for text in TEXTS[:5]]
    halves = [*found.split("validation"), *found.split("test")]
    assert sorted(halves) == sorted(TEXTS[5:15])
    write(tmp_path / "more.txt", TEXTS)
    with pytest.raises(DataError, match=r"more\.txt names no split, but"):
        list(source(tmp_path).split("train"))


def test_a_shard_of_c4_is_still_one(tmp_path: Path) -> None:
    write(tmp_path / "c4-train.00000-of-00001.jsonl", TEXTS)
    with pytest.raises(DataError, match="is no name of a shard of C4"):
        source(tmp_path)
    for split in ("train", "validation"):
        write(tmp_path / f"c4-{split}.00000-of-00001.json.gz", TEXTS)
    (tmp_path / "c4-train.00000-of-00001.jsonl").unlink()
    assert isinstance(source(tmp_path), Shards)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n{"txt": "b"}',
            'a.jsonl:2: has no text; a record is a string, or an object with a "text"',
        ),
        ("a.jsonl", '{"text": "a"}\n{', "a.jsonl:2: not JSON"),
        ("a.json", '["a", 3]', "a.json: record 2: has no text"),
        ("a.json", '["a", "b"', "a.json: not JSON"),
        ("a.txt", "", "a.txt: is empty"),
        ("a.txt", "\udcff", "a.txt:1: not UTF-8"),
        ("a.parquet", "PAR", "a.parquet is no Parquet file that can be read"),
        ("a.pdf", "x", "no text in .*: it should hold .txt, .jsonl, .json, .parquet files"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message):
        list(source(tmp_path).split("train"))


def test_a_parquet_file_without_the_column_says_which_it_has(tmp_path: Path) -> None:
    import pandas

    pandas.DataFrame({"content": ["x"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r'has no column "text" \(it has content\)'):
        list(source(tmp_path).split("train"))


@given(st.lists(st.text(alphabet="ab \n", min_size=1), max_size=30))
def test_a_plain_file_loses_no_word(parts: list[str]) -> None:
    import tempfile

    text = "\n".join(parts)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.txt"
        file.write_text(text + "c")
        found = source(file)
        words = sorted(word for split in SPLITS for one in found.split(split) for word in one.split())
    assert words == sorted((text + "c").split())
