"""Batch normalisation over the whole batch, on whatever number of ranks.

Left alone, each rank would normalise by its own part of the batch and keep running statistics of its own: two
ranks would train another model than one, and each would validate with different statistics.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as functional
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with every batch norm replaced by one that counts over all ranks; parameters are shared."""
    if device.type == "cuda":
        return cast(nn.Module, nn.SyncBatchNorm.convert_sync_batchnorm(model))
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = BatchNormOverRanks
    return model


class BatchNormOverRanks(nn.BatchNorm1d):
    """What :class:`torch.nn.SyncBatchNorm` is on GPUs, for other devices, where DDP refuses that class.

    It takes inputs of any rank. A layer needs one collective of 2 C + 1 numbers, forward and backward, in training.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """``input`` is ``[B, C, ...]``; every rank must call this, with any ``B`` of its own."""
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        axes = [0, *range(2, input.dim())]
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        count = x.new_tensor([x.numel() / x.shape[1]])
        # Around the running mean, which is the same on all ranks: a sum of squares loses no digits to a large mean.
        shift = x.new_zeros(x.shape[1]) if self.running_mean is None else self.running_mean
        shifted = x - _over_channels(shift.to(x.dtype), x)
        sums = torch.cat((shifted.sum(axes), shifted.square().sum(axes), count))
        # The first collective of the backward pass adds the gradients of all ranks, as it must: each rank's loss
        # depends on every rank's input.
        sums = functional.all_reduce(sums)
        total = sums[-1].detach()
        mean, square = sums[:-1].view(2, -1) / total
        variance = (square - mean.square()).clamp_min(0)
        with torch.no_grad():
            self._track(mean + shift, variance, total)
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        out = (shifted - _over_channels(mean, x)) * _over_channels(scale, x)
        if self.affine:
            out = out + _over_channels(self.bias, x)
        return out.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics, by the unbiased variance, as torch does."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), weight)


def _over_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics of a model by name; empty where it has no batch norm that keeps some."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    return {f"{name}.{key}": value for name, m in layers for key, value in m.named_buffers()}


@contextmanager
def measured_anew(model: nn.Module) -> Iterator[None]:
    """Put the mean statistics of those batches into a model that go through it inside, of each as much."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    training, momenta = model.training, [m.momentum for m in layers]
    for m in layers:
        m.reset_running_stats()
        m.momentum = None  # a plain mean
    model.train()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        for m, momentum in zip(layers, momenta, strict=True):
            m.momentum = momentum
