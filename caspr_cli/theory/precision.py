"""Floating point formats, and products that are rounded as tensor cores do it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Precision:
    name: str
    bits: int  # of the significand, with the one that is not stored

    @property
    def unit(self) -> float:
        """Return u, half the distance between 1 and the next number."""
        return 2.0**-self.bits


FLOAT64, FLOAT32, TF32, BFLOAT16 = (
    Precision(name, bits) for name, bits in (("float64", 53), ("float32", 24), ("TF32", 11), ("bfloat16", 8))
)


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
            return self._power(*args)
        return func(*args, **(kwargs or {}))

    def _power(self, X: Tensor, p: int) -> Tensor:
        """Return X^p by squaring, as torch has it, of products that are rounded."""
        result, square = X if p % 2 else None, X
        while p := p // 2:
            square = self._product(square, square)
            if p % 2:
                result = square if result is None else self._product(result, square)
        assert result is not None
        return result

    def _product(self, X: Tensor, Y: Tensor) -> Tensor:
        return torch.bmm(rounded(X, self._bits), rounded(Y, self._bits))
