"""Parameters whose rows are divided over ranks, as `fully_shard` divides them, and training with them."""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from caspr_cli.optim import CASPR

OPTIONS: dict[str, Any] = {"lr": 0.01, "interval": 3, "start_step": 2, "block_size": 32, "weight_decay": 0.1}
# Matrices of several blocks that shards cut, uneven shards, and some without a row.
SHAPES = [(70, 33), (24, 16), (33, 70), (1, 40, 30), (3, 5, 7), (6, 4, 9), (2, 40), (1, 9), (9,), (24, 16)]
Without = dict[int, set[int]]


def divided(tensor: Tensor, how: str, number: int) -> Tensor:
    """``plain``; by ``rows`` over all ranks; ``replicas`` of two ranks each; ``some``: every third is not divided."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if how == "plain" or (how == "some" and number % 3 == 0):
        return tensor
    placements = [Replicate(), Shard(0)] if how == "replicas" else [Shard(0)]
    return distribute_tensor(tensor, mesh(how, dist.group.WORLD), placements)


@functools.lru_cache(maxsize=1)
def mesh(how: str, group: Any) -> Any:
    """Of the ranks of this process group, which it is remembered for."""
    from torch.distributed.device_mesh import init_device_mesh

    ranks = group.size()
    return init_device_mesh("cpu", (ranks // 2, 2) if how == "replicas" else (ranks,))


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def weights(how: str, dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [nn.Parameter(divided(tensor, how, i)) for i, tensor in enumerate(tensors)]


def gradients(params: list[nn.Parameter], step: int, how: str, signs: bool, without: Without, broken: Without) -> None:
    """Signs have norms that are exact in any order; ``broken`` ones have a NaN in their last row."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        G = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if i in broken.get(step, ()):
            G.view(-1)[-1] = torch.nan
        p.grad = None if i in without.get(step, ()) else divided((G.sign() if signs else G).to(p.dtype), how, i)


def train(
    params: list[nn.Parameter],
    steps: range,
    how: str,
    optimizer: Any = None,
    cls: type = CASPR,
    signs: bool = False,
    without: Without | None = None,
    broken: Without | None = None,
    **options: Any,
) -> Any:
    optimizer = optimizer or cls(params, **OPTIONS | options)
    for step in steps:
        gradients(params, step, how, signs, without or {}, broken or {})
        optimizer.step()
    return optimizer


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64, width: int = 33) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = ((24, 70), (70, width), (width, width), (width, 2))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in sizes)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x).tanh() if i < 2 or x[0, 0] > -1 else x
        return x


def sharded(model: Net, **options: Any) -> Net:
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fit(model: nn.Module, optimizer: Any, steps: range, part: tuple[int, int] | None = None) -> list[Tensor]:
    """Train; ``part``: which of how many parts of a batch this rank has, if not as many as there are ranks."""
    there = dist.is_initialized()
    rank, world = part or ((dist.get_rank(), dist.get_world_size()) if there else (0, 1))
    dtype = next(model.parameters()).dtype
    for step in steps:
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step), dtype=dtype)
        model(x.chunk(world)[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [whole(p) for p in model.parameters()]


def full_state(optimizer: CASPR) -> dict[str, Any]:
    content = optimizer.state_dict()
    state = {i: {name: whole(x) for name, x in entries.items()} for i, entries in content["state"].items()}
    return content | {"state": state}
