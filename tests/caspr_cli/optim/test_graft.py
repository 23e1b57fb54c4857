"""The graft methods on their own are torch's optimizers, and lend their length to the update."""

import pytest
import torch
from pairs import pairs
from references.drive import relative_error, run
from references.optimizer import reference_weights
from references.stream import random_stream

from caspr_cli.optim import CASPR, FullAdagrad, Shampoo

STEPS = 8
RATES = [0.1, 0.1, 0.05, 0.2, 0.0, 0.1, 0.01, 0.3]  # the schedule changes lr between steps


def problem(*shape, seed=1, dtype=torch.float64):
    weight, *gradients = random_stream(*shape, steps=STEPS + 1, seed=seed, dtype=dtype)
    return weight, gradients


def grouped(optimizer_class, weight, gradients, *, lr, **options):
    """Like ``run``, with the parameter in a group that is not preconditioned."""

    def build(parameters, **rest):
        return optimizer_class([{"params": parameters, "precondition": False}], **rest)

    return run(build, weight, gradients, lr=lr, **options)


def before_the_start(optimizer_class, weight, gradients, **options):
    return run(optimizer_class, weight, gradients, start_step=STEPS + 1, **options)


def assert_same(weights, expected, bound=1e-12):
    for w, w_expected in zip(weights, expected, strict=True):
        assert relative_error(w, w_expected) < bound


WAYS = {"way": [grouped, before_the_start], "maximize": [False, True], "weight_decay": [0.0, 0.3]}
EACH = [tuple(row.values()) for row in pairs(WAYS)]


@pytest.mark.parametrize(
    ("optimizer", "precondition", "way", "maximize", "weight_decay"),
    [tuple(row.values()) for row in pairs({"optimizer": [CASPR, Shampoo, FullAdagrad],
                                           "precondition": ["momentum", "gradient"], **WAYS})],
)  # fmt: skip
def test_adam_graft_alone_is_adamw(optimizer, precondition, way, maximize, weight_decay):
    weight, gradients = problem(3, 4)
    shared = {"lr": RATES, "betas": (0.8, 0.95), "weight_decay": weight_decay, "maximize": maximize}
    expected = run(torch.optim.AdamW, weight, gradients, eps=1e-3, **shared)
    own = {"graft": "adam", "graft_eps": 1e-3} | ({"precondition": precondition} if way is before_the_start else {})
    assert_same(way(optimizer, weight, gradients, **own, **shared), expected)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_adamw_in_float32_for_every_rank(shape):
    weight, gradients = problem(*shape, seed=3, dtype=torch.float32)
    expected = run(torch.optim.AdamW, weight, gradients, lr=RATES, weight_decay=0.0)  # torch's default is 0.01
    weights = grouped(CASPR, weight, gradients, lr=RATES)
    assert_same(weights, expected, bound=1e-6)
    assert weights[-1].dtype == torch.float32


def decayed(optimizer_class, weight, gradients, *, lr, weight_decay, **options):
    """torch's optimizer with decoupled weight decay put before each of its steps: W <- (1 - lr wd) W."""
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = optimizer_class([parameter], lr=lr[0], **options)
    weights = []
    for rate, gradient in zip(lr, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        with torch.no_grad():
            parameter.mul_(1 - rate * weight_decay)
        parameter.grad = gradient.clone()
        optimizer.step()
        weights.append(parameter.detach().clone())
    return weights


@pytest.mark.parametrize(("way", "maximize", "weight_decay"), EACH)
def test_rmsprop_graft_alone_is_rmsprop(way, maximize, weight_decay):
    weight, gradients = problem(3, 4, seed=4)
    shared = {"lr": RATES, "weight_decay": weight_decay, "maximize": maximize}
    expected = decayed(torch.optim.RMSprop, weight, gradients, alpha=0.95, eps=1e-3, **shared)
    options = {"graft": "rmsprop", "betas": (0.0, 0.95), "graft_eps": 1e-3}
    assert_same(way(CASPR, weight, gradients, **options, **shared), expected)


@pytest.mark.parametrize(
    ("graft", "way", "maximize", "weight_decay"),
    [tuple(row.values()) for row in pairs({"graft": ["sgd", "none"], **WAYS})],
)
def test_sgd_graft_alone_is_sgd(graft, way, maximize, weight_decay):
    weight, gradients = problem(3, 4, seed=5)
    shared = {"lr": RATES, "weight_decay": weight_decay, "maximize": maximize}
    expected = decayed(torch.optim.SGD, weight, gradients, **shared)
    assert_same(way(CASPR, weight, gradients, graft=graft, betas=(0.0, 0.95), **shared), expected)


@pytest.mark.parametrize(
    ("graft", "way"), [("sgd", grouped), ("none", before_the_start), ("rmsprop", before_the_start)]
)
def test_momentum_of_the_other_grafts_is_a_corrected_average(graft, way):
    weight, gradients = problem(3, 4, seed=6)
    options = {"lr": 0.1, "betas": (0.8, 0.95), "graft": graft, "graft_eps": 1e-3, "weight_decay": 0.2}
    expected = reference_weights(weight, gradients, use_preconditioner=False, **options)
    assert_same(way(CASPR, weight, gradients, **options), expected)
    if graft != "rmsprop":  # the first step by hand: M^ is the gradient itself
        assert relative_error(expected[0], weight - 0.02 * weight - 0.1 * gradients[0]) < 1e-12
