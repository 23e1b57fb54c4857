"""The lexicon, the samples and the batches."""

import pytest
import torch
from torch.utils.data import DataLoader

from caspr_cli.tasks.ud_pos.conllu import Sentence
from caspr_cli.tasks.ud_pos.data import (
    BEGIN,
    END,
    HALF,
    PADDING,
    UNKNOWN,
    UNSEEN,
    UNTAGGED,
    Corpus,
    Lexicon,
    Sentences,
    batch_of,
)


def lexicon_of(train, held_out=(), vocab_size=100):
    """Of sentences, or of texts whose words all have the same tag."""

    def tagged(sentences):
        return [Sentence(s.split(), ["T"] * len(s.split())) if isinstance(s, str) else s for s in sentences]

    return Lexicon({"train": tagged(train), "validation": tagged(held_out), "test": []}, vocab_size)


def test_words_are_the_commonest_of_training_alone():
    lexicon = lexicon_of(["b b b a a c", "d a"], ["new new new new a"], vocab_size=2)
    assert lexicon.known == 4  # padding, unknown, and
    assert [lexicon.forms[word] for word in ("a", "b")] == [2, 3]  # equals in the order of the alphabet
    assert lexicon.counts.tolist() == [0, 0, 3, 3]
    assert min(lexicon.forms[word] for word in ("c", "d", "new")) == lexicon.known
    other = lexicon_of(["b b b a a c", "d a"], ["quite other words"], vocab_size=2)
    assert (other.known, other.tags, other.characters) == (lexicon.known, lexicon.tags, lexicon.characters)


def test_spellings():
    long = "a" * (HALF + 3) + "b" * 7 + "c" * (HALF + 3)
    lexicon = lexicon_of(["ab ba q", long], ["qab"])
    a, b, c = (lexicon.characters.get(x) for x in "abc")
    assert c is None  # in one word alone
    spelling = {word: lexicon.spellings[form].tolist() for word, form in lexicon.forms.items()}
    width = 2 * HALF + 2
    assert spelling["ab"] == [BEGIN, a, b, END] + [PADDING] * (width - 4)
    assert spelling["qab"][:5] == [BEGIN, UNKNOWN, a, b, END]  # a form of another split
    assert spelling[long] == [BEGIN, *[a] * HALF, *[UNKNOWN] * HALF, END]
    assert lexicon.alphabet == max(a, b) + 1


def test_tags_of_other_splits():
    lexicon = lexicon_of([Sentence(["a", "b"], ["Y", "X"])], [Sentence(["a"], ["Z"])])
    assert [lexicon.tag_id(tag) for tag in ("X", "Y", "Z", "_")] == [0, 1, UNSEEN, UNTAGGED]


@pytest.mark.parametrize("length", [1, 4, 5, 8, 9])
def test_long_sentences_are_cut_in_training_and_divided_after_it(length):
    words = [f"w{i}" for i in range(length)]
    sentences = [Sentence(words, ["T"] * length), Sentence(["end"], ["T"])]
    lexicon = lexicon_of(sentences)
    ids = [lexicon.forms[word] for word in words]
    cut = [forms.tolist() for forms, _ in Sentences(sentences, lexicon, 4, whole=False)]
    assert cut == [ids[:4], [lexicon.forms["end"]]]
    pieces = [forms.tolist() for forms, _ in Sentences(sentences, lexicon, 4, whole=True)]
    assert [form for piece in pieces for form in piece] == [*ids, lexicon.forms["end"]]
    assert max(map(len, pieces)) <= 4


def test_samples_without_a_tag_are_left_out():
    sentences = [Sentence(["a", "b"], ["_", "_"]), Sentence(["a", "b", "c"], ["_", "_", "T"])]
    lexicon = lexicon_of(sentences)
    assert len(Sentences(sentences, lexicon, 256, whole=False)) == 1
    assert [tags.tolist() for _, tags in Sentences(sentences, lexicon, 2, whole=True)] == [[0]]
    assert len(Sentences(sentences, lexicon, 2, whole=False)) == 0


@pytest.mark.parametrize("size", [1, 3, 10])
def test_batches_hold_each_word_once(conf, size):
    corpus = Corpus(conf(vocab_size=4))
    lexicon, samples = corpus.lexicon, corpus.dataset("validation")
    found = []
    for batch in DataLoader(samples, size, collate_fn=lambda some: batch_of(some, lexicon, characters=True)):
        real = batch["words"] != PADDING
        assert batch.pop("size") == real.sum()
        assert all(value.dtype == torch.long for value in batch.values())
        assert torch.equal(real, batch["tags"] != UNTAGGED)
        assert real.any(0).all()  # no column of padding alone
        assert len(batch["spellings"].unique(dim=0)) <= len(batch["spellings"]) == batch["spelled"].max() + 1
        spelled = batch["spellings"][batch["spelled"]]  # [B, T, C]
        every = batch["words"], batch["counts"], batch["tags"], spelled
        found += [[values[row, real[row]] for values in every] for row in range(len(real))]
    assert len(found) == len(samples) == 10
    for (words, counts, tags, spelled), sentence in zip(found, corpus.sentences["validation"], strict=True):
        forms = torch.tensor([lexicon.forms[word] for word in sentence.words])
        known = forms < lexicon.known
        assert not known[-1]
        assert torch.equal(words, torch.where(known, forms, UNKNOWN))
        assert counts.tolist() == [
            sum(s.words.count(word) for s in corpus.sentences["train"]) * k
            for word, k in zip(sentence.words, known.tolist(), strict=True)
        ]
        assert tags.tolist() == [lexicon.tags[tag] for tag in sentence.tags]
        assert torch.equal(spelled, lexicon.spellings[forms][:, : spelled.shape[1]].long())
        assert not lexicon.spellings[forms][:, spelled.shape[1] :].any()


def test_batches_without_characters(conf):
    corpus = Corpus(conf())
    batch = batch_of([corpus.dataset("train")[0]], corpus.lexicon, characters=False)
    assert set(batch) == {"words", "tags", "counts", "size"}
