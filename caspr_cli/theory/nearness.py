"""How near each preconditioner stands to the full-matrix one: the numbers of ``caspr-verify approximation``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from caspr_cli.theory.preconditioners import (
    Root,
    Spectral,
    axis_statistics,
    caspr_one,
    combined,
    cosine,
    diagonal,
    full_statistic,
    nearest_kronecker,
    one_sided,
    product,
    row_statistic,
    shampoo_half,
)

ORACLES = ("Kronecker of F", "Kronecker of F^½")  # need F itself
FAMILY = ("order 1", "caspr", "order 3", "shampoo 1/4")
PRODUCTS = ("shampoo 1/4", "shampoo 1/2", "left", "right", "Kronecker of F")  # Kronecker products, besides the last


@dataclass(frozen=True)
class Near:
    """How one preconditioner X stands to F^(1/2), at one step."""

    root: float  # cosine of X and F^(1/2)
    inverse: float  # cosine of X^{-1} and F^(-1/2)
    root_distance: float  # || X - F^(1/2) || / || F^(1/2) ||
    inverse_distance: float
    angle: float  # degrees between X^{-1} G and F^(-1/2) G, for the last G


@dataclass(frozen=True)
class Case:
    """All preconditioners for one layer at one step."""

    task: str
    parameter: str
    seed: int
    step: int
    near: Mapping[str, Near]


def approximations(gradients: Tensor, eps: float) -> dict[str, Root]:
    """Each X of gradients ``[T, m, n]``, with the same eps everywhere: in F, its parts, L and R.

    The nearest Kronecker product is taken twice: of F, which then gets its root, and of F^(1/2) itself.
    """
    m, n = gradients.shape[1:]
    L, R = axis_statistics(gradients, eps)
    F = full_statistic(gradients, eps)
    root = Spectral.of(F).power(0.5)
    return {
        "caspr": combined(L, R, 2),
        "order 1": combined(L, R, 1),
        "order 3": combined(L, R, 3),
        "shampoo 1/4": combined(L, R, math.inf),
        "shampoo 1/2": shampoo_half(L, R),
        "caspr, e = 1": caspr_one(L, R),
        "left": one_sided(L, R, left=True),
        "right": one_sided(L, R, left=False),
        "row-wise": Spectral.of(row_statistic(gradients, eps)).power(0.5),
        "diagonal": diagonal(gradients, eps).power(0.5),
        "Kronecker of F": product(*nearest_kronecker(F, (m, n))).power(0.5),
        "Kronecker of F^½": product(*nearest_kronecker(root.dense(), (m, n))),
        "full": root,
    }


def nearness(gradients: Tensor, eps: float) -> dict[str, Near]:
    """How near each stands to the full matrix after the last of ``gradients`` ``[T, m, n]``.

    Cosines do not depend on the scale of X: after the best scaling the relative distance is sqrt(1 - cos^2). The
    plain distance does, and compares X as its update uses it.
    """
    roots = approximations(gradients, eps)
    full = roots.pop("full")
    exact, G = (full.dense(), full.power(-1).dense()), gradients[-1]
    wanted = full.power(-1).apply(G)
    found = {}
    for name, root in roots.items():
        X, inverse = root.dense(), root.power(-1)
        P = inverse.dense()
        found[name] = Near(
            cosine(X, exact[0]),
            cosine(P, exact[1]),
            float((X - exact[0]).norm() / exact[0].norm()),
            float((P - exact[1]).norm() / exact[1].norm()),
            math.degrees(math.acos(min(max(cosine(inverse.apply(G), wanted), -1.0), 1.0))),
        )
    return found


# ---- of many cases ----------------------------------------------------------------------------------------------


def tasks_of(cases: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(case.task for case in cases))


def at(cases: Sequence[Case], task: str, step: int | None = None) -> list[Case]:
    """Of a task at a step; the last if it is None."""
    own = [case for case in cases if case.task == task]
    last = max(case.step for case in own) if step is None else step
    return [case for case in own if case.step == last]


def mean(cases: Sequence[Case], name: str, measure: str) -> float:
    return fmean(getattr(case.near[name], measure) for case in cases)
