"""Augmentation of training images. All of it draws from torch's global generator."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from caspr_cli.tasks.registry import Augment

SHIFT = 8  # images are shifted by up to an eighth of their side


def image_augmentation(augment: Augment, size: int) -> Callable[[Image.Image], Image.Image] | None:
    """Return what is done to each image as it is read, which makes it ``size`` x ``size``; None: nothing.

    A random resized crop of 8 % to all of the image (Szegedy et al., "Going Deeper with Convolutions"), mirrored half
    of the time; and two operations of RandAugment at magnitude 9 (Cubuk et al., arXiv:1909.13719, sections 3 and 4).
    """
    if augment in (Augment.none, Augment.crop_flip):
        return None
    steps: list[Any] = [v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    if augment is Augment.rand_augment:
        steps.append(v2.RandAugment(num_ops=2, magnitude=9))
    change: Callable[[Image.Image], Image.Image] = v2.Compose(steps)
    return change


def shift_and_mirror(images: Tensor) -> Tensor:
    """Return each image shifted by up to an eighth of its side both ways, and mirrored half of the time.

    What a shift leaves empty is filled with the image's own reflection.

    Args:
        images: ``[B, H, W, C]`` of any type.
    """
    B, H, W, _ = images.shape
    device = images.device

    def places(side: int) -> Tensor:
        """Return where the pixels of one axis come from, ``[B, side]``."""
        reach = side // SHIFT
        at = torch.arange(side, device=device) + torch.randint(-reach, reach + 1, (B, 1), device=device)
        last = side - 1
        return last - (last - at.abs()).abs()  # reflected at both ends

    rows, columns = places(H), places(W)
    mirrored = torch.randint(2, (B, 1), device=device).bool()
    columns = torch.where(mirrored, columns.flip(1), columns)
    batch = torch.arange(B, device=device)[:, None, None]
    return images[batch, rows[:, :, None], columns[:, None, :]]


def mixup(images: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return images and targets mixed with their neighbours' in the batch, in one proportion from Beta(alpha, alpha).

    Args:
        images: ``[B, ...]``, floating point.
        targets: probabilities ``[B, K]``.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
    """
    share = torch.distributions.Beta(alpha, alpha).sample().to(images)

    def mixed(part: Tensor) -> Tensor:
        return share * part + (1 - share) * part.roll(1, 0)

    return mixed(images), mixed(targets)
