"""Augmentation, loss and metrics."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from written import batch_of

from caspr_cli.tasks.images.augment import mixup, shift_and_mirror
from caspr_cli.tasks.images.metric import Accuracy
from caspr_cli.tasks.images.task import Classification
from caspr_cli.tasks.registry import Augment


class Linear(Classification):
    """The least model that is one."""

    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * self.conf.size**2, self.data.classes))


# ---- augmentation ------------------------------------------------------------------------------------------------


def test_shift_and_mirror_is_a_window_of_the_reflected_image():
    torch.manual_seed(0)
    images = torch.arange(16 * 16).view(1, 16, 16, 1).expand(200, -1, -1, 3).clone()
    images += torch.arange(200)[:, None, None, None] * 1000
    found = shift_and_mirror(images)
    seen = set()
    for i in range(200):
        padded = F.pad(images[i].permute(2, 0, 1).double(), (2, 2, 2, 2), mode="reflect").long()
        windows = {
            (dy, dx, mirrored): window.flip(2) if mirrored else window
            for dy in range(5)
            for dx in range(5)
            for mirrored in (False, True)
            for window in [padded[:, dy : dy + 16, dx : dx + 16]]
        }
        matches = [key for key, window in windows.items() if torch.equal(window.permute(1, 2, 0), found[i])]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 40  # of 50
    assert {key[2] for key in seen} == {False, True}


def test_shift_and_mirror_of_rectangles_and_tiny_images():
    images = torch.randint(256, (4, 16, 8, 3), dtype=torch.uint8)
    assert shift_and_mirror(images).shape == images.shape
    tiny = torch.randint(256, (4, 1, 1, 3), dtype=torch.uint8)
    assert torch.equal(shift_and_mirror(tiny), tiny)


def test_mixup_mixes_neighbours_in_one_proportion():
    torch.manual_seed(1)
    images, targets = torch.eye(5), torch.eye(5)
    mixed, mixed_targets = mixup(images, targets, 0.5)
    share = mixed[0, 0]
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))
    torch.testing.assert_close(mixed_targets, mixed)
    assert 0 < share < 1
    torch.manual_seed(1)
    assert torch.equal(mixup(images, targets, 0.5)[0], mixed)


# ---- loss and metrics --------------------------------------------------------------------------------------------


def test_inputs_are_normalised_and_channels_last(conf):
    task = Linear(conf(augment=Augment.none), seed=0)
    images, _ = task.collate(list(task.dataset("train")))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = task.inputs(task.model().to(dtype), images)
        assert x.shape == (27, 3, 8, 8)
        assert x.dtype == dtype
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert x.float().mean((0, 2, 3)).abs().max() < 0.01
        assert (x.float().std((0, 2, 3)) - 1).abs().max() < 0.01


def test_loss_is_the_mean_cross_entropy(conf):
    task = Linear(conf(augment=Augment.none), seed=0)
    model, (images, labels) = task.model(), batch_of(task, 15, step=3)
    logs = model(task.inputs(model, images)).log_softmax(-1)
    direct = torch.stack([-logs[i, label] for i, label in enumerate(labels)]).mean()
    torch.testing.assert_close(task.loss(model, (images, labels)), direct)
    smooth = Linear(conf(augment=Augment.none, label_smoothing=0.3), seed=0)
    torch.testing.assert_close(smooth.loss(model, (images, labels)), 0.7 * direct - 0.3 * logs.mean())
    assert task.units((images, labels)) == 5


def test_loss_with_mixup_is_the_mixed_loss(conf):
    task = Linear(conf(augment=Augment.none, mixup=0.4), seed=0)
    model, (images, labels) = task.model(), batch_of(task, 15, step=3)
    torch.manual_seed(3)
    found = task.loss(model, (images, labels))
    torch.manual_seed(3)
    share = torch.distributions.Beta(0.4, 0.4).sample()
    x = task.inputs(model, images)
    logits = model(share * x + (1 - share) * x.roll(1, 0))
    expected = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, labels.roll(1))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("augment", Augment)
def test_loss_depends_on_torchs_seed(conf, augment):
    task = Linear(conf(augment=augment, mixup=0.2), seed=0)
    torch.manual_seed(0)
    model, batch = task.model(), batch_of(task, 12, step=3)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(task.loss(model, batch).item())
    assert losses[0] == losses[1] != losses[2]


@torch.no_grad()
def test_images_are_evaluated_neither_augmented_nor_mixed_nor_smoothed(conf):
    task = Linear(conf(label_smoothing=0.3, mixup=0.2), seed=0)
    torch.manual_seed(0)
    model, metric = task.model().eval(), task.metrics()
    images, labels = task.collate(list(task.dataset("train")))
    logits = model(task.inputs(model, images))
    task.evaluate(model, (images, labels), metric)
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found["loss"] == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-6)
    assert found["accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    assert found["top5"] == 1  # of three classes


def test_accuracies_by_hand():
    metric = Accuracy()
    logits = torch.arange(10.0).repeat(4, 1)  # likeliest: 9, 8, 7, 6, 5
    metric.update(logits[:3], torch.tensor([9, 5, 4]))
    metric.update(logits[3:], torch.tensor([7]))
    found = metric.compute()
    assert found["accuracy"] == 0.25
    assert found["top5"] == 0.75
    metric.reset()
    metric.update(torch.zeros(2, 8), torch.tensor([0, 1]))
    assert metric.compute()["loss"].item() == pytest.approx(math.log(8))
