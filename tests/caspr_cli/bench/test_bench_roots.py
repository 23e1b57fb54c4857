"""What solvers make of matrices with known roots, and the tables of ``caspr-bench --roots``."""

from __future__ import annotations

import json
import math

import pytest
import torch
from pandas import DataFrame, concat
from references.drive import relative_error
from references.inverse_root import inverse_root, spectrum, with_spectrum
from references.stream import random_stream

from caspr_cli.bench import roots
from caspr_cli.bench.precision import BFLOAT16, FLOAT32, RoundedProducts, rounded
from caspr_cli.bench.roots import (
    CONDITIONS,
    DAMPINGS,
    MATRICES_HELD,
    OURS,
    TABLE_SOLVERS,
    Matrix,
    NewtonWatch,
    least_seconds,
    main_table,
    peak_bytes,
    root_errors,
    roots_table,
    solvers_table,
)
from caspr_cli.optim.roots import newton_root, newton_steps
from caspr_cli.optim.solve import newton_products

D = 48
NAMES = list(TABLE_SOLVERS)


# ---- precision


@pytest.mark.parametrize(("precision", "dtype"), [(FLOAT32, torch.float32), (BFLOAT16, torch.bfloat16)])
def test_rounding_to_bits_is_that_of_the_type(precision, dtype):
    x = random_stream(1000, steps=1, seed=1)[0] * torch.logspace(-20, 20, 1000, dtype=torch.float64)
    assert torch.equal(rounded(x, precision.bits), x.to(dtype).double())
    assert precision.unit == torch.finfo(dtype).eps / 2


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
    monkeypatch.setattr(roots, "TIMED", 0.05)
    times = iter([0.0, 3.0, 3.0, 4.0, 4.0, 6.0])
    assert least_seconds(lambda: None, lambda: next(times)) == 3.0  # nothing slow is timed again
    times = iter([0.0, 0.02, 0.02, 0.03, 0.03, 0.06])
    assert least_seconds(lambda: None, lambda: next(times)) == pytest.approx(0.01)


# ---- the tables


@pytest.fixture(autouse=True, scope="module")
def once():
    """Nothing is timed for long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roots, "TIMED", 0.0)
        yield


@pytest.fixture(scope="module")
def rows(once):
    return root_errors(D, (1e2, 1e4, 1e6), (1e-4, 1e-6))


def test_every_solver_at_every_condition_and_damping(rows):
    cells = [(condition, eps, name) for condition in (1e2, 1e4, 1e6) for eps in (1e-4, 1e-6) for name in NAMES]
    assert list(rows[["condition", "eps", "solver"]].itertuples(index=False, name=None)) == cells
    assert (rows["milliseconds"] > 0).all()
    assert rows["iterations"].notna().eq(rows["solver"] == "newton32").all()
    assert rows["error"].between(0, 0.1, inclusive="neither").all()
    newton = rows[rows["solver"] == "newton32"]
    for condition, eps, steps in newton[["condition", "eps", "iterations"]].itertuples(index=False):
        assert abs(steps - newton_steps((1 + eps) / (1 / condition + eps), 4)) <= 2


def test_in_float64_nothing_but_the_storage_is_lost(rows):
    exact, other = (rows[rows["solver"].eq("eigh64") == is_exact] for is_exact in (True, False))
    assert (exact["own_error"] < 1e-14).all()
    assert (exact["residual"] < 1e-9).all()
    # Entries are rounded to 6e-8 of themselves: of the smallest eigenvalue that is a rounding * condition.
    assert (exact["error"] < 1e-7 / (1 / exact["condition"] + exact["eps"])).all()
    assert other["error"].tolist() == pytest.approx(other["own_error"].tolist(), rel=0.2)
    for name in NAMES:  # they grow with the condition
        errors = rows.loc[(rows["solver"] == name) & (rows["eps"] == 1e-6), "error"].tolist()
        assert 10 * errors[0] < errors[1] < errors[2] / 10


def test_the_error_is_that_of_the_exact_matrix():
    """By the reference: the root of float64 statistics, and eigh64 as numpy finds it for their rounding."""
    found = root_errors(D, [1e4], [1e-6]).set_index("solver").loc["eigh64"]
    S = Matrix.drawn(D, 1e4, 0).S[0]
    stored = inverse_root(S.float(), 1e-6 * float(torch.linalg.eigvalsh(S.float().double())[-1]), 4)
    assert found["error"] == pytest.approx(relative_error(stored, inverse_root(S, 1e-6, 4)), rel=1e-4)


def made(condition, eps, **errors):
    return DataFrame(
        {"condition": condition, "eps": eps, "solver": name, "error": error, "residual": 2 * error,
         "iterations": 7 if name == "newton32" else None, "milliseconds": 1.5}
        for name, error in errors.items()
    )  # fmt: skip


SMALL = made(1e2, 1e-6, eigh32=2e-6, eigh64=1e-6, newton32=4e-6)
ILL = made(1e6, 1e-6, eigh32=1e-2, eigh64=1e-3, newton32=2e-3)
LOST = made(1e12, 1e-12, eigh32=1.2, eigh64=0.9, newton32=0.8)


def test_a_line_for_each_condition_and_damping():
    over, names, *body = roots_table(concat([SMALL, ILL, LOST]))
    assert names == ["condition", "eps", *NAMES, "eigh32", "newton32", "newton32"]
    assert [(k, text) for k, text in enumerate(over) if text] == [(2, "error"), (5, "residual"), (7, "steps")]
    assert " ".join(body[0]) == "1e+02 1e-06 2.0e-06 1.0e-06 4.0e-06 4.0e-06 8.0e-06 7"
    assert {len(line) for line in [over, names, *body]} == {len(names)}


def test_a_line_for_each_solver():
    _, eigh32, eigh64, newton32 = solvers_table(concat([SMALL, ILL, LOST]))
    assert eigh32[:6] == ["eigh32", "1.5", "6", "2", "10", "2"]
    assert eigh64[:6] == ["eigh64", "1.5", "1", "1", "1", "2"]
    assert newton32 == ["newton32", "1.5", "3", "2", "4", "2", "0.2", "0.2", "1", "0.2", "0.2", "1", "1"]
    worse = ILL.assign(residual=ILL["residual"].mask(ILL["solver"] == "newton32", 100.0))
    assert solvers_table(worse)[-1][9:] == ["5e+03", "5e+03", "0", "1"]
    assert solvers_table(LOST)[-1][2:] == ["-", "-", "-", "0", "-", "-", "0", "-", "-", "0", "0"]


def test_the_table_of_the_command():
    before = torch.get_num_threads()
    records, title, tables = main_table(4, 2)
    assert torch.get_num_threads() == before
    assert len(records) == len(CONDITIONS) * len(DAMPINGS) * len(NAMES)
    assert list(records[0]) == ["condition", "eps", "solver", "error", "own_error", "residual", "iterations",
                                "milliseconds", "d", "threads"]  # fmt: skip
    assert {(record["d"], record["threads"]) for record in records} == {(4, 2)}
    assert all(math.isfinite(record["error"]) for record in records)
    assert {type(record["iterations"]) for record in records} == {int, type(None)}
    assert json.loads(json.dumps(records)) == records
    assert title.startswith("Roots S~^(-1/4) of 4 x 4 matrices, 2 threads, torch ")
    assert len(tables[0]) == 2 + len(CONDITIONS) * len(DAMPINGS)
