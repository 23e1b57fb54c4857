"""The decoder."""

import math

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from caspr_cli.tasks.c4_lm.model import Decoder, rotary_tables
from caspr_cli.tasks.encoder import rotate


def small(dropout=0.0):
    torch.manual_seed(0)
    return Decoder(vocab_size=50, sequence=16, layers=2, width=16, heads=2, dropout=dropout)


@settings(max_examples=25, deadline=None)
@given(position=st.integers(0, 15), seed=st.integers(0, 2**16))
def test_no_logit_sees_a_later_token(position, seed):
    model = small().double()
    tokens = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(seed))
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :position], after[:, :position], rtol=0, atol=1e-12)
    assert (before[:, position] - after[:, position]).abs().max() > 1e-6


def test_every_earlier_token_is_seen():
    model = small()
    embedded = model.embedding(torch.randint(50, (1, 16))).detach().requires_grad_()
    model.embedding.register_forward_hook(lambda *_: embedded)
    model(torch.zeros(1, 16, dtype=torch.long))[0, -1].sum().backward()
    assert (embedded.grad[0].abs().sum(-1) > 0).all()


@settings(max_examples=25, deadline=None)
@given(m=st.integers(0, 31), n=st.integers(0, 31), shift=st.integers(0, 32), seed=st.integers(0, 2**16))
def test_rotary_products_depend_on_the_difference_of_positions(m, n, shift, seed):
    cos, sin = (table.double() for table in rotary_tables(64, 8))
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def product(i, j):
        return rotate(q, cos[i], sin[i]) @ rotate(k, cos[j], sin[j])

    # the tables are float32: their angles are off by some 1e-6
    torch.testing.assert_close(product(m, n), product(m + shift, n + shift), rtol=0, atol=1e-4)
    torch.testing.assert_close(rotate(q, cos[m], sin[m]).norm(), q.norm(), rtol=1e-5, atol=0)


def test_rotation_is_by_the_angle_of_its_pair():
    cos, sin = rotary_tables(3, 4)
    turned = rotate(torch.tensor([1.0, 0, 0, 1]), cos[2], sin[2])
    # the pair (0, 2) turns by 2 x 10000^0, the pair (1, 3) by 2 x 10000^(-1/2)
    expected = [math.cos(2), -math.sin(0.02), math.sin(2), math.cos(0.02)]
    torch.testing.assert_close(turned, torch.tensor(expected))


def test_initial_scales():
    torch.manual_seed(0)
    model = Decoder(1000, 8, 8, 64, 2)
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all()
        else:
            residual = "output" in name or "down" in name
            assert p.std().item() == pytest.approx(0.02 / 4 if residual else 0.02, rel=0.05), name


@pytest.mark.parametrize("T", [1, 7, 16])
def test_shorter_inputs(T):
    model, tokens = small(), torch.randint(50, (2, 16))
    torch.testing.assert_close(model(tokens)[:, :T], model(tokens[:, :T]))
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize(("scale", "million", "exact"), [("paper", 14, 14_487_808), ("paper_234m", 234, 234_128_384)])
def test_paper_scales_have_the_papers_number_of_parameters(pytestconfig, scale, million, exact):
    task = yaml.safe_load((pytestconfig.rootpath / f"conf/scale/c4_lm/{scale}.yaml").read_text())["task"]
    V, T, n, w = (task[key] for key in ("vocab_size", "sequence", "layers", "width"))
    with torch.device("meta"):
        model = Decoder(V, T, n, w, task["heads"])
    count = sum(p.numel() for p in model.parameters())
    assert count == exact == V * w + 12 * w * w * n + (2 * n + 1) * w
    assert count // 10**6 == million
