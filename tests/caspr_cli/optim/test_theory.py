"""The lemmas behind the method, and the statements that look like them and are false.

X_q is the preconditioner (the update uses its inverse), L~ = eps I + sum G G^T, R~ = eps I + sum G^T G,
F~ = eps I + (1/r) sum vec(G) vec(G)^T with r the largest rank of a gradient. A >= B means A - B has no
negative eigenvalue, tested up to 1e-8 of the larger norm.
"""

import itertools
import math

import pytest
import torch
from references.drive import bare_updates
from references.kronecker import (
    damped,
    inverse_preconditioner,
    loewner_gap,
    on_axis,
    precondition,
    preconditioner,
    spectral_power,
)
from references.stream import full_matrix, low_rank_stream, random_stream, statistics

from caspr_cli.optim import CASPR, FullAdagrad, Shampoo

ORDERS = [1, 2, 3, 5, math.inf]
EPS = 1e-3
STREAMS = [(3, 4, 1), (4, 3, 2), (2, 5, 2), (4, 4, 4), (1, 4, 1), (4, 1, 1)]  # rows, columns, rank


def summed(gradients, eps=EPS, weights=None):
    """The damped L~ and R~ of a stream, a weight w on G G^T being a factor sqrt(w) on G."""
    weights = [1.0] * len(gradients) if weights is None else weights
    scaled = [math.sqrt(w) * g for w, g in zip(weights, gradients, strict=True)]
    return [damped(side, eps, "absolute") for side in statistics(scaled, "accumulate", 0.0)]


def holds(larger, smaller):
    return loewner_gap(larger, smaller) >= -1e-8


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("rows", "columns", "rank"), STREAMS)
def test_loewner_chain(rows, columns, rank, seed):
    """F~^(1/2) <= X_1 <= X_2 <= X_3 <= X_5 <= X_Shampoo, the inverses reversed, and what follows."""
    gradients = low_rank_stream(rows, columns, rank, steps=6, seed=100 * seed)
    sides = summed(gradients)
    full = full_matrix(gradients, EPS, rank)
    assert holds(on_axis(sides[0], (rows, columns), 0), full)
    assert holds(on_axis(sides[1], (rows, columns), 1), full)
    chain = [spectral_power(full, 1 / 2), *(preconditioner(sides, order) for order in ORDERS)]
    inverses = [spectral_power(full, -1 / 2), *(inverse_preconditioner(sides, order) for order in ORDERS)]
    for smaller, larger in itertools.pairwise(chain):
        assert holds(larger, smaller)
    for larger, smaller in itertools.pairwise(inverses):
        assert holds(larger, smaller)
    # Traces rise along the chain, to tr(L~^(1/4)) tr(R~^(1/4)).
    traces = [torch.trace(x).item() for x in chain]
    assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(traces))
    product = math.prod(torch.trace(spectral_power(side, 1 / 4)).item() for side in sides)
    assert traces[-1] == pytest.approx(product, rel=1e-9)
    # So does the Frobenius distance from the oracle: a smaller order is nearer.
    distances = [torch.linalg.matrix_norm(x - chain[0]).item() for x in chain]
    assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(distances))
    # <G, U> falls along the chain and stays positive.
    g = gradients[-1].flatten()
    products = [(g @ inverse @ g).item() for inverse in inverses]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(products))
    assert products[-1] > 0


@pytest.mark.parametrize("seed", range(3))
def test_loewner_chain_of_averages(seed):
    """It holds for any weights on the gradients, those of a bias-corrected average among them."""
    beta, gradients = 0.8, low_rank_stream(3, 4, 2, steps=6, seed=100 * seed)
    weights = [(1 - beta) * beta ** (5 - s) / (1 - beta**6) for s in range(6)]
    sides = summed(gradients, weights=weights)
    full = full_matrix([math.sqrt(w) * g for w, g in zip(weights, gradients, strict=True)], EPS, 2)
    chain = [spectral_power(full, 1 / 2), *(preconditioner(sides, order) for order in ORDERS)]
    for smaller, larger in itertools.pairwise(chain):
        assert holds(larger, smaller)


