"""The reader and the sources."""

import gzip
import re
from importlib import metadata
from pathlib import Path
from unittest.mock import Mock

import datasets
import pytest

from caspr_cli.recipe.schema import Source
from caspr_cli.tasks.base import DataError
from caspr_cli.tasks.registry import TaggingConf, Tags
from caspr_cli.tasks.ud_pos import data
from caspr_cli.tasks.ud_pos.conllu import Sentence, read
from caspr_cli.tasks.ud_pos.data import SPLITS, Corpus
from caspr_cli.tasks.ud_pos.sources import treebank

EXAMPLE = """\
# newdoc id = a
# sent_id = 1
# text = vámonos al mar
1-2	vámonos	_	_	_	_	_	_	_	_
1	vamos	ir	VERB	v	_	0	root	_	_
2	nos	nosotros	PRON	p	_	1	obj	_	_
3-4	al	_	_	_	_	_	_	_	_
3	a	a	ADP	s	_	5	case	_	_
4	el	el	DET	d	_	5	det	_	_
5	mar	mar	NOUN	_	_	1	obl	_	_

# text = Sue likes coffee and Bill tea
1	Sue	Sue	PROPN	np	_	2	nsubj	_	_
2	likes	like	VERB	v	_	0	root	0:root	_
2.1	likes	like	VERB	v	_	_	_	0:root	CopyOf=2
3	1 000	1 000	NUM	m	_	2	obj	_	_
"""
WORDS = [["vamos", "nos", "a", "el", "mar"], ["Sue", "likes", "1 000"]]
UPOS = [["VERB", "PRON", "ADP", "DET", "NOUN"], ["PROPN", "VERB", "NUM"]]
XPOS = [["v", "p", "s", "d", "_"], ["np", "v", "m"]]

ROW = "1\tword\tword\tNOUN\tn\t_\t0\troot\t_\t_"


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def refusal(conf):
    """The message about its sentences, which is a line or a few."""
    with pytest.raises(DataError) as caught:
        _ = Corpus(conf).sentences
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


# ---- CoNLL-U ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.rstrip("\n"),
        lambda text: text + "\n\n\n# a comment at the end",
        lambda text: "\ufeff" + text,
        lambda text: "\n\n" + text,
    ],
    ids=["plain", "crlf", "no-final-newline", "trailing-lines", "byte-order-mark", "leading-lines"],
)
def test_reader_takes_syntactic_words(tmp_path, change):
    path = write(tmp_path / "a.conllu", change(EXAMPLE))
    assert list(read(path, Tags.upos)) == list(map(Sentence, WORDS, UPOS))
    assert list(read(path, Tags.xpos)) == list(map(Sentence, WORDS, XPOS))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (ROW.removesuffix("\t_"), "9 columns, not 10"),
        (ROW + "\t_", "11 columns, not 10"),
        (ROW.replace("\t", " "), "1 columns, not 10"),
        ("  ", "1 columns, not 10"),
        ("one" + ROW[1:], "ID is 'one' where 1 comes next"),
        ("2" + ROW[1:], "ID is '2' where 1 comes next"),
        ("01" + ROW[1:], "ID is '01' where 1 comes next"),
        ("1-" + ROW[1:], "ID is '1-' where 1 comes next"),
        ("" + ROW[1:], "ID is '' where 1 comes next"),
        (ROW.replace("word", "", 1), "FORM is empty"),
        (ROW.replace("NOUN", "_"), "'word' has no UPOS"),
        (ROW.replace("NOUN", ""), "'word' has no UPOS"),
    ],
)
def test_malformed_line_names_file_and_line(conf, root, line, message):
    path = write(root / "xx_small-ud-dev.conllu", f"{ROW}\n\n# text = word\n{line}\n\n")
    said = refusal(conf())
    assert said.startswith(f"{path.name}:4: {message}")
    assert "\n" not in said


# ---- sample -----------------------------------------------------------------------------------------------------


def test_sample_is_the_packages_treebank():
    corpus = Corpus(TaggingConf())
    found = corpus.sentences
    assert sum(len(sentence.words) for split in SPLITS for sentence in found[split]) == 81_370
    assert sum(map(len, found.values())) == 4_851
    assert len(found["train"]) / 4_851 == pytest.approx(0.8, abs=0.02)
    texts = {split: {"".join(sentence.words) for sentence in found[split]} for split in SPLITS}
    for one, other in [("train", "validation"), ("train", "test"), ("validation", "test")]:
        assert not texts[one] & texts[other]
    described = corpus.describe()
    assert described["name"].startswith("turkish-treebanks ")
    assert described["tags"] == 14
    assert 0.15 < described["splits"]["validation"]["unknown"] < 0.25


