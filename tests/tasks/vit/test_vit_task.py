"""What the runner asks of the task."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tasks
from caspr_cli.optim import CASPR
from caspr_cli.recipe.schema import ViTConf
from tasks.base import DataError


def load(**changes):
    small = {"patch": 8, "layers": 2, "width": 16, "heads": 2, "batch_size": 4}
    return tasks.load(ViTConf(**{**small, **changes}), seed=0)


@pytest.fixture
def task():
    return load()


def batch_of(task, count):
    data = task.dataset("train")
    return task.collate([data[i] for i in range(count)])


def groups(task, model):
    plain = task.plain(model)
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if n not in plain]},
        {"params": [p for n, p in named if n in plain], "precondition": False},
    ]


def test_loss_falls_under_caspr():
    task = load(augment="none")
    torch.manual_seed(0)
    model, batch = task.model(), batch_of(task, 20)
    optimizer = CASPR(groups(task, model), lr=1e-2, interval=2, start_step=2)
    start = task.loss(model, batch).item()
    for _ in range(30):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    assert task.loss(model, batch).item() < start - 1


def test_preconditioned_are_patches_and_the_matrices_of_the_blocks(task):
    model = task.model()
    plain, parameters = task.plain(model), dict(model.named_parameters())
    chosen = set(parameters) - set(plain)
    assert "patches.weight" in chosen
    assert len(chosen) == 1 + 2 * 6
    assert all(parameters[name].ndim >= 2 for name in chosen)
    assert plain["class_token"] == "class token"
    assert plain["position"] == "position embedding"
    assert plain["head.weight"] == "head"
    assert plain["patches.bias"] == "bias"
    assert plain["norm.weight"] == "norm"


def test_train_flops_agree_with_torchs_counter(task):
    model = task.model()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        task.loss(model, batch_of(task, 4)).backward()
    # the gradient by the images themselves is counted, and nobody asks for it
    first = 2 * 4 * 16 * 16 * 3 * 8 * 8
    assert task.train_flops(model) == counter.get_total_flops() + first


@pytest.mark.parametrize(
    "change",
    [{"patch": 5}, {"patch": 0}, {"heads": 3}, {"heads": 0}, {"layers": 0}, {"width": 0}, {"dropout": 1.0}],
)
def test_impossible_shapes_name_their_key(change):
    with pytest.raises(DataError, match=rf"^task\.{next(iter(change))}: "):
        load(**change)