@pytest.mark.parametrize("seed", range(3))
def test_loewner_chain_with_relative_damping(seed):
    """F~ then carries the smaller of the two ridges."""
    gradients = low_rank_stream(3, 4, 1, steps=3, seed=100 * seed)
    plain = statistics(gradients, "accumulate", 0.0)
    ridges = [0.1 * torch.linalg.eigvalsh(side)[-1].item() for side in plain]
    sides = [damped(side, 0.1, "relative") for side in plain]
    chain = [spectral_power(full_matrix(gradients, min(ridges), 1), 1 / 2)]
    chain += [preconditioner(sides, order) for order in ORDERS]
    for smaller, larger in itertools.pairwise(chain):
        assert holds(larger, smaller)


@pytest.mark.parametrize("shape", [(2, 3, 2), (2, 2, 2, 2)])
def test_loewner_chain_of_more_axes(shape):
    """r is then the largest rank of an unfolding, at most the largest axis."""
    gradients = random_stream(*shape, steps=5, seed=1)
    sides = [damped(side, EPS, "absolute") for side in statistics(gradients, "accumulate", 0.0)]
    chain = [spectral_power(full_matrix(gradients, EPS, max(shape)), 1 / 2)]
    chain += [preconditioner(sides, order) for order in ORDERS]
    for smaller, larger in itertools.pairwise(chain):
        assert holds(larger, smaller)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("rows", "columns", "rank"), STREAMS)
def test_accumulated_preconditioners_grow(rows, columns, rank, order):
    gradients = low_rank_stream(rows, columns, rank, steps=6, seed=7)
    grown = [preconditioner(summed(gradients[:t]), order) for t in range(1, 7)]
    for earlier, later in itertools.pairwise(grown):
        assert holds(later, earlier)


@pytest.mark.parametrize("seed", range(3))
def test_inner_products_of_the_optimizers_themselves(seed):
    """<G, U_full> >= <G, U_1> >= <G, U_2> >= .. >= <G, U_Shampoo> > 0, gradients of rank one (r = 1)."""
    gradients = low_rank_stream(3, 4, 1, steps=6, seed=10 * seed)
    options = {"statistics": "accumulate", "damping": "absolute", "eps": EPS}
    runs = [bare_updates(FullAdagrad, gradients, **options)]
    runs += [bare_updates(CASPR, gradients, order=order, **options) for order in (1, 2, 3, 5)]
    runs += [bare_updates(Shampoo, gradients, **options)]
    for step, gradient in enumerate(gradients):
        products = [(gradient * updates[step]).sum().item() for updates in runs]
        assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(products))
        assert products[-1] > 0


def test_lemma_of_the_nearest_kronecker_factor():
    """argmin_X || I x X - sum vec vec^T ||_F is (1/n) sum G G^T: the gradient of the square vanishes there."""
    rows, columns = 3, 4
    gradients = random_stream(rows, columns, steps=5, seed=2)
    full = full_matrix(gradients, 0.0)
    left, right = statistics(gradients, "accumulate", 0.0)
    for side, axis, others in ((left, 0, columns), (right, 1, rows)):
        nearest = (side / others).requires_grad_()
        distance = torch.linalg.matrix_norm(on_axis(nearest, (rows, columns), axis) - full)
        (slope,) = torch.autograd.grad(distance, nearest)
        assert slope.abs().max() < 1e-10
        moved = on_axis(nearest.detach() * 1.1, (rows, columns), axis) - full
        assert torch.linalg.matrix_norm(moved) > distance * (1 + 1e-4)


# What does not hold: one fixed counterexample each.


