"""Weights between closed forms and a second moment that is measured in the eigenbasis."""

import itertools
import math
from typing import Any

import pytest
import torch
from references.drive import relative_error, run, run_with_turns
from references.optimizer import reference_weights
from references.stream import random_stream
from torch import Tensor, nn

from caspr_cli.optim import CASPR, Shampoo, roots

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


@pytest.mark.parametrize("options", OPTIONS, ids=itertools.count())
def test_a_qr_step_against_the_dense_matrices(options: dict[str, Any]) -> None:
    """With exact bases it is a row of test_against_reference."""
    measured = 0.6 if OPTIONS.index(options) % 2 else 1.0
    options = {"solver": "newton", "measured": measured, "betas": (0.9, 0.95), "eps": 1e-3, "interval": 3} | options
    for shape in SHAPES:
        weight, *gradients = random_stream(*shape, steps=11, seed=3)
        gradients[6] = None  # type: ignore[call-overload]
        weights, turns = run_with_turns(CASPR, weight, gradients, lr=0.1, start_step=3, **options)
        expected = reference_weights(weight, gradients, lr=0.1, start_step=3, turns=turns, **options)
        for step, (w, w_expected) in enumerate(zip(weights, expected, strict=True), start=1):
            assert relative_error(w, w_expected) < 1e-9, f"{shape}, step {step}"


@pytest.mark.parametrize("exponent", [0.5, 1])
@pytest.mark.parametrize("order", [1, 2, 3, math.inf])
def test_nothing_measured_is_the_closed_form(order: float, exponent: float) -> None:
    """CASPR and Shampoo are contained: with a graft, which has the length."""
    weight, *gradients = random_stream(4, 6, steps=8, seed=5)
    options: dict[str, Any] = {"order": order, "exponent": exponent, "betas": (0.9, 0.95), "interval": 2}
    found, expected = (
        run(CASPR, weight, gradients, lr=0.1, start_step=2, measured=x, **options)[-1] for x in (1e-13, 0.0)
    )
    assert relative_error(found - weight, expected - weight) < 1e-9


def test_all_measured_is_soap() -> None:
    """That of pytorch-optimizer, which skips the first step and begins with zeros: forgotten after 40 steps."""
    from pytorch_optimizer import SOAP

    p, q = (nn.Parameter(torch.zeros(5, 5).double()) for _ in range(2))
    never: dict[str, Any] = {"lr": 0.1, "betas": (0.5, 0.5), "weight_decay": 0.0}
    ours = Shampoo([p], measured=1, graft="none", damping="absolute", eps=1e-16, start_step=1, interval=999, **never)
    theirs = SOAP([q], precondition_frequency=999, **never)
    moved = []
    for gradient in random_stream(5, 5, steps=45, seed=6):
        before = p.detach().clone(), q.detach().clone()
        p.grad, q.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
        moved.append(((p - before[0]).detach(), (q - before[1]).detach()))
    assert relative_error(*moved[5]) > 1e-3
    assert relative_error(*moved[-1]) < 1e-6


def test_u_does_not_depend_on_the_basis_of_a_null_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which rounding chooses, and with it the number of ranks."""
    gradients = random_stream(3, 12, steps=5, seed=7)
    options: dict[str, Any] = {"measured": 1.0, "lr": 1.0, "start_step": 1, "interval": 3, "betas": (0.9, 0.95)}
    expected = run(CASPR, torch.zeros(3, 12).double(), gradients, **options)[-1]
    decompose = roots.eigendecomposition

    def turned(S: Tensor) -> tuple[Tensor, Tensor]:
        values, Q = decompose(S)
        for own, vectors in zip(values, Q, strict=True):
            null = own < 1e-9 * own.max()
            turn, _ = torch.linalg.qr(random_stream(int(null.sum()), int(null.sum()), steps=1, seed=8)[0])
            vectors[:, null] = vectors[:, null] @ turn
        return values, Q

    monkeypatch.setattr(roots, "eigendecomposition", turned)
    found = run(CASPR, torch.zeros(3, 12).double(), gradients, **options)[-1]
    assert relative_error(found, expected) < 1e-9


def test_bases_without_a_diagonal() -> None:
    """Those of diagonal statistics: they are permutations, and not what is there before the first."""
    gradients = [torch.diag(torch.tensor([2.0, 1.0 + 0.3 * (-1) ** t]).double()) for t in range(6)]
    options: dict[str, Any] = {"measured": 1.0, "start_step": 1, "interval": 1, "betas": (0.0, 0.5), "graft": "none"}
    found = run(CASPR, torch.zeros(2, 2).double(), gradients, lr=1.0, eps=1e-3, **options)
    expected = reference_weights(torch.zeros(2, 2), gradients, lr=1.0, eps=1e-3, **options)
    assert relative_error(found[-1], expected[-1]) < 1e-9


def test_a_block_that_sleeps_at_first_stays_finite() -> None:
    p = nn.Parameter(torch.ones(4, 3))
    optimizer = CASPR([p], measured=0.5, start_step=1, interval=2)
    for gradient in [*3 * [torch.zeros(4, 3)], *random_stream(4, 3, steps=4, seed=1)]:
        before = p.detach().clone()
        p.grad = gradient.float()
        optimizer.step()
        assert p.isfinite().all()
        assert p.equal(before) == (not gradient.any())


def test_a_state_of_roots_goes_on_in_eigenbases_and_back() -> None:
    """What the new option does not have begins anew; what it does not know is gone."""
    p = nn.Parameter(torch.zeros(4, 3).double())
    optimizer = CASPR([p], start_step=1, interval=2)
    group = optimizer.param_groups[0]
    for measured, gradient in zip([0, 0, 1, 1, 0], random_stream(4, 3, steps=5, seed=9), strict=True):
        group["measured"], p.grad = measured, gradient
        optimizer.step()
        assert ("moment.0" in optimizer.state[p]) == (measured > 0)
        assert p.isfinite().all()
    assert optimizer.state[p]["rejected.0"].eq(0).all()
