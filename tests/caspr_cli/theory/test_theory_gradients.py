"""Gradients that are recorded: of which layers, the same every time, and what cannot be asked."""

import pytest
import torch

from caspr_cli.recipe.errors import ConfigError
from caspr_cli.tasks.registry import CONFS
from caspr_cli.theory.choices import Layers
from caspr_cli.theory.gradients import (
    LARGEST,
    LAYERS,
    MODELS,
    as_matrix,
    kronecker_stream,
    low_rank_stream,
    matching,
    record,
    recordings,
)

SHAPES = {"blocks.0.up.weight": (32, 8), "blocks.0.down.weight": (8, 32), "patches.weight": (8, 3, 8, 8)}


def silent(text):
    pass


def test_every_task_has_a_model_and_layers():
    assert MODELS.keys() == LAYERS.keys() == CONFS.keys()


def test_layers_by_their_name():
    assert matching("0.up", SHAPES) == ("blocks.0.up.weight",)
    assert matching("blocks", SHAPES) == ("blocks.0.up.weight", "blocks.0.down.weight")
    with pytest.raises(ConfigError, match=r"--parameter patche5.*Did you mean patches.weight\? \(there are: "):
        matching("patche5.weight", SHAPES)
    with pytest.raises(ConfigError, match=rf"8 x 3 x 8 x 8 = 1,536 numbers.* at most {LARGEST:,}"):
        matching("patches", SHAPES)
    with pytest.raises(ConfigError, match="--parameter up: needs a task"):
        recordings(Layers(parameter="up"), silent)


def test_a_convolution_is_seen_as_a_matrix():
    assert as_matrix(torch.zeros(4, 3, 2, 2)).shape == (4, 12)
    assert as_matrix(torch.zeros(4, 3, 2, 2)).dtype == torch.float64


@pytest.mark.release
def test_recorded_again_is_the_same_and_another_seed_is_not():
    state = torch.get_rng_state()
    layers = ("blocks.0.up.weight",)
    (first,) = record("vit", 0, 4, layers, "caspr_sum")
    record.cache_clear()
    (again,) = record("vit", 0, 4, layers, "caspr_sum")
    assert torch.equal(first.gradients, again.gradients)
    assert torch.equal(torch.get_rng_state(), state)
    (other,) = record("vit", 1, 4, layers, "caspr_sum")
    assert not torch.equal(first.gradients, other.gradients)
    assert first.gradients.shape == (4, 32, 8)
    assert not first.gradients[0].any()  # the head starts at zero: nothing comes through in the first step
    assert first.gradients[1:].flatten(1).any(1).all()
    assert first.rank <= 8


@pytest.mark.release
def test_the_path_depends_on_the_optimizer_after_the_first_steps():
    layers = ("conv1.weight",)
    (ours,), (adamw,) = (record("resnet", 0, 14, layers, optimizer) for optimizer in ("caspr_sum", "adamw"))
    assert torch.equal(ours.gradients[0], adamw.gradients[0])
    assert not torch.allclose(ours.gradients[-1], adamw.gradients[-1], rtol=1e-3)
    assert ours.shape == (4, 27)


@pytest.mark.release
def test_what_is_asked_for_is_recorded():
    found = recordings(Layers(quick=True, seed=3, task="vit", parameter="query"), silent)
    assert [(one.parameter, one.seed, one.shape) for one in found] == [("blocks.0.attention.query.weight", 3, (8, 8))]


def test_random_streams():
    G = low_rank_stream((4, 5), 2, 3, seed=0)
    assert G.shape == (3, 4, 5)
    assert torch.linalg.matrix_rank(G).tolist() == [2, 2, 2]
    noise = kronecker_stream((2, 3), 20_000, seed=0)
    covariance = noise.flatten(1).mT @ noise.flatten(1) / len(noise)
    left = torch.einsum("tij,tkj->ik", noise, noise)
    right = torch.einsum("tji,tjk->ik", noise, noise)
    expected = torch.kron(left, right) / torch.trace(left) / len(noise)
    assert torch.linalg.matrix_norm(covariance - expected) < 0.03 * torch.linalg.matrix_norm(expected)
