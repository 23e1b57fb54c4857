"""The update equals the formula of the paper written with dense Kronecker products."""

import itertools
import math

import pytest
import torch
from pairs import pairs
from references.drive import bare_updates, relative_error
from references.kronecker import damped, polar_factor, precondition, spectral_power
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


@pytest.mark.parametrize(("shape", "damping"), [((3, 5), "relative"), ((4, 4), "absolute")])
def test_order_two_is_the_mean_of_order_one_and_shampoo(shape, damping):
    gradients = random_stream(*shape, steps=4, seed=3)
    options = {"damping": damping, "eps": 1e-4}
    two = bare_updates(CASPR, gradients, order=2, **options)
    one = bare_updates(CASPR, gradients, order=1, **options)
    product = bare_updates(Shampoo, gradients, **options)
    for u_2, u_1, u_product in zip(two, one, product, strict=True):
        assert relative_error(u_2, (u_1 + u_product) / 2) < 1e-9


@pytest.mark.parametrize("shape", [(3, 5), (4, 4)])
def test_growing_order_tends_to_shampoo(shape):
    gradients = random_stream(*shape, steps=3, seed=4)
    product = bare_updates(Shampoo, gradients, eps=1e-4)[-1]
    gaps = [
        relative_error(bare_updates(CASPR, gradients, order=order, eps=1e-4)[-1], product)
        for order in (1, 2, 4, 16, 64, 256)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.01
    # The gap falls like 1/order.
    assert gaps[-1] < 0.02 * gaps[0]
    assert gaps[-1] == pytest.approx(gaps[-2] / 4, rel=0.1)


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


@pytest.mark.parametrize("order", [1, 2, 3, math.inf])
def test_damping_bends_the_singular_values_as_it_should(order):
    """With no memory and a square G of one eps, U = Q diag(s / sqrt(s^2 + eps)) K^T at every order."""
    gradient = random_stream(4, 4, steps=1, seed=7)[0]
    left, values, right = torch.linalg.svd(gradient)
    optimizer, options = optimizer_of(order)
    update = bare_updates(optimizer, [gradient], beta=0.0, eps=0.3, damping="absolute", **options)[0]
    assert relative_error(update, (left * (values / (values**2 + 0.3).sqrt())) @ right) < 1e-9


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


def test_accumulated_damping_is_added_once():
    """Zero gradients leave a sum as it is, and the ridge does not grow with the steps."""
    gradient = random_stream(3, 3, steps=1, seed=10)[0]
    stream = [gradient] + [torch.zeros_like(gradient)] * 5 + [gradient]
    update = bare_updates(CASPR, stream, statistics="accumulate", damping="absolute", eps=0.1)[-1]
    doubled = [2 * gradient @ gradient.mT, 2 * gradient.mT @ gradient]
    assert relative_error(update, precondition(gradient, doubled, 0.1, "absolute", 2)) < 1e-9


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


def test_each_statistic_has_its_own_ridge():
    """lambda_max differs between L and R once the gradients differ in rank and direction."""
    gradients = [torch.outer(a, b) for a, b in zip(*_vectors(), strict=True)]
    left, right = statistics(gradients, "accumulate", BETA)
    tops = [torch.linalg.eigvalsh(side)[-1].item() for side in (left, right)]
    assert abs(tops[0] - tops[1]) > 0.1 * max(tops)
    update = bare_updates(CASPR, gradients, statistics="accumulate", eps=0.1)[-1]
    fourth = [spectral_power(damped(side, 0.1, "relative"), -1 / 4) for side in (left, right)]
    half = (fourth[0] @ gradients[-1] + gradients[-1] @ fourth[1]) / 2
    assert relative_error(update, (fourth[0] @ half + half @ fourth[1]) / 2) < 1e-9


def _vectors():
    left = random_stream(4, steps=3, seed=12)
    right = random_stream(5, steps=3, seed=13)
    return left, [right[0] + 0.1 * other for other in right]  # nearly one direction on the right
