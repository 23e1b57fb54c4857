"""The task as the runner uses it, and convolutions under CASPR."""

import pytest
import torch
from torch import nn
from written import batch_of

from caspr_cli import tasks
from caspr_cli.tasks.registry import ResNetConf


def load(**changes):
    return tasks.load(ResNetConf(**{"depth": 10, "width": 4, "batch_size": 6, "stem": 4, **changes}), seed=0)


def test_resnet_50_takes_the_published_flops():
    task = load(depth=50, width=64, size=224, batch_size=1)
    task.data.__dict__["meta"] = {"classes": [""] * 1000}
    # 4.09 billion multiply-adds, torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta
    assert task.train_flops(nn.Identity()) == pytest.approx(3 * 2 * 4.09e9, rel=0.01)


# ---- channels last -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "memory"), [(8, torch.channels_last), (4, torch.contiguous_format)])
def test_model_and_inputs_are_channels_last_but_in_narrow_networks(width, memory):
    task = load(width=width)
    model, (images, _) = task.model(), batch_of(task, 2)
    weights = [p for p in model.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=memory) for p in weights)
    assert task.inputs(model, images).is_contiguous(memory_format=memory)


@pytest.mark.parametrize("width", [1, 4])
def test_a_narrow_network_trains(width):
    """With its channels last, oneDNN corrupts memory on CPUs with AVX2 alone, which then ends the process."""
    task = load(width=width)
    for _ in range(3):
        task.loss(task.model(), batch_of(task, 20)).backward()
