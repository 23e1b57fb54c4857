r"""The effect of rounding on an inverse root, predicted and measured.

f(S) = S^(-1/p), S symmetric with eigenvalues l_1 <= ... <= l_d.

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

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from pandas import DataFrame
from torch import Tensor

from caspr_cli.optim.refresh import ACCEPTED
from caspr_cli.optim.roots import Root, bound, newton_steps, residual
from caspr_cli.optim.schedule import EIGH_FLOPS
from caspr_cli.optim.solve import newton_products
from caspr_cli.theory import solvers
from caspr_cli.theory.precision import roundoff
from caspr_cli.theory.solvers import SOLVERS, Matrix, P, Solver

ASYMPTOTIC = 1e3  # from this condition on, the condition decides an error, and not the rounding of the result
SMALL = 0.02  # predicted errors up to here are in the reach of a first order
STORED = math.sqrt(math.log(2) / 4.5)  # ||E||_F over u ||S||_F


def divided_differences(values: Tensor, p: int) -> Tensor:
    """Return F ``[d, d]`` of x^(-1/p) at positive ``values`` ``[d]``, in a form that cancels nothing.

    With a = x^(-1/p) it is F_ij = -a_i^p a_j^p / sum_k a_i^k a_j^(p-1-k).
    """
    a = values.pow(-1 / p)
    powers = a.unsqueeze(1).pow(torch.arange(p))  # [d, p]
    sums = powers @ powers.flip(1).mT
    return -(values.unsqueeze(1) * values).reciprocal() / sums


def sensitivity(values: Tensor, p: int) -> float:
    """Return the expected relative error of a root in Frobenius norm; it is proportional to ||E||_F.

    ||E||_F is the largest of ``values`` ``[d]``, and E has no direction of its own.
    """
    d, F = len(values), divided_differences(values, p)
    variance = float(values.max()) ** 2 / (d * (d + 1))
    error = variance * (F.square().sum() + F.diagonal().square().sum())
    return float((error / values.pow(-2 / p).sum()).sqrt())


def storage(values: Tensor, bits: int, p: int, shift: float = 0.0) -> float:
    """Return the relative error of the root of S + shift I, S of these eigenvalues ``[d]``, from storing S."""
    size = STORED * roundoff(bits) * float(torch.linalg.vector_norm(values))  # of E
    return sensitivity(values + shift, p) * size / float(values.max() + shift)


def one_rounding(values: Tensor, bits: int, p: int) -> float:
    """Return the expected relative error of the root for ||E||_2 = u ||S||_2, E with no direction of its own.

    Then ||E||_F = ||E||_2 d^(1/2) / 2, by Wigner's semicircle. A measured error over this one is c.
    """
    return sensitivity(values, p) * roundoff(bits) * math.sqrt(len(values)) / 2


def worst_case(delta: float, condition: float, p: int) -> float:
    """Return the most that ||f(S + E) - f(S)||_2 / ||f(S)||_2 can be, for ||E||_2 = delta ||S||_2.

    It is infinite where the smallest eigenvalue may be gone.
    """
    gone = delta * condition
    return math.inf if gone >= 1 else gone / p * (1 - gone) ** (-1 - 1 / p)


# ---- measured --------------------------------------------------------------------------------------------------


def cases(
    d: int, conditions: Iterable[float], dampings: Iterable[float], exponents: Iterable[int], seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    plans = list(product(exponents, dampings, SOLVERS))
    for condition, seed in product(conditions, seeds):
        matrix = Matrix.drawn(d, condition, seed)
        for p, eps, solver in plans:
            yield {"condition": condition, "seed": seed} | solved(solver, matrix, eps, p)


def solved(solver: Solver, matrix: Matrix, eps: float, p: int) -> dict[str, Any]:
    """Return the errors of a solver on a matrix with a relative damping, as a row.

    Keys:
        error: ||A - S~^(-1/p)|| / ||S~^(-1/p)||, Frobenius, with the shift that the solver says it has added.
        amplified: the error that a backward error of one rounding, ||E||_2 = u ||S||_2, is expected to make.
        predicted: the error of storing S, where it is all there is.
        ratio: the error in the 2-norm over the worst that ||E||_2 allows; 0 where that is infinite.
        accepted: whether the optimizer would use the root.
        residual: ||A^(p/2) S~ A^(p/2) - I||_F / d^(1/2), estimated as the optimizer does.
        coupled: the least of Newton's own max |M - I|.
        steps, forecast: of Newton, and as many as the library takes to be enough.
        roundings: c, see :mod:`caspr_cli.theory.rounding`.
    """
    seen = solver.matrix(matrix.S)
    with solver.products(), solvers.NewtonWatch() as watch:
        root = solver.run(seen, eps, p)
    shift = float(root.shift)
    damped, expected = matrix.values + shift, matrix.root(shift, p)
    finite, newton = bool(root.A.isfinite().all()), solver.method == "newton"
    error = float((root.A[0].double() - expected).norm() / expected.norm()) if finite else math.inf
    left = float(residual(seen, root, p)) if finite else math.inf
    amplified = one_rounding(damped, solver.bits, p)
    return {
        "solver": solver.name,
        "p": p,
        "d": len(damped),
        "eps": eps,
        "error": error,
        "amplified": amplified,
        "predicted": storage(matrix.values, solver.stored, p, eps) if solver.exact else math.nan,
        "ratio": _of_worst(root, seen[0], matrix, eps, p) if finite and solver.exact else 0.0,
        "finite": finite,
        "accepted": finite and left <= float(bound(root.condition, seen.dtype, ACCEPTED)),
        "residual": left,
        "coupled": watch.least if newton and watch.steps else math.nan,
        "steps": watch.steps if newton else math.nan,
        "forecast": newton_steps(float(damped.max() / damped.min()), p),
        "roundings": error / amplified,
    }


def _of_worst(root: Root, seen: Tensor, matrix: Matrix, eps: float, p: int) -> float:
    """Return the error in the 2-norm in units of the most that theory allows for S + E as the solver sees it.

    Damping follows the largest eigenvalue, which E moves by no more than its norm; negative eigenvalues count as zero,
    which moves what is seen by its norm once more.
    """
    shift, norm = float(root.shift), lambda X: float(torch.linalg.matrix_norm(X, 2))
    damped, expected = matrix.values + shift, matrix.root(shift, p)
    clamped = float(torch.linalg.eigvalsh(seen)[0]) < 0
    delta = norm(seen - matrix.S[0]) / float(damped.max())
    most = worst_case(delta * (1 + eps + clamped), float(damped.max() / damped.min()), p)
    return norm(root.A[0].double() - expected) / norm(expected) / most


def cost_of(solver: Solver, matrix: Matrix, eps: float, p: int) -> dict[str, Any]:
    """Return time and memory of one root in float32, measured on as many threads as torch has, and predicted."""
    seen, d = solver.matrix(matrix.S), len(matrix.values)

    def run() -> Root:
        return solver.run(seen, eps, p)

    with solvers.NewtonWatch() as watch:
        run()
    cubes = EIGH_FLOPS if solver.method == "eigh" else 2 * watch.steps * newton_products(p)
    flops = float(cubes * d**3)
    row = {"d": d, "solver": solver.method, "mb": solvers.peak_bytes(run) / 1e6}
    row |= {"ms": 1e3 * solvers.least_seconds(run), "predicted_ms": 1e3 * flops / solvers.product_rate(d)}
    row |= {"flops": flops, "steps": watch.steps or math.nan}
    return row | {"predicted_mb": solvers.MATRICES_HELD[solver.method] * d * d * seen.element_size() / 1e6}


def constants_of(bare: DataFrame) -> DataFrame:
    """Return the backward error of each solver in roundings, over conditions and exponents.

    These are the solvers whose errors are their own, in cases where the condition decides and the error is small;
    ``floor`` is the error at the least condition, in units of u.
    """
    rows = {}
    for solver in SOLVERS:
        own = bare[bare["solver"] == solver.name]
        clear = own.loc[(own["condition"] >= ASYMPTOTIC) & (own["error"] <= SMALL), "roundings"]
        if solver.exact or clear.empty:
            continue
        floor = own.loc[own["condition"] == own["condition"].min(), "error"].median() / roundoff(solver.bits)
        rows[solver.name] = {"middle": clear.median(), "least": clear.min(), "most": clear.max()}
        rows[solver.name] |= {"count": len(clear), "floor": floor}
    return DataFrame.from_dict(rows, orient="index")


def moved(values: Tensor, eps: float) -> dict[str, float]:
    """Return the effect of damping on S with these eigenvalues: on its root, and on the direction of an update."""
    shifted = values + eps * values.max()
    kept = values / shifted  # squares of what is left of each direction of S^(-1/2) G, which have all the same length
    change = values.pow(-1 / P) - shifted.pow(-1 / P)
    return {
        "damped": float((values < eps * values.max()).double().mean()),
        "cosine": float(kept.sqrt().sum() / (len(values) * kept.sum()).sqrt()),
        "bias": float(change.norm() / values.pow(-1 / P).norm()),
    }
