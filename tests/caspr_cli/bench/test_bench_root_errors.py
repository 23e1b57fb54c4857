from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from references.drive import relative_error
from references.inverse_root import inverse_root

from caspr_cli.bench.root_errors import (
    CONDITIONS,
    DAMPINGS,
    FRESH,
    NewtonSteps,
    RootError,
    before,
    format_table,
    logarithmic,
    main_table,
    root_error_table,
    spectral,
)
from caspr_cli.optim.roots import newton_root, newton_steps

D = 48
NAMES = ["eigh32", "eigh64", "newton32", "warm32"]


@pytest.fixture(scope="module")
def rows() -> list[RootError]:
    return root_error_table(D, (1e2, 1e4, 1e6), (1e-4, 1e-6), repeats=1)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_every_solver_at_every_condition_and_damping(rows: list[RootError]) -> None:
    cells = [(condition, eps) for condition in (1e2, 1e4, 1e6) for eps in (1e-4, 1e-6)]
    assert [(row.condition, row.eps, row.solver) for row in rows] == [(*cell, name) for cell in cells for name in NAMES]
    for row in rows:
        assert row.milliseconds > 0
        assert (row.iterations is not None) == (row.solver == "newton32")
        assert 0 < row.error < 0.1


def test_in_float64_nothing_but_the_storage_is_lost(rows: list[RootError]) -> None:
    for row in rows:
        if row.solver == "eigh64":
            assert row.own_error < 1e-14
            assert row.residual < 1e-9
            # Entries are rounded to 6e-8 of themselves: of the smallest eigenvalue that is a rounding * condition.
            assert row.error < 1e-7 / (1 / row.condition + row.eps)
        else:
            assert row.error == pytest.approx(row.own_error, rel=0.2)


def test_the_error_is_that_of_the_exact_matrix() -> None:
    """By the reference: the root of float64 statistics, and eigh64 as numpy finds it for their rounding."""
    (row,) = (row for row in root_error_table(D, [1e4], [1e-6], repeats=1) if row.solver == "eigh64")
    values, Q = logarithmic(D, 1e4, torch.Generator().manual_seed(0))
    S = spectral(values, Q)
    stored = inverse_root(S.float(), 1e-6 * float(torch.linalg.eigvalsh(S.float().double())[-1]), 4)
    assert row.error == pytest.approx(relative_error(stored, inverse_root(S, 1e-6, 4)), rel=1e-4)


def test_the_error_grows_with_the_condition(rows: list[RootError]) -> None:
    for name in NAMES[:3]:
        errors = [row.error for row in rows if row.solver == name and row.eps == 1e-6]
        assert 10 * errors[0] < errors[1] < errors[2] / 10


def test_steps_are_those_of_the_smallest_eigenvalue(rows: list[RootError]) -> None:
    for row in rows:
        if row.iterations is not None:
            condition = (1 + row.eps) / (1 / row.condition + row.eps)
            assert abs(row.iterations - newton_steps(condition, 4)) <= 2


def test_steps_are_counted_and_nothing_else() -> None:
    S = torch.eye(4, dtype=torch.float64)[None]
    with NewtonSteps() as steps:
        torch.linalg.eigh(S @ S)
    assert steps.count == 0
    with NewtonSteps() as steps:
        newton_root(S, lambda largest: 0.1 * largest, 4, condition=1e6)
    assert 0 < steps.count <= newton_steps(1e6, 4)


def test_the_statistics_of_before_lack_one_sample() -> None:
    values, Q = logarithmic(D, 1e6, generator())
    assert float(values[0] / values[-1]) == pytest.approx(1e6)
    S, S_old = spectral(values, Q), before(values, Q, generator())
    assert torch.equal(S_old, S_old.mT)
    sample = (S - (1 - FRESH) * S_old) / FRESH
    assert float(torch.linalg.eigvalsh(sample)[0]) > -1e-12
    white = (Q / values.sqrt()).mT @ sample @ (Q / values.sqrt())  # of covariance I, d columns
    assert float(white.trace()) / D == pytest.approx(1, abs=0.2)
    assert float(torch.linalg.eigvalsh(white)[-1]) < 6


def made(condition: float, eps: float, **errors: float) -> list[RootError]:
    return [
        RootError(condition, eps, name, error, error, 2 * error, 7 if name == "newton32" else None, 1.5)
        for name, error in errors.items()
    ]


SMALL = made(1e2, 1e-6, eigh32=2e-6, eigh64=1e-6, newton32=4e-6, warm32=3e-5)
ILL = made(1e6, 1e-6, eigh32=1e-2, eigh64=1e-3, newton32=2e-3, warm32=5e-3)
LOST = made(1e12, 1e-12, eigh32=1.2, eigh64=0.9, newton32=0.8, warm32=3.0)


def test_a_line_for_each_condition_and_damping() -> None:
    lines = format_table([*SMALL, *ILL, *LOST])
    names, *body = lines[1:5]
    assert names.split() == ["condition", "eps", *NAMES, "eigh32", "newton32", "warm32", "newton32"]
    assert " ".join(body[0].split()) == "1e+02 1e-06 2.0e-06 1.0e-06 4.0e-06 3.0e-05 4.0e-06 8.0e-06 6.0e-05 7"
    assert {len(line) for line in [names, *body]} == {len(names)}
    assert lines[0].index("residual") > lines[0].index("error")
    assert max(map(len, lines)) <= 120


def test_what_is_said_is_what_the_rows_say() -> None:
    text = " ".join(format_table([*SMALL, *ILL, *LOST]))
    assert "eigh32 1.5, eigh64 1.5, newton32 1.5, warm32 1.5" in text
    assert "In 2 of 3 lines" in text
    assert "an error of 1e-06 to 1e-03" in text
    assert "eigh32 6 (2 to 10), newton32 3 (2 to 4), warm32 18 (5 to 30)" in text
    assert "in the 1 of these lines with a condition of 1e+06 or more" in text
    assert "its error is the smaller one in 1 (0.5 to 0.5 of the other)" in text
    worse = [replace(row, residual=100.0) if row.solver == "warm32" else row for row in ILL]
    assert "its residual is the smaller one in 0 (5e+03 to 5e+03 of the other)" in " ".join(format_table(worse))


def test_nothing_is_claimed_where_nothing_is_known() -> None:
    text = " ".join(format_table(LOST))
    assert "A root took" in text
    assert "units" not in text
    assert "warm start against" not in text
    assert "warm start against" not in " ".join(format_table(SMALL))


def test_the_table_of_the_command() -> None:
    before = torch.get_num_threads()
    records, lines = main_table(16, threads=2)
    assert torch.get_num_threads() == before
    assert len(records) == len(CONDITIONS) * len(DAMPINGS) * len(NAMES)
    assert {(record["d"], record["threads"]) for record in records} == {(16, 2)}
    assert all(math.isfinite(record["error"]) for record in records)
    assert json.loads(json.dumps(records)) == records
    assert lines[0].startswith("Roots S~^(-1/4) of 16 x 16 matrices, 2 threads, torch ")
    assert sum(line.lstrip().startswith("1e+") for line in lines) == len(CONDITIONS) * len(DAMPINGS)