def test_a_split_of_the_sample_depends_on_the_text_alone():
    source = treebank(TaggingConf())
    before = {split: [sentence.words for sentence in source.split(split)] for split in SPLITS}
    assert all(before.values())
    source._sentences.reverse()
    first = source._sentences.pop()
    for split, texts in before.items():
        assert [sentence.words for sentence in source.split(split)] == [w for w in texts[::-1] if w is not first.words]


@pytest.mark.parametrize("broken", ["absent", "no record", "gone"])
def test_sample_without_its_package(monkeypatch, broken):
    class Gone:
        suffix, locate = ".conllu", lambda _: Path("/nowhere/web.conllu")

    def files(package):
        if broken == "absent":
            raise metadata.PackageNotFoundError(package)
        return None if broken == "no record" else [Gone()]

    monkeypatch.setattr(metadata, "files", files)
    with pytest.raises(
        DataError, match=r"^task\.data=sample: .*pip install turkish-treebanks\nor take task\.data=files"
    ):
        treebank(TaggingConf())


# ---- files ------------------------------------------------------------------------------------------------------


def test_files_plain_and_gzipped_are_the_same(conf, root, tmp_path):
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    for path in root.iterdir():
        (zipped / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    one, other = Corpus(conf()), Corpus(conf(root=str(zipped)))
    assert one.sentences == other.sentences
    assert one.describe() == other.describe()
    assert {split: len(one.sentences[split]) for split in SPLITS} == {"train": 40, "validation": 10, "test": 10}


def test_a_split_in_several_files(conf, root):
    train = root / "xx_small-ud-train.conllu"
    text = train.read_text()
    middle = text.index("# sent_id = 17\n")
    (root / "xx_small-ud-train-a.conllu").write_text(text[:middle])
    (root / "xx_small-ud-train-b.conllu").write_text(text[middle:])
    whole = Corpus(conf()).sentences["train"][:40]
    train.unlink()
    assert Corpus(conf()).sentences["train"] == whole


def _column(number, value, parts="train dev test"):
    """Write the same value into a column of all words."""

    def damage(root):
        for path in (root / f"xx_small-ud-{part}.conllu" for part in parts.split()):
            rows = [line.split("\t") for line in path.read_text().splitlines()]
            path.write_text(
                "\n".join("\t".join([*r[:number], value, *r[number + 1 :]]) if len(r) == 10 else r[0] for r in rows)
            )

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "xx_small-ud-train.conllu").unlink(),
         r"task\.root: no xx_small-ud-train\.conllu \(or \.conllu\.gz\) in "),
        (lambda root: (root / "yy_other-ud-test.conllu").touch(),
         r"task\.root: 2 treebanks in .* \(xx_small, yy_other\); give each its own directory$"),
        (lambda root: (root / "xx_small-ud-dev.conllu.gz").touch(),
         r"task\.root: both xx_small-ud-dev\.conllu and xx_small-ud-dev\.conllu\.gz in "),
        (_column(4, "_"), r"task\.tags: xx_small has no xpos in its train split; try the other of upos and xpos$"),
        (_column(1, "_"), r"xx_small: every word is '_': its text is withheld"),
        (_column(4, "X", "dev"), r"xx_small: no tag of the validation split is found in the training split$"),
    ],
)  # fmt: skip
def test_errors_of_a_treebank(conf, root, damage, message):
    damage(root)
    said = refusal(conf(tags=Tags.xpos))
    assert re.match(message, said), said
    assert "\n" not in said


def test_real_treebank(ewt):
    described = Corpus(TaggingConf(data=Source.files, root=str(ewt))).describe()
    assert (described["name"], described["tags"]) == ("en_ewt", 17)
    sizes = [(described["splits"][split]["sentences"], described["splits"][split]["words"]) for split in SPLITS]
    assert sizes == [(12_544, 204_577), (2_001, 25_147), (2_077, 25_094)]
    assert described["splits"]["test"]["unknown"] == pytest.approx(0.091, abs=0.001)
    assert described["vocab_size"] == 19_674 + 2


# ---- hub --------------------------------------------------------------------------------------------------------


NAMES = ["NOUN", "PUNCT", "_", "VERB"]


def hub_dataset(rows, labels=True):
    """A split as the hub has it: a list of words, of labels, of strings."""
    upos = datasets.List(datasets.ClassLabel(names=NAMES)) if labels else datasets.List(datasets.Value("string"))
    strings = datasets.List(datasets.Value("string"))
    features = datasets.Features(
        {"sent_id": datasets.Value("string"), "tokens": strings, "upos": upos, "xpos": strings}
    )
    columns = {"sent_id": [str(i) for i in range(len(rows))]}
    columns |= {key: [row[i] for row in rows] for i, key in enumerate(("tokens", "upos", "xpos"))}
    return datasets.Dataset.from_dict(columns, features=features)


