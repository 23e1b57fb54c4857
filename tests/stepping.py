"""Parameters and steps for tests of optimizers: gradients depend on the step and the parameter's number alone."""

import io
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Pair = tuple[list[nn.Parameter], Any]  # parameters and their optimizer


def weights(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def noise(step: int, number: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def advance(
    params: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    missing: Mapping[int, Iterable[int]] | None = None,
    scale: float = 1.0,
) -> list[float]:
    """Step on noise; return how far the first parameter went in each step. ``missing[step]`` have no gradient."""
    moved = []
    for step in steps:
        for i, p in enumerate(params):
            p.grad = None if i in (missing or {}).get(step, ()) else scale * noise(step, i, p)
        before = params[0].detach().clone()
        optimizer.step()
        moved.append(float((params[0].detach() - before).double().norm()))
    return moved


def copies(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def through_disk(content: Any) -> Any:
    """Return what the safe loader reads of what ``torch.save`` wrote."""
    return torch.load(io.BytesIO(saved(content)), weights_only=True)


def loaded(optimizer: Any, content: Any) -> Any:
    """Return the optimizer with a state that was on the disk."""
    optimizer.load_state_dict(through_disk(content))
    return optimizer


def resumed(params: list[nn.Parameter], optimizer: Any, content: Any = None, **options: Any) -> Pair:
    """Copies of the weights in another process: an optimizer of the same class that loads its state, or this one."""
    others = copies(params)
    return others, loaded(type(optimizer)(others, **options), content or optimizer.state_dict())


def assert_alike(one: Pair, two: Pair, steps: Iterable[int]) -> None:
    """Parameters and state are the same after more steps."""
    for params, optimizer in (one, two):
        advance(params, optimizer, steps)
    assert_same(*one, *two)


def assert_same(params: list[nn.Parameter], optimizer: Any, others: list[nn.Parameter], other: Any) -> None:
    """Weights and state are equal bit for bit and have the same types."""
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        torch.testing.assert_close(p, q, rtol=0, atol=0, msg=f"parameter {i}")
        mine, theirs = optimizer.state[p], other.state[q]
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, equal_nan=True, msg=f"{name} of {i}")


def assert_finite(params: list[nn.Parameter], optimizer: Any) -> None:
    for p in params:
        assert bool(torch.isfinite(p).all())
        assert all(bool(torch.isfinite(value).all()) for value in optimizer.state[p].values())


def distance(params: list[nn.Parameter], others: list[nn.Parameter], start: list[nn.Parameter]) -> float:
    """Return the largest difference between two runs, in units of the way that the second one went."""
    apart = [float((p.detach() - q.detach()).double().norm()) for p, q in zip(params, others, strict=True)]
    way = [float((q.detach() - s.detach()).double().norm()) for q, s in zip(others, start, strict=True)]
    return max(a / w for a, w in zip(apart, way, strict=True))