def test_false_without_the_rank():
    """X_2 >= (eps I + sum vec vec^T)^(1/2), not divided by r: at G = I, X_2 is near I and vec(I) has length 2^(1/2)."""
    gradients = [torch.eye(2, dtype=torch.float64)]
    second = preconditioner(summed(gradients), 2)
    assert loewner_gap(second, spectral_power(full_matrix(gradients, EPS, 1), 1 / 2)) < -0.2
    assert holds(second, spectral_power(full_matrix(gradients, EPS, 2), 1 / 2))
    # Nor does it on a stream.
    gradients = low_rank_stream(3, 3, 3, steps=6, seed=7)
    second = preconditioner(summed(gradients), 2)
    assert loewner_gap(second, spectral_power(full_matrix(gradients, EPS, 1), 1 / 2)) < -0.2
    assert holds(second, spectral_power(full_matrix(gradients, EPS, 3), 1 / 2))


def test_false_that_averages_grow():
    """A large gradient followed by a small one."""
    gradients = [10 * random_stream(3, 3, steps=1, seed=3)[0], random_stream(3, 3, steps=1, seed=4)[0]]
    first, second = ([damped(side, EPS, "absolute") for side in statistics(gradients[:t], "ema", 0.5)] for t in (1, 2))
    for order in ORDERS:
        assert loewner_gap(preconditioner(second, order), preconditioner(first, order)) < -1e-2


def test_false_for_old_roots():
    """A preconditioner of the past need not stand above the full matrix of the present."""
    gradients = low_rank_stream(3, 4, 1, steps=6, seed=5)
    full = spectral_power(full_matrix(gradients, EPS, 1), 1 / 2)
    assert loewner_gap(preconditioner(summed(gradients[:2]), 2), full) < -1e-2
    assert holds(preconditioner(summed(gradients), 2), full)


def test_false_for_blocks_against_the_whole_matrix():
    """Blocks stand above the block-diagonal of F~, not above F~."""
    rows, columns, half = 2, 4, 2
    gradients = low_rank_stream(rows, columns, 1, steps=2, seed=6)
    blocks = [[g[:, :half] for g in gradients], [g[:, half:] for g in gradients]]
    whole = full_matrix(gradients, EPS, 1)
    diagonal = [full_matrix(block, EPS, 1) for block in blocks]
    # Row-major vec of the whole interleaves the blocks' entries.
    index = torch.arange(rows * columns).reshape(rows, columns)
    places = [index[:, :half].flatten(), index[:, half:].flatten()]
    assembled = torch.zeros_like(whole)
    for block, place, own in zip(blocks, places, diagonal, strict=True):
        x = preconditioner(summed(block), 2)
        assert holds(x, spectral_power(own, 1 / 2))
        assembled[place[:, None], place[None, :]] = x
    assert loewner_gap(assembled, spectral_power(whole, 1 / 2)) < -1e-2


def test_false_that_it_is_the_best_approximation():
    """Gradients with Kronecker covariance: L^(1/2) x R^(1/2) points nearer to F^(1/2) than CASPR does."""
    gradients = [
        torch.diag(torch.tensor([1.0, 2, 4, 8, 16]).double()) @ g for g in random_stream(5, 6, steps=2000, seed=8)
    ]
    left, right = statistics(gradients, "accumulate", 0.0)
    root = spectral_power(full_matrix(gradients, 0.0), 1 / 2)

    def cosine(matrix):
        size = torch.linalg.matrix_norm(matrix) * torch.linalg.matrix_norm(root)
        return ((matrix * root).sum() / size).item()

    half = cosine(torch.kron(spectral_power(left, 1 / 2), spectral_power(right, 1 / 2)))
    first, second, product = (cosine(preconditioner([left, right], order)) for order in (1, 2, math.inf))
    assert half > first > second > product
    assert half > 0.99


def test_precondition_is_the_inverse_of_the_preconditioner():
    """The two faces of the reference agree: X_q U = G."""
    gradients = random_stream(3, 4, steps=3, seed=9)
    plain = statistics(gradients, "accumulate", 0.0)
    for order in ORDERS:
        update = precondition(gradients[-1], plain, EPS, "absolute", order)
        back = preconditioner(summed(gradients), order) @ update.flatten()
        assert torch.linalg.vector_norm(back - gradients[-1].flatten()) < 1e-9
