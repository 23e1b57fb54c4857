"""The update equals the formula of the paper written with dense Kronecker products."""

import math

import pytest
import torch
from references.drive import bare_updates, relative_error
from references.kronecker import polar_factor, spectral_power
from references.stream import random_stream

from caspr_cli.optim import CASPR

SHAPES = [(1, 1), (1, 5), (5, 1), (3, 5), (5, 3), (4, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_algorithm_1_in_the_columns_of_the_paper(shape):
    """((R^-1/4 x I + I x L^-1/4) / 2)^2 vec(G), vec stacking columns, with plain sums and eps I."""
    rows, columns = shape
    gradients = random_stream(rows, columns, steps=4, seed=2)
    update = bare_updates(CASPR, gradients, statistics="accumulate", damping="absolute", eps=1e-3)[-1]
    left = 1e-3 * torch.eye(rows) + sum(G @ G.mT for G in gradients)
    right = 1e-3 * torch.eye(columns) + sum(G.mT @ G for G in gradients)
    fourth_left, fourth_right = spectral_power(left, -1 / 4), spectral_power(right, -1 / 4)
    eye_left, eye_right = torch.eye(rows).double(), torch.eye(columns).double()
    half = (torch.kron(fourth_right, eye_left) + torch.kron(eye_right, fourth_left)) / 2
    expected = (half @ half @ gradients[-1].mT.flatten()).reshape(columns, rows).mT
    assert relative_error(update, expected) < 1e-9


@pytest.mark.parametrize(
    ("shape", "order"), [((4, 4), 1), ((3, 6), 2), ((6, 3), 3), ((1, 5), 2), ((5, 1), 1), ((6, 3), math.inf)]
)
def test_without_memory_and_damping_the_update_is_the_polar_factor(shape, order):
    """Singular values in [0.5, 2], so that the ridge changes U by about eps / 0.25 alone."""
    rows, columns = shape
    left, _, right = torch.linalg.svd(random_stream(rows, columns, steps=1, seed=6)[0], full_matrices=False)
    values = torch.linspace(0.5, 2.0, min(rows, columns), dtype=torch.float64)
    gradient = (left * values) @ right
    update = bare_updates(CASPR, [gradient], beta=0.0, eps=1e-12, order=order)[0]
    assert relative_error(update, polar_factor(gradient)) < 1e-8
