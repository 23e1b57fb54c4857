"""The update equals the formula of the paper written with dense Kronecker products."""

import itertools
import math

import pytest
import torch
from pairs import pairs
from references.drive import bare_updates, relative_error
from references.kronecker import polar_factor, precondition, spectral_power
from references.stream import full_matrix, low_rank_stream, random_stream, statistics

from caspr_cli.optim import CASPR, FullAdagrad, Shampoo

SHAPES = [(1, 1), (1, 5), (5, 1), (3, 5), (5, 3), (4, 4)]
BETA = 0.9
ORDERS = [1, 2, 3, math.inf]


def optimizer_of(order):
    """The class and its options: an infinite order is Shampoo's product."""
    return (Shampoo, {}) if order == math.inf else (CASPR, {"order": order})


DENSE = {"shape": SHAPES, "kind": ["ema", "accumulate"], "damping": ["relative", "absolute"], "order": ORDERS}


@pytest.mark.parametrize(("shape", "kind", "damping", "order"), [tuple(row.values()) for row in pairs(DENSE)])
def test_update_is_the_dense_kronecker_formula(shape, kind, damping, order):
    gradients = random_stream(*shape, steps=5, seed=1)
    optimizer, options = optimizer_of(order)
    updates = bare_updates(optimizer, gradients, beta=BETA, eps=1e-4, statistics=kind, damping=damping, **options)
    for step, update in enumerate(updates, start=1):
        expected = precondition(gradients[step - 1], statistics(gradients[:step], kind, BETA), 1e-4, damping, order)
        assert relative_error(update, expected) < 1e-9


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
    optimizer, options = optimizer_of(order)
    update = bare_updates(optimizer, [gradient], beta=0.0, eps=1e-12, **options)[0]
    assert relative_error(update, polar_factor(gradient)) < 1e-8


@pytest.mark.parametrize(("shape", "kind"), [((2, 3), "ema"), ((2, 3), "accumulate"), ((4, 1), "ema")])
def test_full_adagrad_is_the_inverse_root_of_the_full_matrix(shape, kind):
    gradients = random_stream(*shape, steps=5, seed=8)
    updates = bare_updates(FullAdagrad, gradients, statistics=kind, damping="absolute", eps=1e-3, beta=BETA)
    steps = len(gradients)
    for step in range(1, steps + 1):
        seen = gradients[:step]
        if kind == "ema":  # a weight w on g g^T is a factor sqrt(w) on g
            total = 1 - BETA**step
            seen = [g * math.sqrt((1 - BETA) * BETA ** (step - 1 - s) / total) for s, g in enumerate(seen)]
        expected = spectral_power(full_matrix(seen, 1e-3), -1 / 2) @ gradients[step - 1].flatten()
        assert relative_error(updates[step - 1].flatten(), expected) < 1e-9


@pytest.mark.parametrize("seed", range(2))
def test_inner_products_stand_in_the_order_of_the_preconditioners(seed):
    """<G, U_full> >= <G, U_1> >= <G, U_2> >= .. >= <G, U_Shampoo> > 0, gradients of rank one (r = 1)."""
    gradients = low_rank_stream(3, 4, 1, steps=6, seed=10 * seed)
    options = {"statistics": "accumulate", "damping": "absolute", "eps": 1e-3}
    runs = [bare_updates(FullAdagrad, gradients, **options)]
    runs += [bare_updates(CASPR, gradients, order=order, **options) for order in (1, 2, 3, 5)]
    runs += [bare_updates(Shampoo, gradients, **options)]
    for step, gradient in enumerate(gradients):
        products = [(gradient * updates[step]).sum().item() for updates in runs]
        assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(products))
        assert products[-1] > 0
