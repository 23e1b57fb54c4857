"""The statements on the order of preconditioners, each as a number that should not be negative.

With L~, R~ and F~ as in :mod:`caspr_cli.theory.preconditioners`, r >= rank(G_t) for all t, and A <= B where B - A
has no negative eigenvalue:

1. F~ <= L~ x I and F~ <= I x R~. For G = sum_i s_i u_i v_i^T of rank r, vec(G) is a sum of r terms, and by
   Cauchy-Schwarz vec(G) vec(G)^T <= r sum_i s_i^2 u_i u_i^T x v_i v_i^T <= r G G^T x I (Gupta, Koren, Singer,
   ICML 2018, Lemma 8).
2. F~^(1/2) <= X_1. The inverse root turns the order around (x -> -x^(-1/2) is operator monotone), so
   F~^(-1/2) >= L~^(-1/2) x I and >= I x R~^(-1/2), and so >= their mean, X_1^{-1}; the inverse turns it again.
3. X_1 <= X_2 <= X_3 <= ... <= X_Shampoo: they commute, and each eigenvalue is a power mean of exponent -1/p.
4. All inverses the other way around. So tr X and || X - F~^(1/2) ||_F grow along the chain (for A >= B >= 0,
   ||A||_F >= ||B||_F), and <G, U> = vec(G)^T X^{-1} vec(G) falls and is never negative.
5. All of this for any weights on the gradients that are the same in L, R and F: moving averages.
6. A matrix cut in blocks stands above the blocks of F~ that belong to it.
7. With sums, X_p of step t stands above that of step t - 1: power means of exponent in [-1, 0) of commuting positive
   matrices, and the geometric mean, are operator monotone (Kubo and Ando, Math. Ann. 246, 1980).
8. X_2^{-1} = (X_1^{-1} + X_Shampoo^{-1}) / 2, by (a + b)^2 = (a^2 + b^2) + 2ab.
9. Traces, and the distances || X_p - F^(1/2) || and || X_p^{-1} - F^(-1/2) ||, grow with p without the 1/r too. In the
   eigenbasis u_i x v_j of all X_p, F has the diagonal eps + sum_t (u_i^T G_t v_j)^2 <= min(l_i, r_j). By Jensen
   F^(1/2) has at most its root there, so at most min(l_i, r_j)^(1/2), which no power mean of l_i^(1/2) and r_j^(1/2) is
   below. A distance is what F^(1/2) has off this diagonal, and the differences on it, which grow with p; traces are
   sums of these. For inverses the same, with x^(-1/2), which is convex, and everything the other way around.

Similar statements that are false: 2 without the 1/r; with roots of an earlier step; with blocks, against the whole of
F~; 7 with moving averages.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from caspr_cli.theory.preconditioners import Root, averaging, axis_statistics, combined, full_statistic, loewner_gap

ORDERS = (1, 2, 3, math.inf)
NAMES = ("full-matrix", "order 1", "caspr", "order 3", "shampoo")  # the chain
BETA = 0.99  # of the moving averages
STALE = 9  # steps: as old as roots become with an interval of 10
EPS = 1e-6  # of the largest eigenvalue of a G G^T
GAPS = ("gap_1", "gap_2", "gap_3", "gap_shampoo")

CLAIMS = {
    "lemma_left": "F~ ⪯ L~ ⊗ I",
    "lemma_right": "F~ ⪯ I ⊗ R~",
    "gap_1": "F~^½ ⪯ X₁",
    "gap_2": "X₁ ⪯ X₂ (CASPR)",
    "gap_3": "X₂ ⪯ X₃",
    "gap_shampoo": "X₃ ⪯ X_Shampoo",
    "inverses": "the same for the inverses, in reverse order",
    "traces": "traces grow along the chain",
    "distances": "the distance ‖X − F~^½‖ grows along the chain",
    "products": "⟨G, U⟩ falls along the chain and is not negative",
    "averages": "the chain, for moving averages",
    "own_blocks": "CASPR of each half of G ⪰ that half of F~",
    "grows": "sums: X₁, X₂ and X_Shampoo grow from step to step",
    "bare_traces": "traces grow from F^½ on, without the 1/r",
    "bare_distances": "‖X − F^½‖ and ‖X⁻¹ − F^−½‖ grow with the order, without the 1/r",
    "identity": "X₂⁻¹ = ½ (X₁⁻¹ + X_Shampoo⁻¹)",
}
FALSE_CLAIMS = {
    "no_rank_1": "X₁ ⪰ F^½, without the 1/r",
    "no_rank": "X₂ ⪰ F^½, without the 1/r",
    "stale": f"X₂ of {STALE} steps ago ⪰ F~^½ of now",
    "whole": "CASPR of two halves of G ⪰ the whole F~^½",
    "average_grows": "moving averages: X₂ grows from step to step",
}


MEASURES = ("trace", "distance", "product")


def ridge(gradients: Tensor) -> float:
    """Return eps for all steps of a stream: ``EPS`` of the largest eigenvalue of a single G G^T."""
    return EPS * float(torch.linalg.matrix_norm(gradients, 2).max()) ** 2


def rounding(full: Root) -> float:
    """Return the relative error of F~^(-1/2) in float64: about u cond(F~) / 2, and a margin for large matrices."""
    condition = float(full.values.max() / full.values.min())
    return 1e-12 + 20 * torch.finfo(torch.float64).eps * condition


def chain(gradients: Tensor, eps: float, rank: int, weights: Tensor | None = None) -> list[Root]:
    """Return F~^(1/2), X_1, X_2, X_3, X_Shampoo of gradients ``[T, m, n]``."""
    sides = axis_statistics(gradients, eps, weights)
    full = Root.of(full_statistic(gradients, eps, rank, weights)).power(0.5)
    return [full, *(combined(*sides, order) for order in ORDERS)]


def check(gradients: Tensor, eps: float, rank: int) -> dict[str, float]:
    """Return the margins of all statements, and measures of the chain, after the last of ``gradients`` ``[T, m, n]``.

    About 25 decompositions of ``[mn, mn]``.

    Keys:
        those of ``CLAIMS`` and ``FALSE_CLAIMS``: margins, relative; those that do not apply are left out.
        ``trace NAME``: tr X of each member of the chain, in units of tr F~^(1/2).
        ``distance NAME``: || X - F~^(1/2) || / || F~^(1/2) ||.
        ``product NAME``: <G, U> of the last gradient, in units of full-matrix Adagrad's.
        ``tolerance``: margins above minus this are rounding.
    """
    roots = chain(gradients, eps, rank)
    dense, inverses = [root.dense() for root in roots], [root.power(-1) for root in roots]
    undone, tops = [inverse.dense() for inverse in inverses], [float(root.values.max()) for root in roots]
    full, oracle, G = roots[0].power(2), dense[0], gradients[-1]
    traces = [float(root.values.sum() / roots[0].values.sum()) for root in roots]
    distances = [float((matrix - oracle).norm() / oracle.norm()) for matrix in dense]
    inner = [float((G * inverse.apply(G)).sum()) for inverse in inverses]
    products = [value / (inner[0] or 1.0) for value in inner]
    gaps = [loewner_gap(b, a, top) for (a, b), top in zip(pairwise(dense), tops[1:], strict=True)]
    found = dict(zip(GAPS, gaps, strict=True))
    found["traces"] = min((b - a) / b for a, b in pairwise(traces))
    found["distances"] = min(b - a for a, b in pairwise(distances))
    found["products"] = min([a - b for a, b in pairwise(products)] + [products[-1]])
    found |= _lemma(full.dense(), gradients, eps)
    found |= _inverses(undone, float(inverses[0].values.max()))
    found |= _over_time(gradients, eps, rank, oracle)
    found |= _without_rank(gradients, eps, dense[1:], undone[1:])
    found |= _in_blocks(gradients, eps, rank, oracle)
    for measure, values in zip(MEASURES, (traces, distances, products), strict=True):
        found |= {f"{measure} {name}": value for name, value in zip(NAMES, values, strict=True)}
    return found | {"tolerance": rounding(full)}


def _lemma(F: Tensor, gradients: Tensor, eps: float) -> dict[str, float]:
    L, R = axis_statistics(gradients, eps)
    m, n = gradients.shape[1:]
    whole = {"lemma_left": torch.kron(L, torch.eye(n).to(L)), "lemma_right": torch.kron(torch.eye(m).to(R), R)}
    tops = (float(torch.linalg.eigvalsh(side)[-1]) for side in (L, R))
    return {key: loewner_gap(X, F, top) for (key, X), top in zip(whole.items(), tops, strict=True)}


def _inverses(undone: list[Tensor], top: float) -> dict[str, float]:
    """Return the margins of the reversed chain, and of the identity of order 2."""
    _, first, second, _, product = undone
    error = (second - (first + product) / 2).norm() / second.norm()
    return {"inverses": min(loewner_gap(a, b, top) for a, b in pairwise(undone)), "identity": -float(error)}


def _over_time(gradients: Tensor, eps: float, rank: int, oracle: Tensor) -> dict[str, float]:
    """Return the margins for moving averages, for X against the X before, and for an old X against F~ of now."""
    steps, past = len(gradients), gradients[:-1]
    averaged = chain(gradients, eps, rank, averaging(steps, BETA))[:3]
    found = {"averages": min(_gap(b, a) for a, b in pairwise(averaged))}
    if steps == 1:
        return found
    now, before = axis_statistics(gradients, eps), axis_statistics(past, eps)
    found["grows"] = min(_gap(combined(*now, order), combined(*before, order)) for order in (1, 2, math.inf))
    old = combined(*axis_statistics(past, eps, averaging(steps - 1, BETA)), 2)
    found["average_grows"] = _gap(averaged[-1], old)
    stale = combined(*axis_statistics(gradients[: max(steps - STALE, 1)], eps), 2)
    return found | {"stale": loewner_gap(stale.dense(), oracle, _largest(oracle))}


def _gap(larger: Root, smaller: Root) -> float:
    return loewner_gap(larger.dense(), smaller.dense(), float(larger.values.max()))


def _largest(X: Tensor) -> float:
    return float(torch.linalg.matrix_norm(X, 2))


def _without_rank(gradients: Tensor, eps: float, dense: list[Tensor], undone: list[Tensor]) -> dict[str, float]:
    """Return the margins of X_1 .. X_Shampoo and their inverses against F^(1/2) and F^(-1/2), not divided by r."""
    root = Root.of(full_statistic(gradients, eps)).power(0.5)
    F, inverse, top = root.dense(), root.power(-1).dense(), float(root.values.max())
    traces = [float(torch.trace(X)) for X in (F, *dense)]
    growth = [
        min(b - a for a, b in pairwise(float((X - exact).norm() / exact.norm()) for X in found))
        for found, exact in ((dense, F), (undone, inverse))
    ]
    return {
        "no_rank_1": loewner_gap(dense[0], F, top),
        "no_rank": loewner_gap(dense[1], F, top),
        "bare_traces": min((b - a) / b for a, b in pairwise(traces)),
        "bare_distances": min(growth),
    }


def _in_blocks(gradients: Tensor, eps: float, rank: int, oracle: Tensor) -> dict[str, float]:
    """Return the margins for G cut into two halves along its longer axis, each with statistics of its own."""
    m, n = gradients.shape[1:]
    if max(m, n) < 2:
        return {}
    axis = 1 if m > n else 2
    places = torch.arange(m * n).reshape(1, m, n).chunk(2, axis)
    assembled, own = torch.zeros_like(oracle), []
    for part, place in zip(gradients.chunk(2, axis), places, strict=True):
        X, index = combined(*axis_statistics(part, eps), 2), place.flatten()
        assembled[index[:, None], index[None, :]] = X.dense()
        own.append(_gap(X, Root.of(full_statistic(part, eps, rank)).power(0.5)))
    return {"own_blocks": min(own), "whole": loewner_gap(assembled, oracle, _largest(oracle))}
