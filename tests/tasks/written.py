"""Small data sets in the real formats, and small recipes over them."""

import gzip
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from caspr_cli.recipe.schema import Source, TaskConf
from caspr_cli.tasks import registry
from caspr_cli.tasks.base import Split, Task
from caspr_cli.tasks.ogbg_molpcba.graphs import ATOM_SIZES, BOND_SIZES
from caspr_cli.tasks.registry import Augment, Images

# ---- text ----------------------------------------------------------------------------------------------------------

WORDS = "the of and a to in is you that it he was for on are as with his they at be this have from or one"


def write_shard(path: Path, texts: list[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text, "url": "http://example.org"}) + "\n")


def prose(count: int, seed: int) -> list[str]:
    """Documents of 40 words each."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS.split(), k=40)) + f" № {i}." for i in range(count)]


def write_shards(root: Path) -> Path:
    """Two training shards (40 + 20 documents) and one of validation (21)."""
    root.mkdir()
    texts = prose(60, seed=0)
    write_shard(root / "c4-train.00000-of-00002.json.gz", texts[:40])
    write_shard(root / "c4-train.00001-of-00002.json.gz", texts[40:])
    write_shard(root / "c4-validation.00000-of-00001.json.gz", prose(21, seed=1))
    return root


# ---- treebanks -----------------------------------------------------------------------------------------------------

TAGS = {"the": "DET", "a": "DET", "cat": "NOUN", "dog": "NOUN", "sleeps": "VERB", "sees": "VERB", "big": "ADJ"}


def conllu(sentences: list[list[tuple[str, str]]]) -> str:
    """The text of a file; XPOS is UPOS in small letters."""
    blocks = []
    for number, sentence in enumerate(sentences):
        rows = [
            f"{i}\t{word}\t{word}\t{tag}\t{tag.lower()}\t_\t0\troot\t_\t_"
            for i, (word, tag) in enumerate(sentence, start=1)
        ]
        text = " ".join(word for word, _ in sentence)
        blocks.append("\n".join([f"# sent_id = {number}", f"# text = {text}", *rows]) + "\n\n")
    return "".join(blocks)


def sentences(count: int, seed: int, extra: str = "") -> list[list[tuple[str, str]]]:
    """Sentences of 3 to 9 words; ``extra`` goes to the end of each as a NOUN, with the sentence's number."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        words = draw.choices(list(TAGS), k=draw.randint(3, 9))
        found.append([(word, TAGS[word]) for word in words] + [(f"{extra}{number}", "NOUN")] * bool(extra))
    return found


def write_treebank(root: Path, code: str = "xx_small") -> Path:
    """40 / 10 / 10 sentences; validation and test have a word each that training has not."""
    root.mkdir(exist_ok=True)
    for part, count in [("train", 40), ("dev", 10), ("test", 10)]:
        text = conllu(sentences(count, seed=count + len(part), extra="" if part == "train" else part))
        (root / f"{code}-ud-{part}.conllu").write_text(text, encoding="utf8")
    return root


# ---- images --------------------------------------------------------------------------------------------------------


def write_image(path: Path, shade: int, size: tuple[int, int] = (8, 8)) -> None:
    """A grey of this shade, with a little noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(shade).integers(0, 5, (size[1], size[0], 3))
    Image.fromarray((shade + noise).astype(np.uint8)).save(path)


def write_folder(root: Path) -> Path:
    """Three classes with 10 training and 2 test images each, PNG and JPEG, of 8 x 8 pixels."""
    for label, name in enumerate(("cat", "dog", "emu")):
        for i in range(10):
            write_image(root / "train" / name / f"{i}.{'png' if i % 2 else 'jpg'}", 80 * label + i)
        for i in range(2):
            write_image(root / "test" / name / f"{i}.png", 80 * label + 20 + i)
    return root


def write_fashion(root: Path) -> None:
    """Fashion-MNIST as torchvision leaves it, with 40 training and 10 test images."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 40), ("t10k", 10)):
        header = struct.pack(">4I", 0x803, count, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + bytes(i % 251 for i in range(28 * 28 * count)))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 0x801, count) + bytes(i % 10 for i in range(count))
        )


# ---- molecules -----------------------------------------------------------------------------------------------------

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


def write_molecules(root: Path, tables: Tables | None = None) -> Path:
    for name, lines in (tables or molecule_tables()).items():
        path = root / f"{name}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode("utf8", "surrogateescape")))
    return root


# ---- tasks -------------------------------------------------------------------------------------------------------

FOLDER = {"images": Images.folder, "size": 8, "augment": Augment.none}
SMALL: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    # for each task how its data are written, and the keys of a small model
    "c4_lm": (write_shards, {"vocab_size": 300, "sequence": 16, "layers": 2, "width": 16, "heads": 2}),
    "ud_pos": (write_treebank, {"layers": 2, "width": 16, "heads": 2, "dropout": 0.0}),
    "ogbg_molpcba": (write_molecules, {"width": 8, "steps": 2}),
    "resnet": (write_folder, {**FOLDER, "depth": 10, "width": 4, "stem": 4}),
    "vit": (write_folder, {**FOLDER, "patch": 4, "layers": 2, "width": 16, "heads": 2}),
}


def recipe(name: str, root: Path | None, /, **changes: Any) -> TaskConf:
    """A small recipe of the task ``name`` over the data at ``root``."""
    small = {"data": Source.files, "root": root and str(root), "batch_size": 4, **SMALL[name][1]}
    conf: TaskConf = registry.CONFS[name](**{**small, **changes})
    return conf


def batch_of(task: Task, count: int, split: Split = "train", step: int = 1) -> Any:
    """A batch of every ``step``-th of the first ``count`` samples."""
    data: Any = task.dataset(split)
    return task.collate([data[i] for i in range(0, count, step)])
