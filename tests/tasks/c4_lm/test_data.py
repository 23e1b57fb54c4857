"""The sources, the token files and their cache, and the windows."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from caspr_cli.recipe.schema import Source
from caspr_cli.tasks.base import DataError
from caspr_cli.tasks.c4_lm import sources, tokens
from caspr_cli.tasks.c4_lm.data import Corpus, Windows
from caspr_cli.tasks.c4_lm.sources import documents
from caspr_cli.tasks.c4_lm.tokens import END, SPLITS, byte_lengths, train_tokenizer
from caspr_cli.tasks.registry import C4LMConf


def ids_of(corpus, split):
    return np.fromfile(corpus.directory / f"{split}.bin", dtype=corpus.meta["dtype"]).tolist()


# ---- sample -----------------------------------------------------------------------------------------------------


@pytest.mark.release
def test_true_sample():
    source = documents(C4LMConf())
    texts = {split: list(source.split(split)) for split in SPLITS}
    sizes = {split: sum(map(len, texts[split])) for split in SPLITS}
    assert sum(sizes.values()) > 1_500_000
    assert min(sizes["validation"], sizes["test"]) > 30_000

    # disjoint by document, and in every paragraph long enough to matter
    paragraphs = {
        split: {p for text in texts[split] for p in text.split("\n\n") if len(p) >= sources.LONG} for split in SPLITS
    }
    for one, other in [("train", "validation"), ("train", "test"), ("validation", "test")]:
        assert not set(texts[one]) & set(texts[other])
        assert not paragraphs[one] & paragraphs[other]


def test_sample_splits_do_not_depend_on_order_or_neighbours(library, monkeypatch):
    def texts():
        return {split: set(documents(C4LMConf()).split(split)) for split in SPLITS}

    before = texts()
    assert all(before.values())
    monkeypatch.setattr(sources.os, "walk", lambda root, walk=os.walk: reversed(list(walk(root))))
    assert texts() == before
    monkeypatch.undo()
    gone = library / "email" / "module1.py"
    monkeypatch.setattr(sources, "stdlib_root", lambda: library)
    monkeypatch.setattr(sources, "stdlib_topics", lambda: {"if": "The if statement.", "for": "The for statement."})
    lost = gone.read_text(encoding="utf-8").strip('"\n')
    gone.unlink()
    assert texts() == {split: before[split] - {lost} for split in SPLITS}


def test_sample_skips_tests_and_what_is_installed(library):
    for folder in ("test", "email/tests", "site-packages/numpy"):
        (library / folder).mkdir(parents=True)
        (library / folder / "module.py").write_text('"""Not English of the library."""')
    source = documents(C4LMConf())
    assert not any("Not English" in text for split in SPLITS for text in source.split(split))
    assert not any("site-packages" in line or "test" in line for line in source.identity())


def test_repeated_long_paragraphs_are_left_out_and_short_ones_stay(library):
    long = "A paragraph that is long enough to be remembered, word for word, by whoever has read it before."
    for i in range(3):
        (library / f"twin{i}.py").write_text(f'"""Short.\n\n{long}"""')
    found = [text for split in SPLITS for text in documents(C4LMConf()).split(split)]
    assert sum(long in text for text in found) == 1
    assert sum("Short." in text for text in found) == 3


def test_docstrings_come_in_source_order():
    source = b'''"""Module."""
class A:
    """Class."""
    def f(self):
        """Method."""
async def g():
    """Function, \\ud800."""
'''
    assert sources.docstrings(source) == "Module.\n\nClass.\n\nMethod.\n\nFunction, ?."
    assert sources.docstrings(b"def (") == ""
    assert sources.docstrings(b"\x00") == ""


def test_sample_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "stdlib_root", lambda: tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"^task\.data=sample: this Python comes without the sources"):
        Corpus(C4LMConf()).check()


def test_sample_start_reads_nothing_twice(library, monkeypatch):
    first = Corpus(C4LMConf(vocab_size=300, sequence=8))
    first.check()
    monkeypatch.setattr(sources, "docstrings", lambda _: pytest.fail("parsed again"))
    second = Corpus(C4LMConf(vocab_size=300, sequence=8))
    assert second.directory == first.directory


# ---- files ------------------------------------------------------------------------------------------------------


def test_shards_are_read_in_order_and_validation_is_halved(conf, shards):
    source = documents(conf())
    train = list(source.split("train"))
    assert len(train) == 60
    assert train[0].endswith("№ 0.")
    assert train[-1].endswith("№ 59.")
    validation, test = list(source.split("validation")), list(source.split("test"))
    assert (len(validation), len(test)) == (11, 10)
    assert not set(validation) & set(test)


def test_limits_take_the_first_documents_of_each_split(conf):
    everything, few = documents(conf()), documents(conf(train_documents=5, eval_documents=3))
    for split, count in [("train", 5), ("validation", 3), ("test", 3)]:
        assert list(few.split(split)) == list(everything.split(split))[:count]


def test_real_shards(shared):
    source = documents(C4LMConf(data=Source.files, root=str(shared / "c4" / "en"), train_documents=200))
    assert len(list(source.split("train"))) == 200
    assert abs(len(list(source.split("validation"))) - len(list(source.split("test")))) <= 1


# ---- hub --------------------------------------------------------------------------------------------------------


def hub(**changes):
    return C4LMConf(**{"data": Source.hub, "train_documents": 5, "eval_documents": 2, "vocab_size": 300, **changes})


@pytest.mark.parametrize("key", ["train_documents", "eval_documents"])
def test_hub_needs_numbers_of_documents(key):
    with pytest.raises(DataError, match=rf"^task\.{key}: "):
        documents(hub(**{key: None}))


def test_hub_takes_the_first_documents_once(monkeypatch):
    import datasets

    def load(path, name, *, split, streaming):
        assert (path, name, streaming) == ("allenai/c4", "en", True)
        return ({"text": f"{split} document number {i}, a text of some words"} for i in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = documents(hub())
    found = [text.split(",")[0] for text in source.split("validation")]
    assert found == [f"validation document number {number}" for number in (0, 2)]
    assert next(source.split("test")).startswith("validation document number 1,")
    first = Corpus(hub(sequence=4))
    first.check()
    assert first.meta["splits"]["train"]["documents"] == 5
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("fetched again"))
    assert Corpus(hub(sequence=4)).directory == first.directory


# ---- token files ------------------------------------------------------------------------------------------------


def test_round_trip_and_end_of_documents(conf):
    corpus = Corpus(conf())
    tokenizer, end = corpus.tokenizer, corpus.tokenizer.token_to_id(END)
    for split in SPLITS:
        ids, texts = ids_of(corpus, split), list(documents(conf()).split(split))
        assert ids.count(end) == len(texts)
        assert ids[-1] == end
        assert tokenizer.decode(ids, skip_special_tokens=False) == "".join(text + END for text in texts)
        meta = corpus.meta["splits"][split]
        assert meta["tokens"] == len(ids)
        assert meta["documents"] == len(texts)
        assert meta["bytes"] == sum(len(text.encode()) for text in texts)
        assert meta["bytes"] == sum(corpus.byte_lengths()[ids].tolist())


def test_a_document_that_spells_out_the_end_is_text(conf, shards):
    with gzip.open(shards / "c4-train.00002.json.gz", "wt") as file:
        file.write(json.dumps({"text": f"see {END}, ok"}) + "\n" + json.dumps({"text": ""}) + "\n")
    corpus = Corpus(conf())
    ids = ids_of(corpus, "train")
    assert ids.count(corpus.tokenizer.token_to_id(END)) == corpus.meta["splits"]["train"]["documents"] == 62
    assert corpus.meta["splits"]["train"]["bytes"] == sum(corpus.byte_lengths()[ids].tolist())


def test_tokenizer_is_trained_on_the_training_split_alone(conf, shards):
    with gzip.open(shards / "c4-validation.00000-of-00001.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": "zyxzyx zyxzyx zyxzyx"}) + "\n" for _ in range(50))
    corpus = Corpus(conf(vocab_size=512))
    direct = train_tokenizer(documents(conf()).split("train"), 512)
    assert corpus.tokenizer.get_vocab() == direct.get_vocab()
    assert not any("zy" in token for token in corpus.tokenizer.get_vocab())


def test_byte_lengths():
    tokenizer = train_tokenizer(["the the the née née"], 262)
    lengths = byte_lengths(tokenizer, 400)
    assert len(lengths) == 400
    assert lengths[tokenizer.token_to_id(END)] == 0
    assert lengths[tokenizer.token_to_id("the")] == 3
    assert not any(lengths[tokenizer.get_vocab_size() :])  # ids the vocabulary does not reach


def test_wide_vocabulary_gets_wider_ids(conf):
    assert Corpus(conf(vocab_size=65_535)).meta["dtype"] == "uint16"
    assert Corpus(conf(vocab_size=65_536)).meta["dtype"] == "uint32"


# ---- cache ------------------------------------------------------------------------------------------------------


def test_second_start_trains_nothing(conf, shards, monkeypatch):
    first = Corpus(conf())
    before = {path: path.stat().st_mtime_ns for path in first.directory.iterdir()}
    assert {path.name for path in before} == {"tokenizer.json", "meta.json", *(f"{split}.bin" for split in SPLITS)}
    monkeypatch.setattr(tokens, "train_tokenizer", lambda *_: pytest.fail("trained again"))
    for shard in shards.iterdir():
        os.utime(shard, (1, 1))  # other times, same content: the documents are read again, no more
    for _ in range(2):
        again = Corpus(conf())
        again.check()
        assert {path: path.stat().st_mtime_ns for path in again.directory.iterdir()} == before


def test_directory_follows_content_and_vocabulary(conf, shards):
    directories = [Corpus(conf()).directory, Corpus(conf(vocab_size=301)).directory]
    directories.append(Corpus(conf(train_documents=59)).directory)
    with gzip.open(shards / "c4-train.00002.json.gz", "wt") as file:
        file.write('{"text": "one more"}\n')
    directories.append(Corpus(conf()).directory)
    assert len(set(directories)) == 4


def test_a_failed_build_leaves_nothing_and_is_repeated(conf, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Corpus(conf()).check()
    assert [path.name for path in (cache / "c4_lm").iterdir()] == [".lock"]
    Corpus(conf()).check()


def test_pointer_to_a_deleted_directory_builds_again(conf):
    directory = Corpus(conf()).directory
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    assert Corpus(conf()).directory == directory
    Corpus(conf()).check()


def test_the_slower_of_two_builds_takes_the_other_ones_files(conf, cache, monkeypatch):
    def encode_while_another_finishes(*args, encode=tokens._encode):
        monkeypatch.setattr(tokens, "_encode", encode)
        Corpus(conf()).check()  # the other process, from beginning to end
        return encode(*args)

    monkeypatch.setattr(tokens, "_encode", encode_while_another_finishes)
    Corpus(conf()).check()
    assert len(list((cache / "c4_lm").glob("[!.]*"))) == 2


def test_cache_root_follows_the_environment(monkeypatch):
    monkeypatch.setenv("CASPR_CACHE", "/a")
    assert tokens.cache_root("c4_lm") == Path("/a/c4_lm")
    monkeypatch.setenv("CASPR_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert tokens.cache_root("c4_lm") == Path("/b/caspr/c4_lm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert tokens.cache_root("c4_lm") == Path("/c/.cache/caspr/c4_lm")


# ---- windows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [5, 8, 9, 12, 13, 17])
def test_windows(tmp_path, count):
    np.arange(count, dtype=np.uint16).tofile(tmp_path / "ids")
    windows = Windows(tmp_path / "ids", "uint16", 4)
    assert len(windows) == (count - 1) // 4
    for i, window in enumerate(windows):
        assert window.dtype == torch.int64
        assert window.tolist() == list(range(4 * i, 4 * i + 5))
    with pytest.raises(IndexError):
        windows[len(windows)]
    assert torch.equal(windows[-1], windows[len(windows) - 1])


@pytest.mark.parametrize(("split", "key"), [("train", "train_documents"), ("validation", "eval_documents")])
def test_split_shorter_than_a_window_names_the_keys(conf, split, key):
    with pytest.raises(DataError, match=rf"^task\.sequence: .*the {split} split.*task\.{key} or give more doc"):
        Corpus(conf(**{key: 1}, sequence=500)).check()


def test_a_split_without_documents_does_not_name_a_limit_that_is_not_set(tmp_path):
    (tmp_path / "a.txt").write_text("one document alone, of a few words")
    own = C4LMConf(data=Source.files, root=str(tmp_path), vocab_size=300, sequence=8)
    with pytest.raises(DataError, match=r"the 0 tokens of the \w+ split; lower task\.sequence or give more documents$"):
        Corpus(own).check()


# ---- long words --------------------------------------------------------------------------------------------------


def long_words():
    """Texts with a word of 2,500 characters, of each kind of character, between others."""
    for word in ("abcdefghij" * 250, "0123456789" * 250, " " * 2500, "=-" * 1250, "é" * 2500):
        yield f"It's here: {word}, and 12 more  of  it."


@pytest.mark.parametrize("text", [*long_words(), "", "a", "ab " * 5000, "x" * tokens.LONGEST_WORD])
def test_a_long_word_is_cut_and_nothing_else(text):
    pieces = tokens.pieces(text)
    assert "".join(pieces) == text
    assert len(pieces) == 1 + 2 * (max(map(len, tokens._words(text)), default=0) > tokens.LONGEST_WORD)
    left_out = len(text) - len(tokens.shortened(text))
    assert left_out in ((0,) if len(pieces) == 1 else (1500, 1501))  # with the space or the comma beside it


def test_cutting_at_the_ends_of_words_changes_no_token(monkeypatch):
    """Parts give the tokens of the whole if it is cut only where a byte-level BPE joins nothing."""
    texts = prose_of_all_kinds()
    tokenizer = train_tokenizer(texts, 400)
    for text in texts:
        words = list(tokens._words(text))
        whole = tokenizer.encode(text).ids
        for at in range(1, len(words)):
            if words[at - 1].isspace():
                continue  # a space goes with what follows it
            parts = ["".join(words[:at]), "".join(words[at:])]
            assert [i for part in parts for i in tokenizer.encode(part).ids] == whole


def prose_of_all_kinds():
    one = "the cat sat on 12 mats, 3 times — größer!", "naïve  spaces\n\n and tabs\t(end)", "x²+y²=z² 北京 2024年"
    return list(one) * 3


def test_a_word_without_end_ends(conf, shards):
    """BPE alone would take hours over these: its time goes with the square of a word's length."""
    with gzip.open(shards / "c4-train.00001-of-00002.json.gz", "wt", compresslevel=1) as file:
        for text in ("a" * 300_000, "".join(np.random.default_rng(0).choice(list("abcdefgh"), 200_000))):
            file.write(json.dumps({"text": text}) + "\n")
    corpus = Corpus(conf())
    corpus.check()
    text = corpus.tokenizer.decode(ids_of(corpus, "train"), skip_special_tokens=True)
    assert "a" * 300_000 in text
