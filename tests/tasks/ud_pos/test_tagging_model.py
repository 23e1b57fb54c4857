"""The tagger."""

import math

import pytest
import torch
import torch.nn.functional as F
import yaml

from caspr_cli.tasks.ud_pos.data import PADDING
from caspr_cli.tasks.ud_pos.model import REACH, Spelling, Tagger, sinusoids


def small(alphabet=20, dropout=0.0):
    torch.manual_seed(0)
    return Tagger(30, 7, 16, alphabet=alphabet, layers=2, width=16, heads=2, dropout=dropout)


def inputs(B=3, T=6, U=9, C=8):
    """Words, spellings and which of them each word has, without any padding."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(1, 30, (B, T), generator=generator)
    spellings = torch.randint(1, 20, (U, C), generator=generator)
    return words, spellings, torch.randint(U, (B, T), generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_no_logit_of_a_word(training):
    model = small().double().train(training)
    words, spellings, spelled = inputs()
    lengths = [6, 2, 4]
    for row, length in enumerate(lengths):
        words[row, length:] = PADDING
    together = model(words, F.pad(spellings, (0, 5)), spelled)
    for row, length in enumerate(lengths):
        alone = model(words[row : row + 1, :length], spellings, spelled[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], rtol=0, atol=1e-12)
        wider = model(
            F.pad(words[row : row + 1, :length], (0, 9)), spellings, F.pad(spelled[row : row + 1, :length], (0, 9))
        )
        torch.testing.assert_close(wider[0, :length], alone[0], rtol=0, atol=1e-12)
        assert wider.isfinite().all()


@torch.no_grad()
def test_every_word_sees_every_other_and_their_order():
    model = small().double()
    words, spellings, spelled = inputs(B=1)
    before = model(words, spellings, spelled)
    changed = words.clone()
    changed[0, 3] = words[0, 3] % 29 + 1
    assert (model(changed, spellings, spelled) - before).abs().amax(-1).min() > 1e-9
    back = model(words.flip(1), spellings, spelled.flip(1)).flip(1)
    assert (back - before).abs().amax(-1).min() > 1e-6


@torch.no_grad()
def test_spelling_by_hand():
    torch.manual_seed(0)
    channel = Spelling(20, 6)
    characters = torch.tensor([[2, 5, 9, 3, 0, 0], [2, 3, 0, 0, 0, 0]])
    table, W, b = channel.embedding.weight, channel.filters.weight, channel.filters.bias
    for row, length in [(0, 4), (1, 2)]:
        x = F.pad(table[characters[row, :length]], (0, 0, REACH // 2, REACH // 2))
        answers = [(W * x[at : at + REACH].T).sum((1, 2)) + b for at in range(length)]
        direct = torch.stack(answers).amax(0).clamp(min=0)
        torch.testing.assert_close(channel(characters)[row], direct)


def test_sinusoids():
    table = sinusoids(5, 8)
    assert table.shape == (5, 8)
    for pair in range(4):
        angle = 3 / 10_000 ** (2 * pair / 8)
        assert table[3, pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[3, 4 + pair].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_paper_scale_has_the_number_of_parameters_of_flax(pytestconfig):
    task = yaml.safe_load((pytestconfig.rootpath / "conf/scale/ud_pos/paper.yaml").read_text())["task"]
    V, tags = 1234, 321
    with torch.device("meta"):
        model = Tagger(
            V, tags, 256, alphabet=None, **{key: task[key] for key in ("layers", "width", "heads", "dropout")}
        )
    assert sum(p.numel() for p in model.parameters()) == 18_903_040 + 512 * V + 513 * tags
    attention = {name for name, _ in model.named_parameters() if ".attention." in name}
    assert len(attention) == 6 * 4
    assert not any(name.endswith("bias") for name in attention)
    assert not task["characters"]
    assert task["word_dropout"] == 0


def test_padding_has_no_embedding_and_no_gradient():
    model = small()
    words, spellings, spelled = inputs()
    words[0, 3:], spellings[0, 4:] = PADDING, PADDING
    model(words, spellings, spelled)[0, :3].sum().backward()
    for embedding in (model.embedding, model.spelling.embedding):
        assert not embedding.weight[PADDING].any()
        assert not embedding.weight.grad[PADDING].any()
