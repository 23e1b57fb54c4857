"""The dense preconditioners against those of tests/references, and what is said of them."""

import math

import pytest
import torch
from references.kronecker import damped, inverse_preconditioner, on_axis, preconditioner, spectral_power
from references.stream import full_matrix, random_stream, statistics

from caspr_cli.theory.preconditioners import (
    Root,
    averaging,
    axis_statistics,
    combined,
    cosine,
    entrywise,
    full_statistic,
    loewner_gap,
    nearest_kronecker,
    one_sided,
    product,
    row_statistic,
    shampoo_half,
)

EPS = 1e-3
SHAPES = [(3, 4), (4, 2), (1, 5)]


def stream(shape, seed=0, steps=5):
    gradients = random_stream(*shape, steps=steps, seed=seed)
    return gradients, torch.stack(gradients)


def close(a, b, tolerance=1e-10):
    return torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_are_those_of_the_reference(shape):
    gradients, G = stream(shape)
    assert close(full_statistic(G, EPS, 3), full_matrix(gradients, EPS, 3))
    for kind, beta, weights in (("accumulate", 0.0, None), ("ema", 0.8, averaging(5, 0.8))):
        expected = statistics(gradients, kind, beta)
        for side, other in zip(axis_statistics(G, EPS, weights), expected, strict=True):
            assert close(side, damped(other, EPS, "absolute"))


@pytest.mark.parametrize("order", [1, 2, 3, 7, math.inf])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_family_is_that_of_the_reference(shape, order):
    _, G = stream(shape)
    sides = axis_statistics(G, EPS)
    X, inverse = combined(*sides, order), inverse_preconditioner(list(sides), order)
    assert close(X.dense(), preconditioner(list(sides), order))
    assert close(X.power(-1).dense(), inverse)
    assert close(X.power(-1).apply(G[-1]), (inverse @ G[-1].flatten()).reshape(shape))


def test_a_root_is_the_matrix_itself():
    _, G = stream((3, 4))
    F = full_statistic(G, EPS)
    assert close(Root.of(F).dense(), F)
    assert close(Root.of(F).power(-0.5).dense(), spectral_power(F, -0.5))
    assert close(Root.of(F).apply(G[0]).flatten(), F @ G[0].flatten())


def test_parts_of_the_full_matrix():
    _, G = stream((3, 4))
    F = full_statistic(G, EPS)
    assert close(entrywise(G.square().sum(0) + EPS).dense(), torch.diag(F.diagonal()))
    rows = torch.arange(12) // 4
    assert close(row_statistic(G, EPS), F * (rows[:, None] == rows[None, :]))


def test_one_sided_and_half():
    _, G = stream((3, 4))
    L, R = axis_statistics(G, EPS)
    assert close(one_sided(L, R, left=True).dense(), on_axis(spectral_power(L, 0.5), (3, 4), 0))
    assert close(one_sided(L, R, left=False).dense(), on_axis(spectral_power(R, 0.5), (3, 4), 1))
    expected = torch.kron(spectral_power(L, 0.5), spectral_power(R, 0.5))
    assert cosine(shampoo_half(L, R).dense(), expected) == pytest.approx(1, abs=1e-12)
    large = shampoo_half(*axis_statistics(10 * G, 100 * EPS))
    assert close(large.dense(), 10 * shampoo_half(L, R).dense())  # of degree one in G, as the others are


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (3, 3)])
def test_the_nearest_kronecker_product(shape):
    """Its distance is the rest of the singular values, and it is positive definite; a product is found again."""
    m, n = shape
    _, G = stream(shape)
    F = full_statistic(G, EPS)
    A, B = nearest_kronecker(F, shape)
    assert torch.linalg.eigvalsh(A)[0] > 0
    assert torch.linalg.eigvalsh(B)[0] > 0
    moved = F.reshape(m, n, m, n).transpose(1, 2).reshape(m * m, n * n)
    rest = torch.linalg.svdvals(moved)[1:].norm().item()
    assert torch.linalg.matrix_norm(F - torch.kron(A, B)).item() == pytest.approx(rest, rel=1e-9)
    L, R = axis_statistics(G, EPS)
    A, B = nearest_kronecker(torch.kron(L, R), shape)
    assert close(torch.kron(A, B), torch.kron(L, R))
    assert close(product(A, B).power(0.5).dense(), torch.kron(spectral_power(L, 0.5), spectral_power(R, 0.5)))


def test_gap():
    a = torch.diag(torch.tensor([1.0, 2.0]).double())
    assert loewner_gap(2 * a, a, 4.0) == pytest.approx(0.25)
    assert loewner_gap(a, 2 * a, 4.0) == pytest.approx(-0.5)
