"""What rounding does to inverse roots, predicted and measured, and what only looks like a law."""

import math

import pytest
import torch
from references.inverse_root import inverse_root, spectrum, with_spectrum
from references.kronecker import spectral_power
from references.stream import random_stream

from caspr_cli.optim.roots import newton_root, newton_steps
from caspr_cli.theory import root_cases, roots
from caspr_cli.theory.root_cases import constants
from caspr_cli.theory.roots import slope
from caspr_cli.theory.roots_shown import moved
from caspr_cli.theory.rounding import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    STORED,
    TF32,
    RoundedProducts,
    divided_differences,
    one_rounding,
    rounded,
    sensitivity,
    storage,
    worst_case,
)
from caspr_cli.theory.solving import (
    OURS,
    SOLVERS,
    SQUARE,
    Coupled,
    Matrix,
    flops_of,
    newton_products,
    peak_bytes,
    solved,
)

EXPONENTS = [2, 4, 6]
STORES = [solver for solver in SOLVERS if solver.exact]


def symmetric(d, seed):
    X = random_stream(d, d, steps=1, seed=seed)[0]
    return (X + X.mT) / math.sqrt(2)  # off the diagonal of variance 1, on it 2


@pytest.mark.parametrize(("precision", "dtype"), [(FLOAT32, torch.float32), (BFLOAT16, torch.bfloat16)])
def test_rounding_to_bits_is_that_of_the_type(precision, dtype):
    x = random_stream(1000, steps=1, seed=1)[0] * torch.logspace(-20, 20, 1000, dtype=torch.float64)
    assert torch.equal(rounded(x, precision.bits), x.to(dtype).double())
    assert precision.unit == torch.finfo(dtype).eps / 2


