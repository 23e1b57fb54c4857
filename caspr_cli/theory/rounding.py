r"""What rounding does to an inverse root, predicted: f(S) = S^(-1/p), S symmetric with eigenvalues l_1 <= ... <= l_d.

*To first order* (Daleckii and Krein; Higham, Functions of Matrices, Theorem 3.11), f(S + E) = f(S) + F o E in the
eigenvectors of S, with F_ij = (f(l_i) - f(l_j)) / (l_i - l_j) and F_ii = f'(l_i). For an E with no direction of its
own (independent entries of variance v, 2 v on the diagonal, v = ||E||_F^2 / (d (d + 1)); such a matrix is so in every
basis) the expected ||f(S + E) - f(S)||_F^2 is v (sum_ij F_ij^2 + sum_i F_ii^2): :func:`sensitivity`.

*To store* S in a type with unit roundoff u changes each entry by a number uniform in +- u 2^e, where 2^e is the power
of two below it. With mantissas as they are in data, evenly spread in the logarithm (Benford), the mean of 4^e over
entries is that of squares of entries over int_1^2 m dm / log 2 = 1.5 / log 2, so ||E||_F = u (log 2 / 4.5)^(1/2)
||S||_F = 0.39 u ||S||_F. No constant is fitted.

*At worst*, -x^(-1/p) being operator monotone, ||f(S + E) - f(S)||_2 <= |f'(l_1 - ||E||_2)| ||E||_2 (Bhatia, Matrix
Analysis, Theorem X.3.8), which relative to ||f(S)||_2 = l_1^(-1/p) is (delta kappa / p) (1 - delta kappa)^(-1-1/p) for
delta = ||E||_2 / ||S||_2 and kappa = l_d / l_1. So errors grow with the *first* power of the condition number, and p
only divides them: not with kappa^(1/p), the condition of the root.

*A solver* that is backward stable finds the root of some S + E with ||E||_2 <= c u ||S||_2, c a modest number that
depends on neither the condition nor p. What is measured tells c: :func:`one_rounding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

STORED = math.sqrt(math.log(2) / 4.5)  # ||E||_F over u ||S||_F


@dataclass(frozen=True)
class Precision:
    """A floating point format.

    Args:
        bits: of the significand, with the one that is not stored.
    """

    name: str
    bits: int

    @property
    def unit(self) -> float:
        """u: half the distance between 1 and the next number."""
        return 2.0**-self.bits


FLOAT64, FLOAT32, TF32, BFLOAT16 = (
    Precision("float64", 53),
    Precision("float32", 24),
    Precision("TF32", 11),
    Precision("bfloat16", 8),
)


def rounded(x: Tensor, bits: int) -> Tensor:
    """x with so many bits to the significand, ties to even; of any range, in its own type."""
    mantissa, exponent = torch.frexp(x)  # mantissa in [1/2, 1)
    scale = 2.0**bits
    return torch.ldexp(torch.round(mantissa * scale) / scale, exponent)


class RoundedProducts(TorchFunctionMode):
    """In it both operands of matrix products are rounded first: what TF32 does to float32 on tensor cores, which
    multiply numbers of 11 bits and add up in float32. As exact as theirs, and slow."""

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
        """By squaring, as torch has it, of products that are rounded."""
        result, square = None, X
        while p:
            if p % 2:
                result = square if result is None else rounded_product(result, square, self._bits)
            p //= 2
            if p:
                square = rounded_product(square, square, self._bits)
        assert result is not None
        return result


def rounded_product(X: Tensor, Y: Tensor, bits: int) -> Tensor:
    """X Y ``[K, d, d]`` of operands that are rounded."""
    return torch.bmm(rounded(X, bits), rounded(Y, bits))


def divided_differences(values: Tensor, p: int) -> Tensor:
    """F ``[d, d]`` of x^(-1/p) at positive ``values`` ``[d]``, in a form that cancels nothing: with a = x^(-1/p),
    F_ij = -a_i^p a_j^p / sum_k a_i^k a_j^(p-1-k)."""
    a = values.pow(-1 / p)
    powers = a.unsqueeze(1).pow(torch.arange(p))  # [d, p]
    sums = powers @ powers.flip(1).mT
    return -(values.unsqueeze(1) * values).reciprocal() / sums


def sensitivity(values: Tensor, p: int) -> float:
    """The expected relative error of a root in Frobenius norm, for an E of ||E||_F = the largest of ``values`` ``[d]``
    and no direction of its own; proportional to ||E||_F."""
    d, F = len(values), divided_differences(values, p)
    variance = float(values.max()) ** 2 / (d * (d + 1))
    error = variance * (F.square().sum() + F.diagonal().square().sum())
    return float((error / values.pow(-2 / p).sum()).sqrt())


def storage(values: Tensor, precision: Precision, p: int, shift: float = 0.0) -> float:
    """The relative error of the root of S + shift I, S of these eigenvalues ``[d]``, that storing S makes."""
    size = STORED * precision.unit * float(torch.linalg.vector_norm(values))  # of E
    return sensitivity(values + shift, p) * size / float(values.max() + shift)


def one_rounding(values: Tensor, precision: Precision, p: int) -> float:
    """The expected relative error of the root for ||E||_2 = u ||S||_2, E with no direction of its own. (For such an E
    ||E||_F = ||E||_2 d^(1/2) / 2, by Wigner's semicircle.) What is measured, over this, is c."""
    return sensitivity(values, p) * precision.unit * math.sqrt(len(values)) / 2


def worst_case(delta: float, condition: float, p: int) -> float:
    """The most that ||f(S + E) - f(S)||_2 / ||f(S)||_2 can be, for ||E||_2 = delta ||S||_2; infinite where the smallest
    eigenvalue may be gone."""
    gone = delta * condition
    return math.inf if gone >= 1 else gone / p * (1 - gone) ** (-1 - 1 / p)
