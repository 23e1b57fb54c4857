"""The task as the runner uses it, and convolutions under CASPR."""

import pytest
import torch
from references.drive import BARE, relative_error
from references.kronecker import damped, gram, on_axis, spectral_power
from references.stream import random_stream
from torch import nn

from caspr_cli import tasks
from caspr_cli.optim import CASPR
from caspr_cli.tasks.registry import ResNetConf


def load(**changes):
    return tasks.load(ResNetConf(**{"depth": 10, "width": 4, "batch_size": 6, "stem": 4, **changes}), seed=0)


@pytest.fixture
def task():
    return load()


def batch_of(task, count):
    data = task.dataset("train")
    return task.collate([data[i] for i in range(count)])


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


@pytest.mark.parametrize("merge", ["matrix", "square", "none"])
def test_caspr_does_the_same_in_both_memory_formats(merge):
    """Over several steps, with a state dict carried over between them, for 1 x 1 and 3 x 3 kernels."""
    gradients = [random_stream(6, 4, k, k, steps=6, seed=k) for k in (1, 3)]
    results = []
    for memory in (torch.contiguous_format, torch.channels_last):
        params = [nn.Parameter(g[0].clone(memory_format=memory)) for g in gradients]
        optimizer = CASPR(params, lr=0.1, interval=2, start_step=2, merge=merge)
        for step in range(6):
            for p, stream in zip(params, gradients, strict=True):
                p.grad = stream[step].clone(memory_format=memory)
            optimizer.step()
            if step == 3:
                state = optimizer.state_dict()
                optimizer = CASPR(params, lr=0.1, interval=2, start_step=2, merge=merge)
                optimizer.load_state_dict(state)
        results.append([p.detach() for p in params])
    assert results[1][1].is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(*results, strict=True):
        assert relative_error(other, one) < 1e-12


# ---- the formula on a kernel -------------------------------------------------------------------------------------

SHAPE, EPS, BETA = (3, 2, 2, 2), 1e-4, 0.9


def dense(tensor):
    """[ (1/k) sum_i S~_i^(-1/4) on axis i ]^2 vec(G) after a first gradient, whose average is itself."""
    roots = [spectral_power(damped(gram(tensor, axis), EPS, "relative"), -1 / 4) for axis in range(tensor.ndim)]
    mean = sum(on_axis(root, tuple(tensor.shape), axis) for axis, root in enumerate(roots)) / len(roots)
    return mean @ mean @ tensor.flatten()


def first_update(gradient, merge, memory):
    """Return the first update of a convolution whose weight is zero."""
    conv = nn.Conv2d(2, 3, 2, bias=False).double().to(memory_format=memory)
    nn.init.zeros_(conv.weight)
    group = {"params": [conv.weight], "precondition": "momentum"}
    optimizer = CASPR([group], lr=1.0, eps=EPS, merge=merge, **{**BARE, "betas": (0.0, BETA)})
    conv.weight.grad = gradient.clone(memory_format=memory)
    optimizer.step()
    return -conv.weight.detach()


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_the_matrix_of_its_filters(memory):
    gradient = random_stream(*SHAPE, steps=1, seed=1)[0]
    expected = dense(gradient.reshape(3, 8)).reshape(SHAPE)
    assert relative_error(first_update(gradient, "matrix", memory), expected) < 1e-9


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_unmerged_has_a_statistic_for_each_axis(memory):
    gradient = random_stream(*SHAPE, steps=1, seed=2)[0]
    expected = dense(gradient).reshape(SHAPE)
    assert relative_error(first_update(gradient, "none", memory), expected) < 1e-9
