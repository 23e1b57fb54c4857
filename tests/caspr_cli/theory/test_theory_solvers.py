"""What solvers make of matrices with known roots."""

import pytest
import torch
from references.inverse_root import spectrum, with_spectrum
from references.stream import random_stream

from caspr_cli.optim.roots import newton_root, newton_steps
from caspr_cli.optim.solve import newton_products
from caspr_cli.theory import solvers
from caspr_cli.theory.precision import BFLOAT16, FLOAT32, RoundedProducts, rounded, roundoff
from caspr_cli.theory.solvers import MATRICES_HELD, OURS, Matrix, NewtonWatch, least_seconds, peak_bytes

# ---- precision


@pytest.mark.parametrize(("bits", "dtype"), [(FLOAT32, torch.float32), (BFLOAT16, torch.bfloat16)])
def test_rounding_to_bits_is_that_of_the_type(bits, dtype):
    x = random_stream(1000, steps=1, seed=1)[0] * torch.logspace(-20, 20, 1000, dtype=torch.float64)
    assert torch.equal(rounded(x, bits), x.to(dtype).double())
    assert roundoff(bits) == torch.finfo(dtype).eps / 2


def test_rounded_products_round_operands_and_nothing_else():
    X = random_stream(1, 5, 5, steps=1, seed=3)[0].float()
    low = rounded(X, 11)
    square = torch.bmm(low, low)
    cube = torch.bmm(low, rounded(square, 11))
    elementwise = X * X
    with RoundedProducts(11):
        assert torch.equal(torch.bmm(X, X), square)
        assert torch.equal(X @ X, square)
        assert torch.equal(torch.linalg.matrix_power(X, 2), square)
        assert torch.equal(torch.linalg.matrix_power(X, 3), cube)
        assert torch.equal(X * X, elementwise)
    assert not torch.equal(torch.bmm(X, X), square)


# ---- solvers


def test_newton_is_watched_and_not_changed():
    S = with_spectrum(spectrum("logarithmic", 16, 1e2), seed=7).unsqueeze(0)
    plain = newton_root(S, lambda largest: 0 * largest, 4)
    with NewtonWatch() as watch:
        watched = newton_root(S, lambda largest: 0 * largest, 4)
    assert torch.equal(plain.A, watched.A)
    assert 1 < watch.steps <= newton_steps(1e2, 4)
    assert watch.least < 1e-14
    with NewtonWatch() as watch:
        torch.linalg.eigh(S @ S)
    assert watch.steps == 0


def test_products_of_a_step_of_newton():
    assert [newton_products(p) for p in (2, 4, 6)] == [3, 4, 5]


@pytest.mark.parametrize("solver", OURS, ids=lambda s: s.name)
def test_memory_is_as_many_matrices_as_are_counted(solver):
    d = 128
    matrix = Matrix.drawn(d, 1e2, seed=2)
    seen = solver.matrix(matrix.S)
    held = peak_bytes(lambda: solver.run(seen, 1e-6, 4))
    assert held / (4 * d * d) == pytest.approx(MATRICES_HELD[solver.method], rel=0.1)


def test_the_least_time_is_that_of_the_shortest_run(monkeypatch):
    monkeypatch.setattr(solvers, "TIMED", 0.05)
    times = iter([0.0, 3.0, 3.0, 4.0, 4.0, 6.0])
    assert least_seconds(lambda: None, lambda: next(times)) == 3.0  # nothing slow is timed again
    times = iter([0.0, 0.02, 0.02, 0.03, 0.03, 0.06])
    assert least_seconds(lambda: None, lambda: next(times)) == pytest.approx(0.01)
