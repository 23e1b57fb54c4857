"""The networks are torchvision's."""

import pytest
import torch
import yaml
from torch import nn
from torchvision import models

from caspr_cli.tasks.resnet.model import DEPTHS, ResNet


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_parameters_are_torchvisions(depth):
    with torch.device("meta"):
        ours, theirs = ResNet(depth, 1000), getattr(models, f"resnet{depth}")()
    shapes = [{name: tuple(part.shape) for name, part in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]


@torch.no_grad()
@pytest.mark.parametrize("depth", [18, 50])
def test_outputs_are_torchvisions(depth):
    torch.manual_seed(0)
    theirs = getattr(models, f"resnet{depth}")(num_classes=7).double()
    ours = ResNet(depth, 7).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 70, 64, dtype=torch.float64)
    for mode in (True, False):  # the batch's statistics, then the running ones that it left
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x), rtol=1e-10, atol=1e-10)
    kept = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, kept[name], rtol=1e-10, atol=1e-12)


def test_paper_scale_is_resnet_50(pytestconfig):
    task = yaml.safe_load((pytestconfig.rootpath / "conf/scale/resnet/paper.yaml").read_text())["task"]
    with torch.device("meta"):
        model = ResNet(task["depth"], 1000, stem=task["stem"])
    assert sum(p.numel() for p in model.parameters()) == 25_557_032


@pytest.mark.parametrize("depth", DEPTHS)
def test_fresh_blocks_hand_their_input_on(depth):
    last = "bn3" if depth >= 50 else "bn2"
    for name, module in ResNet(depth, 10, width=2).named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == (0 if name.endswith(last) else 1)).all(), name


def test_initial_convolutions_are_hes():
    torch.manual_seed(0)
    weight = ResNet(10, 10, width=32).layer3[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(("stem", "expected"), [(1, [32, 4]), (2, [16, 2]), (4, [8, 1])])
def test_width_and_stem(stem, expected):
    model = ResNet(10, 10, width=8, stem=stem)
    assert len(model.conv1.weight) == 8
    assert model.layer4[0].conv2.weight.shape == (64, 64, 3, 3)
    sides = []
    model.layer1.register_forward_hook(lambda *args: sides.append(args[2].shape[-1]))
    model.layer4.register_forward_hook(lambda *args: sides.append(args[2].shape[-1]))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sides == expected
