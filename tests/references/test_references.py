"""The references against still simpler statements, so that two errors cannot agree unseen."""

import pytest
import torch

from references.kronecker import gram, kronecker_product, kronecker_sum, on_axis, polar_factor, spectral_power
from references.optimizer import axis_parts, merged_shape
from references.stream import average, random_stream, statistics, uncorrected_average


def definite(size, seed):
    root = random_stream(size, size, steps=1, seed=seed)[0]
    return root @ root.mT + 0.1 * torch.eye(size)


def test_powers_multiply_to_the_inverse():
    matrix = definite(5, seed=1)
    root = spectral_power(matrix, -1 / 4)
    assert torch.allclose(root @ root @ root @ root @ matrix, torch.eye(5).double(), atol=1e-10)
    assert torch.allclose(root, root.mT, atol=1e-12)


@pytest.mark.parametrize(("axis", "rule"), [(0, "ia,abc->ibc"), (1, "ib,abc->aic"), (2, "ic,abc->abi")])
def test_on_axis_is_the_contraction_with_that_axis(axis, rule):
    shape = (2, 3, 4)
    tensor = random_stream(*shape, steps=1, seed=2)[0]
    matrix = random_stream(shape[axis], shape[axis], steps=1, seed=3)[0]
    expected = torch.einsum(rule, matrix, tensor)
    assert torch.allclose(on_axis(matrix, shape, axis) @ tensor.flatten(), expected.flatten())


@pytest.mark.parametrize(("axis", "rule"), [(0, "abc,dbc->ad"), (1, "abc,adc->bd"), (2, "abc,abd->cd")])
def test_gram_contracts_all_other_axes(axis, rule):
    tensor = random_stream(2, 3, 4, steps=1, seed=4)[0]
    assert torch.allclose(gram(tensor, axis), torch.einsum(rule, tensor, tensor))


def test_two_sides_written_as_matrix_products():
    """vec is row-major: (A x I + I x B)^2 / 4 is two passes of (A G + G B) / 2, and A x B is A G B."""
    left, right = definite(3, seed=5), definite(4, seed=6)
    gradient = random_stream(3, 4, steps=1, seed=7)[0]
    a, b = spectral_power(left, -1 / 4), spectral_power(right, -1 / 4)
    once = (a @ gradient + gradient @ b) / 2
    twice = (a @ once + once @ b) / 2
    assert torch.allclose(kronecker_sum([left, right], 2) @ gradient.flatten(), twice.flatten())
    product = (a @ gradient @ b).flatten()
    assert torch.allclose(kronecker_product([left, right]) @ gradient.flatten(), product)


def test_polar_factor_is_nearest_and_orthogonal():
    gradient = random_stream(3, 5, steps=1, seed=8)[0]
    factor = polar_factor(gradient)
    assert torch.allclose(factor @ factor.mT, torch.eye(3).double(), atol=1e-12)
    assert torch.allclose(factor @ gradient.mT, gradient @ factor.mT, atol=1e-12)  # G Q^T is symmetric


def test_averages_are_the_usual_recursions():
    terms, beta, recursion = random_stream(2, 3, steps=6, seed=9), 0.7, torch.zeros(2, 3)
    for step, term in enumerate(terms, start=1):
        recursion = beta * recursion + (1 - beta) * term
        assert torch.allclose(uncorrected_average(terms[:step], beta), recursion.double())
        assert torch.allclose(average(terms[:step], beta), recursion / (1 - beta**step))
    assert torch.allclose(average(terms[:1], 0.0), terms[0])
    left, right = statistics(terms, "accumulate", beta)
    assert torch.allclose(left, sum(g @ g.mT for g in terms))
    assert torch.allclose(right, sum(g.mT @ g for g in terms))


def test_the_shapes_of_merging_and_blocks():
    assert merged_shape((8, 64, 512), "matrix") == (8, 32768)
    assert merged_shape((8, 64, 512), "square") == (512, 512)
    assert merged_shape((8, 64, 512), "none") == (8, 64, 512)
    assert merged_shape((1, 7, 1), "matrix") == (7,)
    assert axis_parts(1100, 1024) == [slice(0, 550), slice(550, 1100)]
    assert axis_parts(7, 3) == [slice(0, 3), slice(3, 5), slice(5, 7)]
