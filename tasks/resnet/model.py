"""Residual networks of any width, with torchvision's names and arithmetic.

torchvision's own class has 64 channels in its first stage whatever it is told; a network that learns in a minute on a
CPU needs 8. Weights of one load into the other.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def _conv(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)


class Block(nn.Module):
    """The sum of a branch and the input, which is projected where their shapes differ."""

    expansion: int

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * self.expansion
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(_conv(channels, out, 1, stride), nn.BatchNorm2d(out))

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + (x if self.downsample is None else self.downsample(x)))


class BasicBlock(Block):
    """Two 3 x 3 convolutions."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__(channels, width, stride)
        self.conv1, self.bn1 = _conv(channels, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        nn.init.zeros_(self.bn2.weight)

    def branch(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.bn2(self.conv2(x))
        return out


class Bottleneck(Block):
    """A 3 x 3 convolution between two of 1 x 1, the last of which has four times the width."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__(channels, width, stride)
        self.conv1, self.bn1 = _conv(channels, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        nn.init.zeros_(self.bn3.weight)

    def branch(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        out: Tensor = self.bn3(self.conv3(x))
        return out


# by depth: the kind of block, and how many each stage has
DEPTHS: dict[int, tuple[type[Block], tuple[int, int, int, int]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """ResNet of He et al., CVPR 2016, with the stride in the 3 x 3 convolution ("v1.5"), as torchvision's.

    Convolutions start from He's normal distribution by fan-out. The last scale of each block starts at zero, so that a
    fresh block hands its input on (Goyal et al., arXiv:1706.02677, section 5.1).

    Args:
        depth: a key of :data:`DEPTHS`.
        classes: of the output.
        width: channels of the first stage; each later one has twice as many.
        stem: what the layers before the first stage divide the side by. 4: a 7 x 7 convolution with stride 2 and a
            pooling, as published for 224 pixels; 2 and 1: a 3 x 3 convolution with that stride, for some 32 pixels.
    """

    def __init__(self, depth: int, classes: int, width: int = 64, *, stem: int = 4) -> None:
        super().__init__()
        block, counts = DEPTHS[depth]
        self.conv1 = _conv(3, width, 7, 2) if stem == 4 else _conv(3, width, 3, stem)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == 4 else nn.Identity()
        channels = width

        def stage(count: int, width: int, stride: int) -> nn.Sequential:
            nonlocal channels
            blocks = []
            for i in range(count):
                blocks.append(block(channels, width, 1 if i else stride))
                channels = width * block.expansion
            return nn.Sequential(*blocks)

        self.layer1 = stage(counts[0], width, 1)
        self.layer2 = stage(counts[1], 2 * width, 2)
        self.layer3 = stage(counts[2], 4 * width, 2)
        self.layer4 = stage(counts[3], 8 * width, 2)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, classes]`` of ``images`` ``[B, 3, H, W]``."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits
