"""Floating point formats, and products that are rounded as tensor cores do it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FLOAT64, FLOAT32, TF32, BFLOAT16 = 53, 24, 11, 8  # bits of the significand, with the one that is not stored


def roundoff(bits: int) -> float:
    """Return u, half the distance between 1 and the next number."""
    return 2.0**-bits


def rounded(x: Tensor, bits: int) -> Tensor:
    """Return x with so many bits to the significand, ties to even; of any range, in its own type."""
    mantissa, exponent = torch.frexp(x)  # mantissa in [1/2, 1)
    scale = 2.0**bits
    return torch.ldexp(torch.round(mantissa * scale) / scale, exponent)


class RoundedProducts(TorchFunctionMode):
    """Rounds both operands of the matrix products inside its context.

    This is what TF32 does to float32 on tensor cores, which multiply numbers of 11 bits and add up in float32.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self._bits = bits

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.bmm, torch.mm, torch.matmul, Tensor.matmul, Tensor.__matmul__):
            args = (*(rounded(x, self._bits) for x in args[:2]), *args[2:])
        elif func is torch.linalg.matrix_power:
            with self:
                return _power(*args)
        return func(*args, **(kwargs or {}))


def _power(X: Tensor, p: int) -> Tensor:
    """Return X^p by squaring, as torch has it."""
    result, square = X if p % 2 else None, X
    while p := p // 2:
        square = square @ square
        if p % 2:
            result = square if result is None else result @ square
    assert result is not None
    return result
