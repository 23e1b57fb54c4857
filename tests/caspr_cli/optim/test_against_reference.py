"""Whole runs against the slow optimizer that recomputes everything from the history of gradients."""

import inspect
import itertools

import pytest
import torch
from pairs import pairs
from references.drive import relative_error, run, run_with_turns
from references.optimizer import reference_weights
from references.stream import random_stream

from caspr_cli.optim import CASPR, FullAdagrad, Shampoo

GRID = {
    "method": ["caspr", "shampoo", "full"],
    "shape": [(3, 4), (4, 2), (5, 5), (1, 3), (3, 2, 2, 2), (2, 3, 2), (5,), ()],
    "order": [1, 2, 3],
    "exponent": [0.5, 1.0, 0.25, 0.0],
    "measured": [0.0, 1.0, 0.6],
    "statistics": ["ema", "accumulate"],
    "damping": ["relative", "absolute"],
    "eps": [1e-2, 1e-4],
    "interval": [1, 2, 3],
    "start_step": [1, 2, 4],
    "block_size": [2, 1024],
    "merge": ["matrix", "square", "none"],
    "axes": ["all", "first", "last", "row"],
    "precondition_1d": [False, True],
    "graft": ["adam", "rms", "rmsprop", "sgd", "none"],
    "polar": [False, True],
    "polar_steps": [5, 3],
    "graft_eps": [1e-8, 1e-2],
    "precondition": ["momentum", "gradient"],
    "nesterov": [False, True],
    "betas": [(0.9, 0.99), (0.0, 0.9), (0.5, 0.5)],
    "weight_decay": [0.0, 0.1],
    "maximize": [False, True],
}
MATRICES = {"method": ["caspr", "shampoo"], "shape": [(3, 4), (2, 3, 2)]}  # what options other than these are about
ROWS = [*pairs(GRID), *pairs(GRID | MATRICES, 1), *pairs(GRID | MATRICES | {"method": ["caspr"], "axes": ["all"]}, 2)]


def library(method, options):
    """The class, and the options it knows: FullAdagrad has no order, exponent, merge or axes, Shampoo no order."""
    cls = {"caspr": CASPR, "shampoo": Shampoo, "full": FullAdagrad}[method]
    return cls, {name: value for name, value in options.items() if name in inspect.signature(cls).parameters}


@pytest.mark.parametrize("options", ROWS, ids=itertools.count())
def test_a_run_of_eight_steps(options):
    method, shape = options["method"], options["shape"]
    rest = {name: value for name, value in options.items() if name not in ("method", "shape")}
    weight, *gradients = random_stream(*shape, steps=9, seed=1)
    gradients[5] = None  # one step without a gradient
    rates = [0.1, 0.1, 0.2, 0.05, 0.1, 0.1, 0.3, 0.1]
    optimizer, known = library(method, rest)
    weights, turns = run_with_turns(optimizer, weight, gradients, lr=rates, **known)
    expected = reference_weights(weight, gradients, method, lr=rates, turns=turns, **known)
    for step, (w, w_expected) in enumerate(zip(weights, expected, strict=True), start=1):
        assert relative_error(w, w_expected) < 1e-9, f"step {step}"


@pytest.mark.parametrize("optimizer", [CASPR, Shampoo])
def test_the_defaults_are_those_of_the_reference(optimizer):
    """12 steps cross the default start_step of 10, so the last two use its roots."""
    weight, *gradients = random_stream(3, 4, steps=13, seed=2)
    method = "caspr" if optimizer is CASPR else "shampoo"
    weights = run(optimizer, weight, gradients, lr=1e-3)
    for w, expected in zip(weights, reference_weights(weight, gradients, method), strict=True):
        assert relative_error(w, expected) < 1e-9
    defaults = optimizer([torch.nn.Parameter(weight)]).defaults
    for name, value in {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}.items():
        assert defaults[name] == value


WAKING = [{}, {"block_size": 3}, {"axes": "last"}, {"exponent": 1.0}, {"statistics": "accumulate"}, {"merge": "none"},
          {"order": 1}, {"block_size": 3, "precondition": "gradient"}, {"method": "shampoo"}]  # fmt: skip


@pytest.mark.parametrize("silent", ["row and column", "block", "all"])
@pytest.mark.parametrize("options", WAKING)
def test_a_row_or_a_column_that_wakes_up(options, silent):
    """Between two turns: the blocks that hold it have new roots at once. So has a block that was silent as a whole."""
    method = options.get("method", "caspr")
    options = {name: value for name, value in options.items() if name != "method"}
    gradients = random_stream(6, 5, steps=12, seed=6)
    for gradient in gradients[:8]:
        if silent == "row and column":
            gradient[0], gradient[:, 3] = 0, 0
        else:
            gradient[: 3 if silent == "block" else 6] = 0
    optimizer, known = library(method, {"interval": 6, "start_step": 3} | options)
    weights, turns = run_with_turns(optimizer, torch.zeros(6, 5).double(), gradients, lr=1.0, **known)
    expected = reference_weights(torch.zeros(6, 5), gradients, method, lr=1.0, turns=turns, **known)
    for w, w_expected in zip(weights, expected, strict=True):
        assert relative_error(w, w_expected) < 1e-9