def test_the_error_of_storing_numbers_is_as_large_as_their_mantissas_say():
    """Spread evenly in the logarithm; normal numbers are not, and are 9 % off."""
    spread = 2 ** (4 * torch.rand(300, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    for x, within in ((spread, 0.02), (random_stream(300, 300, steps=1, seed=2)[0], 0.1)):
        for precision in (TF32, BFLOAT16):
            E = rounded(x, precision.bits) - x
            assert (E.norm() / x.norm()).item() == pytest.approx(STORED * precision.unit, rel=within)


def test_rounded_products_round_operands_and_nothing_else():
    X = random_stream(1, 5, 5, steps=1, seed=3)[0].float()
    low = rounded(X, 11)
    square = torch.bmm(low, low)
    cube = torch.bmm(low, rounded(square, 11))
    with RoundedProducts(11):
        assert torch.equal(torch.bmm(X, X), square)
        assert torch.equal(X @ X, square)
        assert torch.equal(torch.linalg.matrix_power(X, 2), square)
        assert torch.equal(torch.linalg.matrix_power(X, 3), cube)
        assert torch.equal(X * X, X * X)
    assert not torch.equal(torch.bmm(X, X), square)


@pytest.mark.parametrize("p", EXPONENTS)
def test_divided_differences_are_the_derivative_of_the_root(p):
    values = spectrum("logarithmic", 6, 1e3)
    F = divided_differences(values, p)
    S, E, t = torch.diag(values), symmetric(6, seed=4), 1e-6
    change = spectral_power(S + t * E, -1 / p) - spectral_power(S - t * E, -1 / p)
    assert torch.allclose(F * E, change / (2 * t), rtol=1e-4, atol=1e-4)
    f = values.pow(-1 / p)
    plain = (f[:, None] - f) / (values[:, None] - values)
    assert torch.allclose(F[~torch.eye(6, dtype=torch.bool)], plain[~torch.eye(6, dtype=torch.bool)])


@pytest.mark.parametrize("p", EXPONENTS)
def test_sensitivity_is_the_error_that_is_expected(p):
    values, size = spectrum("logarithmic", 12, 1e3), 1e-7
    root, squares = torch.diag(values.pow(-1 / p)), []
    for seed in range(200):
        E = symmetric(12, seed)
        off = spectral_power(torch.diag(values) + size * E / E.norm(), -1 / p) - root
        squares.append((off.norm() / root.norm()).item() ** 2)
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(size * sensitivity(values, p), rel=0.08)


@pytest.mark.parametrize("name", ["logarithmic", "half", "linear"])
@pytest.mark.parametrize("p", EXPONENTS)
def test_storing_a_matrix_costs_what_is_predicted(p, name):
    values = spectrum(name, 96, 1e4)
    S = with_spectrum(values, seed=5)
    expected = inverse_root(S, 0.0, p)
    seen = inverse_root(rounded(S, FLOAT32.bits), 0.0, p)
    error = ((seen - expected).norm() / expected.norm()).item()
    assert 1 / 1.5 < error / storage(values, FLOAT32, p) < 1.5


@pytest.mark.parametrize("p", EXPONENTS)
def test_no_error_is_beyond_the_worst_case_and_one_is_near_it(p):
    values = spectrum("logarithmic", 10, 1e3)
    root = torch.diag(values.pow(-1 / p))
    for delta in (1e-6, 3e-4, 9e-4):
        E = symmetric(10, seed=6)
        E = delta * E / torch.linalg.matrix_norm(E, 2)
        least = torch.zeros(10, dtype=torch.float64)
        least[-1] = -delta  # takes from the smallest eigenvalue alone: nothing does more harm
        for change, harm in ((E, None), (torch.diag(least), 1.0)):
            off = spectral_power(torch.diag(values) + change, -1 / p) - root
            error = (torch.linalg.matrix_norm(off, 2) / torch.linalg.matrix_norm(root, 2)).item()
            bound = worst_case(delta, 1e3, p)
            assert error <= bound * (1 + 1e-6)
            if harm and delta == 1e-6:
                assert error == pytest.approx(bound, rel=1e-2)
    assert worst_case(1e-3, 1e3, p) == math.inf


def test_a_decomposition_in_float64_has_a_backward_error_of_a_few_roundings():
    matrix = Matrix.drawn(64, 1e6, seed=0)
    for p in EXPONENTS:
        case = solved(next(s for s in SOLVERS if s.name == "eigh, float64"), matrix, 1e6, 0.0, p, 0)
        assert 0.1 < case.roundings < 10
        assert case.amplified == one_rounding(matrix.values, FLOAT64, p)


def test_what_newton_does_is_watched_and_not_changed():
    S = with_spectrum(spectrum("logarithmic", 16, 1e2), seed=7).unsqueeze(0)
    plain = newton_root(S, lambda largest: 0 * largest, 4)
    with Coupled() as watch:
        watched = newton_root(S, lambda largest: 0 * largest, 4)
    assert torch.equal(plain.A, watched.A)
    assert 1 < watch.steps <= newton_steps(1e2, 4)
    assert watch.least < 1e-14


def test_errors_are_those_of_the_damping_that_was_added():
    """Newton's largest eigenvalue is an estimate, and with it the damping; that is no error of the root."""
    matrix = Matrix.drawn(32, 1e4, seed=1)
    case = solved(next(s for s in SOLVERS if s.name == "newton, float64"), matrix, 1e4, 1e-2, 4, 0)
    assert case.error < 1e-12
    assert case.accepted


@pytest.mark.parametrize(("p", "products"), [(2, 3), (4, 4), (6, 5)])
def test_products_of_newton_and_what_they_cost(p, products):
    assert newton_products(p) == products
    assert flops_of("newton", 10, p, steps=3) == 2 * 10**3 * 3 * products
    assert flops_of("eigh", 10, p, 0) == 25e3


@pytest.mark.parametrize("solver", OURS, ids=lambda s: s.name)
def test_memory_is_as_many_matrices_as_are_counted(solver):
    d = 128
    matrix = Matrix.drawn(d, 1e2, seed=2)
    seen = solver.matrix(matrix.S)
    held = peak_bytes(lambda: solver.run(seen, matrix.basis, lambda largest: 1e-6 * largest, 4))
    assert held / (4 * d * d) == pytest.approx(SQUARE[solver.method], rel=0.1)


def test_what_damping_moves():
    values = spectrum("logarithmic", 8, 1e4)
    found = moved(values, 1e-2)
    G = torch.diag(values.sqrt())  # of covariance S
    a, b = (torch.diag((values + shift).rsqrt()) @ G for shift in (0.0, 1e-2))
    assert found["cosine"] == pytest.approx(((a * b).sum() / (a.norm() * b.norm())).item())
    assert found["damped"] == 0.5
    assert moved(values, 0.0) == {"damped": 0.0, "cosine": pytest.approx(1), "bias": 0.0}


# What does not hold.


@pytest.fixture(scope="module")
def bare():
    """Cases without damping, small."""
    return list(root_cases._cases(48, (1e2, 1e4, 1e6), (0.0,), EXPONENTS, [0, 1]))


def test_false_that_errors_grow_as_the_condition_of_the_root(bare):
    for p in EXPONENTS:
        assert slope(bare, p) == pytest.approx(0.9, abs=0.1)
        assert slope(bare, p) > 1 / p + 0.3


def test_false_that_newton_s_own_residual_tells_its_error(bare):
    case = next(c for c in bare if c.solver.name == "newton, float32" and c.condition == 1e6 and c.p == 4)
    assert case.coupled < 1e-6
    assert case.error > 100 * case.coupled
    assert case.residual > 100 * case.coupled  # the one that is recomputed does


def test_false_that_low_precision_is_only_less_exact():
    """At a condition of 1e4 bfloat16 statistics have negative eigenvalues, and no root that is near."""
    S = with_spectrum(spectrum("logarithmic", 96, 1e4), seed=8)
    assert torch.linalg.eigvalsh(rounded(S, BFLOAT16.bits))[0] < 0
    assert torch.linalg.eigvalsh(rounded(S, FLOAT32.bits))[0] > 0


def test_constants_leave_out_what_rounding_of_the_result_decides(bare):
    found = {c.solver.name: c for c in constants(bare)}
    assert not any(solver.name in found for solver in STORES)
    assert 0 < found["newton, float32"].least <= found["newton, float32"].middle <= found["newton, float32"].most
    assert found["newton, float32"].most < found["eigh, float32"].most


def test_the_answer_holds():
    found = roots.answer(quick=True, seed=3)
    assert all(held for _, held in found.holds)
    assert len(found.fails) == 2
    assert [sheet.name for sheet in found.sheets][:2] == ["stability", "exponents"]
    assert "emulated" in " ".join(found.words)
