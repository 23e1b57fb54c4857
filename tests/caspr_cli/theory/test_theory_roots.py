"""The effect of rounding on inverse roots, predicted and measured, and counterexamples to apparent laws."""

import math

import pandas as pd
import pytest
import torch
from references.inverse_root import inverse_root, spectrum, with_spectrum
from references.kronecker import spectral_power
from references.stream import random_stream

from caspr_cli.theory import roots
from caspr_cli.theory.choices import Seeds
from caspr_cli.theory.precision import BFLOAT16, FLOAT32, FLOAT64, TF32, rounded, roundoff
from caspr_cli.theory.roots import reach, slope
from caspr_cli.theory.rounding import (
    STORED,
    cases,
    constants_of,
    divided_differences,
    moved,
    one_rounding,
    sensitivity,
    solved,
    storage,
    worst_case,
)
from caspr_cli.theory.solvers import BY_NAME, SOLVERS, Matrix

EXPONENTS = [2, 4, 6]
STORES = [solver for solver in SOLVERS if solver.exact]


def symmetric(d, seed):
    X = random_stream(d, d, steps=1, seed=seed)[0]
    return (X + X.mT) / math.sqrt(2)  # off the diagonal of variance 1, on it 2


def test_the_error_of_storing_numbers_is_as_large_as_their_mantissas_say():
    """Spread evenly in the logarithm; normal numbers are not, and are 9 % off."""
    spread = 2 ** (4 * torch.rand(300, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    for x, within in ((spread, 0.02), (random_stream(300, 300, steps=1, seed=2)[0], 0.1)):
        for bits in (TF32, BFLOAT16):
            E = rounded(x, bits) - x
            assert (E.norm() / x.norm()).item() == pytest.approx(STORED * roundoff(bits), rel=within)


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


@pytest.mark.parametrize(("p", "name"), list(zip(EXPONENTS, ("logarithmic", "half", "linear"), strict=True)))
def test_storing_a_matrix_costs_what_is_predicted(p, name):
    values = spectrum(name, 96, 1e4)
    S = with_spectrum(values, seed=5)
    expected = inverse_root(S, 0.0, p)
    seen = inverse_root(rounded(S, FLOAT32), 0.0, p)
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
        case = solved(BY_NAME["eigh, float64"], matrix, 0.0, p)
        assert 0.1 < case["roundings"] < 10
        assert case["amplified"] == one_rounding(matrix.values, FLOAT64, p)


def test_errors_are_those_of_the_damping_that_was_added():
    """Newton's largest eigenvalue is an estimate, and with it the damping; that is no error of the root."""
    matrix = Matrix.drawn(32, 1e4, seed=1)
    case = solved(BY_NAME["newton, float64"], matrix, 1e-2, 4)
    assert case["error"] < 1e-12
    assert case["accepted"]


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
    return pd.DataFrame(cases(48, (1e2, 1e4, 1e6), (0.0,), EXPONENTS, [0, 1]))


def test_false_that_errors_grow_as_the_condition_of_the_root(bare):
    for p in EXPONENTS:
        assert slope(bare, p) == pytest.approx(0.9, abs=0.1)
        assert slope(bare, p) > 1 / p + 0.3


def test_false_that_newton_s_own_residual_shows_its_error(bare):
    own = bare[(bare["solver"] == "newton, float32") & (bare["condition"] == 1e6) & (bare["p"] == 4)].iloc[0]
    assert own["coupled"] < 1e-6
    assert own["error"] > 100 * own["coupled"]
    assert own["residual"] > 100 * own["coupled"]  # the one that is recomputed does


def test_constants_leave_out_what_rounding_of_the_result_decides(bare):
    found = constants_of(bare)
    assert not any(solver.name in found.index for solver in STORES)
    own = found.loc["newton, float32"]
    assert 0 < own["least"] <= own["middle"] <= own["most"] < found.loc["eigh, float32", "most"]
    assert own["count"] == len(
        bare[(bare["solver"] == "newton, float32") & (bare["condition"] >= 1e3) & (bare["error"] <= 0.02)]
    )


def test_steps_of_newton_are_counted_with_products_of_low_precision_too(bare):
    steps = bare[bare["solver"].str.startswith("newton")].groupby("solver")["steps"].min()
    assert (steps > 1).all()
    assert bare.loc[~bare["solver"].str.startswith("newton"), "steps"].isna().all()


def test_the_reach_ends_with_the_first_error_that_is_large():
    rows = [
        {"solver": solver.name, "p": 4, "condition": condition, "error": error}
        for solver in SOLVERS
        for condition, error in ((1e1, 1e-3), (1e2, 1e-1 if solver.name == "eigh, float32" else 1e-3), (1e3, 1e-3))
    ]
    found = reach(pd.DataFrame(rows))
    assert (found["eigh, float32"], found["newton, float32"]) == (1e1, 1e3)
    assert math.isnan(reach(pd.DataFrame(rows).assign(error=1.0))["eigh, float32"])


def test_the_answer_holds_and_its_tables_are_what_was_measured(monkeypatch):
    monkeypatch.setattr("caspr_cli.theory.solvers.TIMED", 0.0)
    monkeypatch.setattr(roots, "QUICK_ROWS", 32)
    monkeypatch.setattr(roots, "DAMPINGS", (1e-10, 1e-6, 1e-2))
    monkeypatch.setattr(roots, "QUICK_SIZES", (16, 128))
    found = roots.answer(Seeds(quick=True, seed=3))
    assert all(held for _, held in found.claims)
    assert (len(found.counterexamples), len(found.figures)) == (2, 3)
    assert found.finding.startswith("With the default damping of 1e-06, ")
    assert len(found.finding.split()) <= 30
    every = found.tables["roots"]
    assert len(every) == len(SOLVERS) * (5 * 3 + 5 + 3 + len(roots.SCALES))
    checks = found.tables["checks"].set_index("what")["value"]
    assert int(checks["roots"]) == len(every) - len(SOLVERS) * len(roots.SCALES)
    damping = found.tables["damping"]
    eps = damping.loc[damping["newton, float32"] <= 0.01, "eps"].min()
    assert found.tables["limits"].set_index("solver").loc["newton, float32", "damping"] == eps
    assert damping["predicted"].is_monotonic_decreasing
    stability, default = found.tables["stability"], found.tables["precision"]
    own = every[(every["solver"] == "eigh, float32") & (every["p"] == 4)]
    assert stability["eigh, float32"].tolist() == pytest.approx(own.loc[own["eps"] == 0, "error"].tolist())
    assert (stability["predicted"] >= default["float32"]).all()  # damping makes a root less sensitive
    assert (stability["steps"] <= stability["forecast"]).all()
    eigh, newton = (own for _, own in found.tables["complexity"].groupby("solver"))
    assert eigh["eigh"].eq(1).all()
    assert eigh["cubes"].eq(25).all()
    assert (newton["cubes"] == 2 * 4 * newton["steps"]).all()  # four products a step for p = 4
