"""Training on several ranks, for tests of sharding: parameters and gradients are the same on all."""

from typing import Any

import torch
from stepping import advance, weights
from torch import Tensor, nn

from caspr_cli.optim import CASPR
from caspr_cli.optim.stacks import is_factor

# Bit for bit is asked where blocks are multiples of 32. Elsewhere a matrix of a stack may begin between two multiples
# of 64 bytes, or its eigenvalues be the rest that vector instructions leave over, and then the last bit may be another.
EVEN = [(32, 64), (64, 32), (128, 128), (32, 64), (32, 4, 8), (9,), (), (64, 32)]
OPTIONS: dict[str, Any] = {"lr": 0.01, "interval": 3, "start_step": 2, "block_size": 64, "weight_decay": 0.1}


def train(
    params: list[nn.Parameter],
    steps: range,
    optimizer: Any = None,
    cls: type = CASPR,
    without: dict[int, set[int]] | None = None,
    **options: Any,
) -> Any:
    optimizer = optimizer or cls(params, **OPTIONS | options)
    advance(params, optimizer, steps, without)
    return optimizer


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def weights_after(
    rank: int, steps: int, dtype: torch.dtype, kwargs: dict[str, Any], shapes: list[tuple[int, ...]] = EVEN
) -> list[Tensor]:
    params = weights(shapes, dtype)
    train(params, range(steps), **kwargs)
    return values(params)


def factor_bytes(optimizer: CASPR) -> int:
    entries = (entry for state in optimizer.state.values() for entry in state.items())
    return sum(x.numel() * x.element_size() for name, x in entries if is_factor(name))