ROWS = [(["Dogs", "bark", "."], [0, 3, 1], ["nns", "vbp", None]), (["Cats"], [0], ["nns"])]


HUB = "universal-dependencies/universal_dependencies"


@pytest.fixture
def hub(monkeypatch):
    """Serves rows, or whole splits, as the hub."""

    def serve(**splits):
        def load(path, name):
            assert (path, name) == (HUB, "en_ewt")
            made = {split: hub_dataset(x) if isinstance(x, list) else x for split, x in splits.items()}
            return datasets.DatasetDict(made)

        monkeypatch.setattr(datasets, "load_dataset", load)
        return TaggingConf(data=Source.hub)

    return serve


@pytest.mark.parametrize("held_out", ["dev", "validation"])
def test_hub(hub, held_out):
    conf = hub(**{"train": ROWS, held_out: ROWS[:1], "test": ROWS[1:]})
    corpus = Corpus(conf)
    assert corpus.sentences["train"] == [
        Sentence(["Dogs", "bark", "."], ["NOUN", "VERB", "PUNCT"]),
        Sentence(["Cats"], ["NOUN"]),
    ]
    assert [len(corpus.sentences[split]) for split in SPLITS] == [2, 1, 1]
    assert corpus.describe()["name"] == f"{HUB} en_ewt"
    conf.tags = Tags.xpos
    assert Corpus(conf).sentences["train"][0].tags == ["nns", "vbp", "_"]


def test_hub_with_tags_as_strings(hub):
    rows = hub_dataset([(["Dogs"], ["NOUN"], ["nns"])], labels=False)
    assert Corpus(hub(train=rows, dev=rows, test=rows)).sentences["train"] == [Sentence(["Dogs"], ["NOUN"])]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((["a"], [-1], ["x"]), "label -1 of upos, which has 4 names"),
        ((["a"], [2], ["x"]), "a word has no UPOS"),
        ((["a"], [None], ["x"]), "a word has no UPOS"),
        ((["a", "b"], [0], ["x"]), "2 words and 1 tags"),
        (([""], [0], ["x"]), "a word is empty"),
    ],
)
def test_hub_with_a_malformed_row(hub, row, message):
    assert refusal(hub(train=[*ROWS, row], dev=ROWS, test=ROWS)) == f"{HUB} en_ewt, train, row 2: {message}"


def test_hub_without_a_split_or_column(hub):
    assert refusal(hub(train=ROWS, test=ROWS)).startswith("task.treebank: en_ewt has no dev split")
    conf = hub(train=hub_dataset(ROWS).remove_columns("xpos"))
    conf.tags = Tags.xpos
    assert refusal(conf).endswith("train: no column 'xpos', only sent_id, tokens, upos")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("BuilderConfig 'en_ewt' not found. Available: ['af_afribooms', ...]"), "task.treebank: "),
        (ValueError("Couldn't find cache for en_ewt\nmore"), "the Hugging Face hub cannot be reached (Couldn't find"),
        (ValueError("something else"), "task.data: the sentences cannot be read (something else)"),
    ],
)
def test_hub_that_does_not_answer(monkeypatch, error, message):
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
    assert refusal(TaggingConf(data=Source.hub)).startswith(message)


# ---- what is said of the data -----------------------------------------------------------------------------------


def test_hash_follows_words_and_tags(conf, root):
    def hash_of(**changes):
        return Corpus(conf(**changes)).describe()["hash"]

    before = hash_of()
    path = root / "xx_small-ud-test.conllu"
    text = path.read_text()
    path.write_text("# another comment\n" + text)
    assert hash_of() == before == hash_of(vocab_size=3)
    assert hash_of(tags=Tags.xpos) != before
    path.write_text(text.replace("\tcat\t", "\tcot\t"))
    assert hash_of() != before


def test_nothing_is_read_before_it_is_asked_for(monkeypatch, conf):
    monkeypatch.setattr(data, "treebank", lambda _: pytest.fail("read"))
    Corpus(conf())


def test_one_file_is_dealt_out_by_the_words_of_its_sentences(tmp_path):
    blocks = [f"1\tw{i}\t_\tNOUN\t_\t_\t0\troot\t_\t_\n\n" for i in range(200)]

    def splits(name, blocks):
        source = treebank(TaggingConf(data=Source.files, root=str(write(tmp_path / name, "".join(blocks)))))
        return {split: {s.words[0] for s in source.split(split)} for split in SPLITS}

    found = splits("one.conllu", blocks)
    assert sorted(map(len, found.values()))[0] > 5
    assert len(found["train"]) > 130
    assert sum(map(len, found.values())) == 200
    assert splits("other.conllu", blocks[::-1]) == found
    with pytest.raises(DataError, match=r"one\.txt is neither a \.conllu"):
        splits("one.txt", blocks)
