"""The regret bound on online least squares, run with the library's own optimizer.

f_t(W) = ||W x_t - y_t||^2 / 2 over a few samples a step: convex, gradients [m, n] of rank at most r.
Regret_T = sum_t f_t(W_t) - min_W sum_t f_t(W) <= (D^2 / (2 lr) + lr r) tr(X_T), D = max_t ||W_t - W*||_F.
"""

import math

import pytest
import torch
from references.kronecker import damped, preconditioner
from references.stream import random_stream, statistics

from caspr_cli.optim import CASPR, Shampoo

EPS = 1e-3


def online_least_squares(seed, rows=3, columns=4, samples=1, steps=40):
    """Inputs x [steps, columns, samples] of unequal directions, targets y [steps, rows, samples], the best W."""
    scale = torch.logspace(0, -1, columns, dtype=torch.float64)[:, None]
    x = scale * torch.stack(random_stream(columns, samples, steps=steps, seed=seed))
    truth = random_stream(rows, columns, steps=1, seed=seed + 1)[0]
    y = truth @ x + 0.3 * torch.stack(random_stream(rows, samples, steps=steps, seed=seed + 2))
    flat_x, flat_y = (part.movedim(0, 1).flatten(1) for part in (x, y))  # [columns, steps * samples]
    best = torch.linalg.lstsq(flat_x.mT, flat_y.mT).solution.mT
    return x, y, best


def play(optimizer_class, x, y, best, lr, **options):
    """Regret against ``best``, the largest distance from it, and the gradients."""
    weight = torch.nn.Parameter(torch.zeros_like(best))
    optimizer = optimizer_class(
        [weight],
        lr=lr,
        betas=(0.0, 0.999),
        eps=EPS,
        statistics="accumulate",
        damping="absolute",
        interval=1,
        start_step=1,
        graft="none",
        **options,
    )
    regret, distance, gradients = 0.0, 0.0, []
    for x_t, y_t in zip(x, y, strict=True):
        optimizer.zero_grad()
        loss = ((weight @ x_t - y_t) ** 2).sum() / 2
        loss.backward()
        regret += loss.item() - ((best @ x_t - y_t) ** 2).sum().item() / 2
        distance = max(distance, torch.linalg.matrix_norm(weight.detach() - best).item())
        gradients.append(weight.grad.clone())
        optimizer.step()
    return regret, distance, gradients


def trace_of_preconditioner(gradients, order):
    sides = [damped(side, EPS, "absolute") for side in statistics(gradients, "accumulate", 0.0)]
    return torch.trace(preconditioner(sides, order)).item()


PLAYERS = [(CASPR, {"order": 1}, 1), (CASPR, {}, 2), (CASPR, {"order": 3}, 3), (Shampoo, {}, math.inf)]


@pytest.mark.parametrize(("optimizer", "options", "order"), PLAYERS)
@pytest.mark.parametrize(("lr", "samples"), [(0.03, 1), (1.0, 2)])
def test_regret_bound_at_any_learning_rate(lr, samples, optimizer, options, order):
    x, y, best = online_least_squares(seed=1, samples=samples)
    regret, distance, gradients = play(optimizer, x, y, best, lr, **options)
    rank = max(torch.linalg.matrix_rank(g).item() for g in gradients)
    assert rank == samples
    bound = (distance**2 / (2 * lr) + lr * rank) * trace_of_preconditioner(gradients, order)
    assert 0 < regret <= bound
