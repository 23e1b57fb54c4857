"""Small treebanks, written in the real format, and the real one where it is at hand."""

import gzip
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from caspr_cli.recipe.schema import Source, TaggingConf

EWT = Path(__file__).resolve().parents[4] / "shared" / "data" / "ud" / "UD_English-EWT"

LEXICON = {"the": "DET", "a": "DET", "cat": "NOUN", "dog": "NOUN", "sleeps": "VERB", "sees": "VERB", "big": "ADJ"}


def conllu(sentences: list[list[tuple[str, str]]], xpos: str | None = None) -> str:
    """The text of a file; XPOS is UPOS in small letters unless it is given."""
    blocks = []
    for number, sentence in enumerate(sentences):
        rows = [
            f"{i}\t{word}\t{word}\t{tag}\t{tag.lower() if xpos is None else xpos}\t_\t0\troot\t_\t_"
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
        words = draw.choices(list(LEXICON), k=draw.randint(3, 9))
        tagged = [(word, LEXICON[word]) for word in words]
        found.append(tagged + [(f"{extra}{number}", "NOUN")] * bool(extra))
    return found


def write_treebank(root: Path, code: str = "xx_small", zipped: bool = False) -> Path:
    """40 / 10 / 10 sentences; validation and test have a word each that training has not."""
    root.mkdir(exist_ok=True)
    for part, count in [("train", 40), ("dev", 10), ("test", 10)]:
        text = conllu(sentences(count, seed=count + len(part), extra="" if part == "train" else part))
        path = root / f"{code}-ud-{part}.conllu"
        if zipped:
            with gzip.open(f"{path}.gz", "wt", encoding="utf8") as file:
                file.write(text)
        else:
            path.write_text(text, encoding="utf8")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The directory of a small treebank."""
    return write_treebank(tmp_path / "treebank")


@pytest.fixture
def conf(root: Path) -> Callable[..., TaggingConf]:
    """Recipes over ``root`` with a small model."""

    def make(**changes: object) -> TaggingConf:
        small = {"layers": 2, "width": 16, "heads": 2, "batch_size": 4, "dropout": 0.0}
        return TaggingConf(**{"data": Source.files, "root": str(root), **small, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def ewt() -> Path:
    """UD English-EWT."""
    if not EWT.is_dir():
        pytest.skip("UD_English-EWT is not at hand")
    return EWT


@pytest.fixture
def treebank_writer() -> Callable[..., Path]:
    """See :func:`write_treebank`."""
    return write_treebank


@pytest.fixture
def to_conllu() -> Callable[..., str]:
    """See :func:`conllu`."""
    return conllu
