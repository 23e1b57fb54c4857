"""Weights between closed forms and a second moment that is measured in the eigenbasis."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from references.drive import relative_error, run_with_turns
from references.optimizer import reference_weights
from references.stream import random_stream

from caspr_cli.optim import CASPR

SHAPES = [(3, 4), (2, 3, 2)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"order": 1},
    {"order": math.inf, "graft": "none"},
    {"exponent": 1, "graft": "none"},
    {"axes": "first", "graft": "rms"},
    {"merge": "none", "order": 3},
    {"block_size": 3, "exponent": 0.25},
    {"statistics": "accumulate", "damping": "absolute", "graft": "none"},
    {"polar": True, "nesterov": True, "graft": "rms"},
    {"interval": 1, "precondition": "gradient", "solver": "newton"},
]


@pytest.mark.parametrize("solver", ["eigh", "newton"])
@pytest.mark.parametrize("measured", [1.0, 0.6])
@pytest.mark.parametrize("options", OPTIONS, ids=itertools.count())
def test_against_the_dense_matrices(options: dict[str, Any], measured: float, solver: str) -> None:
    options = {"solver": solver, "measured": measured, "betas": (0.9, 0.95), "eps": 1e-3, "interval": 3} | options
    for shape in SHAPES:
        weight, *gradients = random_stream(*shape, steps=12, seed=3)
        gradients[6] = None
        weights, turns = run_with_turns(CASPR, weight, gradients, lr=0.1, start_step=3, **options)
        expected = reference_weights(weight, gradients, lr=0.1, start_step=3, turns=turns, **options)
        for step, (w, w_expected) in enumerate(zip(weights, expected, strict=True), start=1):
            assert relative_error(w, w_expected) < 1e-9, f"{shape}, step {step}"
