"""A lower bound of the time of a step: its matrix products alone, with operands and results in place.

For the Kronecker family the products are those of the mathematics, in full (nothing is saved by symmetry). For other
optimizers they are the products that a step really calls.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from caspr_cli.optim import polar
from caspr_cli.optim.cost import blocks_of, passes
from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.options import apply_dtype, factor_dtype

TRIALS = 3  # of each way to replay a product, to find the faster

Run = Callable[[], None]
aten = torch.ops.aten
# For each operator the function that writes into ``out=``, and how many of its first arguments are tensors.
OPERATORS: dict[Any, tuple[Callable[..., Tensor], int]] = {
    **dict.fromkeys((aten.mm.default, aten.mm.out), (torch.mm, 2)),
    **dict.fromkeys((aten.bmm.default, aten.bmm.out), (torch.bmm, 2)),
    **dict.fromkeys((aten.addmm.default, aten.addmm.out, aten.addmm_.default), (torch.addmm, 3)),
    **dict.fromkeys((aten.baddbmm.default, aten.baddbmm.out, aten.baddbmm_.default), (torch.baddbmm, 3)),
}


class Operand(NamedTuple):
    """Size, strides and type of a tensor in a product."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: torch.device) -> Tensor:
        numbers = 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        return torch.randn(numbers, dtype=self.dtype, device=device).as_strided(self.size, self.stride)


class Call(NamedTuple):
    """One recorded product."""

    function: Callable[..., Tensor]
    operands: tuple[Operand, ...]
    scale: dict[str, float]  # alpha and beta


@dataclass(frozen=True)
class Product:
    """``[blocks, rows, inner]`` times ``[blocks, inner, columns]``, ``count`` times a step."""

    blocks: int
    rows: int
    inner: int
    columns: int
    dtype: torch.dtype
    gram: bool  # X X^T, with one operand
    count: int


class Recorder(TorchDispatchMode):
    """Keeps every matrix product that is called inside its context; those of other threads are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in OPERATORS:
            function, count = OPERATORS[func]
            operands = (Operand(tuple(x.shape), x.stride(), x.dtype) for x in args[:count])
            scale: dict[str, float] = {key: float(kwargs[key]) for key in ("alpha", "beta") if key in kwargs}
            self.calls.append(Call(function, tuple(operands), scale))
        return func(*args, **kwargs)


def kronecker_products(optimizer: KroneckerOptimizer) -> list[Product]:
    """Return the products of every preconditioned block and axis of d rows of r numbers.

    They are the statistics (d x r times r x d) and, in each pass, the application (d x d times d x r). For m x n blocks
    that is six products for CASPR (two passes), four for Shampoo (one) and eight with ``measured``, where the momentum
    goes to the eigenbases and back and the gradient goes there. A polar factor has more
    (:func:`caspr_cli.optim.polar.products`).
    """
    blocks: Counter[Any] = Counter()
    for group, p, sizes, shape, count in blocks_of(optimizer):
        times = passes(group, len(sizes)) + (group["measured"] > 0)
        dtype = factor_dtype(p, group)
        dtypes = dtype, apply_dtype(dtype, p.device, group)
        blocks[sizes, shape, times, group["polar"] * group["polar_steps"], dtypes] += count
    found = []
    for (sizes, shape, times, steps, (dtype, low)), count in blocks.items():
        for d in sizes:
            rest = math.prod(shape) // d
            found += [Product(count, d, rest, d, dtype, gram=True, count=1)]
            found += [Product(count, d, d, rest, low, gram=False, count=times)]
        for (rows, inner, columns), gram, repeats in polar.products(shape, steps, low):
            found.append(Product(count, rows, inner, columns, low, gram=gram, count=repeats))
    return found


def gemm_bound(optimizer: Optimizer, device: torch.device, seconds: Callable[[Run], float]) -> Run | None:
    """Return a function that repeats the products of a step; None if there are none. It takes a step to record them.

    ``seconds``: times a function.
    """
    if isinstance(optimizer, KroneckerOptimizer):
        replays = [_fastest(product, device, seconds) for product in kronecker_products(optimizer)]
    else:
        with Recorder() as recorder:
            optimizer.step()
        replays = replay_calls(recorder.calls, device)

    def run() -> None:
        for replay in replays:
            replay()

    return run if replays else None


def replay_calls(calls: list[Call], device: torch.device) -> list[Run]:
    """Return functions that repeat these calls; like operands share memory, and like results, which costs no time."""
    operands: dict[tuple[Operand, int], Tensor] = {}
    results: dict[tuple[Any, ...], Tensor] = {}

    def prepared(call: Call) -> Run:
        # By place, too: the two sides of X X are then not of one memory, as they need not be in the step.
        keys = [(x, place) for place, x in enumerate(call.operands)]
        operands.update({key: key[0].make(device) for key in keys if key not in operands})
        tensors = [operands[key] for key in keys]
        kind = (*(x.shape for x in tensors[-2:]), tensors[-1].dtype)
        if kind not in results:
            results[kind] = call.function(*tensors)
        out = results[kind]

        def run() -> None:
            call.function(*tensors, **call.scale, out=out)

        return run

    return [prepared(call) for call in calls]


def _fastest(product: Product, device: torch.device, seconds: Callable[[Run], float]) -> Run:
    """Return one batched product over all blocks, or a loop over them, whichever takes less time here."""

    def random(*size: int) -> Tensor:
        return torch.randn(product.blocks, *size, dtype=product.dtype, device=device)

    left = random(product.rows, product.inner)
    right = left.mT if product.gram else random(product.inner, product.columns)
    out = random(product.rows, product.columns)
    single = list(zip(left.unbind(), right.unbind(), out.unbind(), strict=True))

    def batched() -> None:
        for _ in range(product.count):
            torch.bmm(left, right, out=out)

    def looped() -> None:
        for _ in range(product.count):
            for a, b, c in single:
                torch.mm(a, b, out=c)

    ways = batched, looped
    for way in ways:
        way()
    times = [[seconds(way) for way in ways] for _ in range(TRIALS)]
    return ways[int(np.min(times, axis=0).argmin())]
