"""The two solvers of inverse roots against a decomposition in float64, and what is said of how far they are off.

A decomposition is wrong by roundings of the largest eigenvalue, so by rounding * condition in the smallest, of which
the root mostly is. Tolerances are that with the constants below; the reference has the same error.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from pairs import pairs
from references.drive import relative_error
from references.inverse_root import SPECTRA, dense_residual, inverse_root, moved, shift_of, spectrum, with_spectrum
from torch import Tensor

from caspr_cli.optim.roots import (
    PROBES,
    Root,
    bound,
    damping_shift,
    eigh_root,
    largest_eigenvalue,
    newton_root,
    probe_vectors,
    residual,
)
from caspr_cli.optim.solve import Problem, solve, solve_all

CONDITIONS = [1, 1e2, 1e4, 1e6, 1e8, 1e10, 1e12]
POWERS = [2, 4, 6]
GRID = pairs({"d": [1, 2, 17, 130], "condition": [1, 1e4, 1e8, 1e12], "damping": ["relative", "absolute"]})

Solver = Callable[[Tensor, Callable[[Tensor], Tensor], int], Root]


def matrix(d: int, condition: float, name: str = "logarithmic", seed: int = 0) -> Tensor:
    return with_spectrum(spectrum(name, d, condition), seed)


def rule(eps: float, damping: str = "relative") -> Callable[[Tensor], Tensor]:
    return lambda largest: eps * (largest if damping == "relative" else torch.ones_like(largest))


def rounding(condition: float, d: int, dtype: torch.dtype = torch.float64) -> float:
    """The relative error (in the Frobenius norm) that is allowed a decomposition's root."""
    return torch.finfo(dtype).eps * (2 * condition + 4 * math.sqrt(d) + 10)


def problem(S: Tensor, eps: float = 1e-6, p: int = 4, damping: str = "relative") -> Problem:
    ones = torch.ones(len(S), dtype=S.dtype)
    return Problem(S, ones, eps * ones.double(), damping, p)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# ---- the reference


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("condition", [1.0, 1e4, 1e10])
def test_the_reference_is_the_root_with_fifty_digits(condition: float, p: int) -> None:
    mpmath = pytest.importorskip("mpmath")
    S = matrix(5, condition)
    with mpmath.workdps(50):
        values, vectors = mpmath.eigsy(mpmath.matrix(S.tolist()) + mpmath.mpf(1e-12) * mpmath.eye(5))
        root = vectors * mpmath.diag([value ** (-mpmath.mpf(1) / p) for value in values]) * vectors.T
        exact = torch.tensor([[float(root[i, j]) for j in range(5)] for i in range(5)], dtype=torch.float64)
    assert relative_error(inverse_root(S, 1e-12, p), exact) < rounding(condition, 5)


# ---- float64: every condition, size, power and damping


@pytest.mark.parametrize(("d", "condition", "damping"), [tuple(row.values()) for row in GRID])
def test_eigh_is_the_reference(d: int, condition: float, damping: str) -> None:
    S, eps = matrix(d, condition), 0.01 / condition
    shift, exact = shift_of(S, eps, damping), torch.linalg.eigvalsh(S)
    for p in (1, 3, *POWERS):
        root = eigh_root(S[None], rule(eps, damping), p)
        assert relative_error(root.A[0], inverse_root(S, shift, p)) < rounding(condition, d)
        assert float(root.shift) == pytest.approx(shift, rel=1e-13)
        assert float(root.largest) == pytest.approx(float(exact[-1]) + shift, rel=1e-13)
        damped = float((exact[-1] + shift) / (exact[0] + shift))
        assert float(root.condition) == pytest.approx(damped, rel=rounding(condition, d) + 1e-13)
        assert float(residual(S[None], root, p)) < 4 * p * rounding(condition, d)


@pytest.mark.parametrize(("d", "condition", "damping"), [tuple(row.values()) for row in GRID])
def test_newton_is_the_reference(d: int, condition: float, damping: str) -> None:
    """At its own damping, which is that of the power method's largest eigenvalue."""
    S, eps = matrix(d, condition), 0.01 / condition
    top = float(torch.linalg.eigvalsh(S)[-1])
    for p in (1, 3, *POWERS):
        root = newton_root(S[None], rule(eps, damping), p)
        shift = float(root.shift)
        assert_from_below(float(root.largest) - shift, top, d)
        assert shift == pytest.approx(eps * (float(root.largest) - shift if damping == "relative" else 1), rel=1e-9)
        assert relative_error(root.A[0], inverse_root(S, shift, p)) < 10 * rounding(condition, d)
        assert float(residual(S[None], root, p)) < 10 * p * rounding(condition, d)
        # Of S it knows no smallest eigenvalue: 0 is assumed.
        assert float(root.condition) == pytest.approx(float(root.largest) / shift, rel=1e-13)
        assert float(root.condition) >= 0.9 * (top + shift) / (top / condition + shift)


def assert_from_below(found: float, largest: float, d: int) -> None:
    """v^T S^(2k+2) v / v^T S^(2k) v is at least lambda_max^2 (v_1^2)^(1/k), with v_1^2 = 1 / d for a random v.

    The square root of it: 1 - ln(d) / (2 k) of the largest, k = 30. A v_1^2 ten times smaller is allowed for.
    """
    assert (1 - math.log(10 * d) / 60) * largest < found < (1 + 1e-12) * largest


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("d", "p"), [(16, 2), (64, 4), (200, 6)])
def test_newton_goes_on_after_its_first_step(d: int, p: int, name: str) -> None:
    """Of many eigenvalues z the first step makes as many that are nearly 0, farther from 1 than before."""
    for condition in (1e2, 1e4):
        S = matrix(d, condition, name)[None]
        root = newton_root(S, rule(0.1 / condition), p)
        assert float(residual(S, root, p)) < 10 * p * rounding(condition, d)


@pytest.mark.parametrize("prime", [13, 101])
def test_newton_is_not_deceived_by_small_entries(prime: int) -> None:
    """A matrix of the eigenvalues 1 and 1/3, scaled to 3/2 and 1/2, is I but for many entries of 1 / (2 sqrt(prime)).

    It is (2 I + C / sqrt(prime)) / 3 with Paley's C of signs, C^2 = prime I. Its first step makes the entries larger.
    """
    squares = {x * x % prime for x in range(1, prime)}
    signs = torch.tensor([0] + [1 if x in squares else -1 for x in range(1, prime)], dtype=torch.float64)
    C = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    C[0, 0] = 0
    C[1:, 1:] = signs[(torch.arange(prime)[:, None] - torch.arange(prime)) % prime]
    S = ((2 * torch.eye(prime + 1, dtype=torch.float64) + C / math.sqrt(prime)) / 3)[None]
    assert float(torch.linalg.eigvalsh(S)[0, 0]) == pytest.approx(1 / 3)
    for p in POWERS:
        assert float(residual(S, newton_root(S, rule(1e-6), p), p)) < 10 * p * rounding(3, prime)


@pytest.mark.release
@pytest.mark.parametrize("condition", [1e4, 1e10])
def test_a_thousand_rows(condition: float) -> None:
    d, p, eps = 1024, 4, 0.01 / condition
    S = matrix(d, condition)
    shift = shift_of(S, eps, "relative")
    expected = inverse_root(S, shift, p)
    assert relative_error(eigh_root(S[None], rule(eps), p).A[0], expected) < rounding(condition, d)
    newton = newton_root(S[None], rule(eps), p)
    assert relative_error(newton.A[0], inverse_root(S, float(newton.shift), p)) < 10 * rounding(condition, d)


# ---- batches


@pytest.mark.parametrize(("solver", "p"), [(eigh_root, 2), (newton_root, 4), (newton_root, 6)])
def test_a_batch_of_mixed_conditions_is_each_alone(solver: Solver, p: int) -> None:
    """As easy ones among them are ready, they are left; as hard ones, they still go on."""
    d = 24
    S = torch.stack([matrix(d, condition, seed=i) for i, condition in enumerate(CONDITIONS)])
    eps = torch.tensor([0.01 / condition for condition in CONDITIONS], dtype=torch.float64)
    together = solver(S, lambda largest: eps * largest, p)
    for i, condition in enumerate(CONDITIONS):
        alone = solver(S[i : i + 1], rule(float(eps[i])), p)
        # The memory of a matrix is aligned otherwise than alone, so sums may be in another order.
        assert relative_error(together.A[i], alone.A[0]) < rounding(condition, d)
        torch.testing.assert_close(together.shift[i], alone.shift[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(together.largest[i], alone.largest[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [eigh_root, newton_root])
def test_a_batch_is_a_loop_to_the_last_bit(solver: Solver, dtype: torch.dtype) -> None:
    """On one thread, and where each matrix begins at 64 bytes as it does alone (of 17 x 17 the second does not)."""
    S = torch.stack([matrix(64, condition, seed=3) for condition in (1, 1e2, 1e4, 1e6)]).to(dtype)
    together = solver(S, rule(1e-6), 4)
    assert torch.equal(together.A, torch.cat([solver(one[None], rule(1e-6), 4).A for one in S]))


@pytest.mark.parametrize(("p", "condition"), [(p, (1 + p) / 2) for p in POWERS] + [(2, 1e2), (4, 1e6), (6, 1e4)])
def test_the_steps_that_a_condition_calls_for_are_enough(condition: float, p: int) -> None:
    """A device is not asked whether it is ready: with as many steps as told it is. With half the digits it is not.

    Near a condition of (1 + p) / 2 the smallest eigenvalue starts at its goal, and the largest has the longest way.
    """
    S = matrix(16, 1e14, "one")[None]
    damping = rule(1 / (condition - 1))
    full = newton_root(S, damping, p)
    told = newton_root(S, damping, p, condition=float(full.condition))
    assert float(full.condition) == pytest.approx(condition)
    assert relative_error(told.A, full.A) < 10 * rounding(condition, 16)
    if condition >= 1e4:
        fewer = newton_root(S, damping, p, condition=math.sqrt(condition))
        assert relative_error(fewer.A, full.A) > 1e-6


# ---- float32


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("d", [16, 200])
def test_in_float32_no_residual_exceeds_its_bound(d: int, name: str) -> None:
    """With damping of 1e-6 and less, the smallest there is a bound for: condition up to 1e6."""
    for condition in (1e2, 1e4, 1e6):
        S = matrix(d, condition, name).float()[None]
        for solver, p, least in [*((eigh_root, p, 1e-3) for p in POWERS), (newton_root, 4, 0.1)]:
            root = solver(S, rule(1e-6), p)
            found = residual(S, root, p)
            assert bool((found <= bound(root.condition, torch.float32, least)).all()), (condition, p, found)


@pytest.mark.parametrize(("d", "p"), [(17, 2), (17, 6), (200, 4)])
def test_in_float32_the_error_grows_like_the_condition(d: int, p: int) -> None:
    """Against float64 of the matrix as float32 has it."""
    errors = []
    for condition in (1e2, 1e4, 1e6):
        S, eps = matrix(d, condition).float(), 0.01 / condition
        expected = inverse_root(S, shift_of(S, eps, "relative"), p)
        errors.append(relative_error(eigh_root(S[None], rule(eps), p).A[0], expected))
        assert errors[-1] < rounding(condition, d, torch.float32)
    assert errors[2] > 10 * errors[1] > 10 * errors[0]


def test_a_bound_is_eight_roundings_of_the_condition() -> None:
    condition = torch.tensor([1.0, 1e5, 1e12, math.inf, math.nan], dtype=torch.float64)
    found = bound(condition, torch.float32, 1e-3).tolist()
    assert found == pytest.approx([1e-3, 8 * 2.0**-23 * 1e5, 0.9, 0.9, 1e-3])


# ---- zeros, scales, what is not finite


@pytest.mark.parametrize("solver", [eigh_root, newton_root])
def test_zeros_in_a_batch_disturb_nobody(solver: Solver) -> None:
    S = torch.stack([matrix(8, 1e2), torch.zeros(8, 8, dtype=torch.float64), matrix(8, 1e4)])
    root = solver(S, rule(1e-6), 4)
    assert torch.equal(root.A[1], torch.eye(8, dtype=torch.float64))
    for i in (0, 2):
        assert relative_error(root.A[i], inverse_root(S[i], float(root.shift[i]), 4)) < 1e-10


@pytest.mark.parametrize("p", POWERS)
def test_absolute_damping_of_zeros_is_a_multiple_of_the_identity(p: int) -> None:
    S, eye = torch.zeros(1, 6, 6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    for root in (eigh_root(S, rule(1e-4, "absolute"), p), newton_root(S, rule(1e-4, "absolute"), p)):
        torch.testing.assert_close(root.A[0], 1e-4 ** (-1 / p) * eye, rtol=1e-13, atol=1e-13)
        assert float(root.largest) == float(root.shift) == pytest.approx(1e-4)
        assert float(residual(S, root, p)) < 1e-13


@pytest.mark.parametrize(("p", "scale"), [(2, 1e-30), (4, 1e30), (6, 1e-3)])
def test_the_scale_of_statistics_comes_out_as_its_root(p: int, scale: float) -> None:
    S = matrix(20, 1e4)[None]
    for solver in (eigh_root, newton_root):
        root, scaled = solver(S, rule(1e-6), p), solver(S * scale, rule(1e-6), p)
        assert relative_error(scaled.A * scale ** (1 / p), root.A) < 1e-10
        torch.testing.assert_close(scaled.shift / scale, root.shift, rtol=1e-10, atol=0)
        torch.testing.assert_close(scaled.condition, root.condition, rtol=1e-10, atol=0)
        torch.testing.assert_close(residual(S * scale, scaled, p), residual(S, root, p), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("solver", "c"), [("eigh", 1e-15), ("newton", 1e-3), ("eigh", 1.0), ("newton", 1e15)])
def test_absolute_damping_knows_the_unit_of_the_statistics(solver: str, c: float) -> None:
    """S / c^2 is damped by eps / c^2, and its root is c^(2/p) times that of S + eps I."""
    S, p = c**2 * matrix(12, 1e2), 4
    eps = 1e-3 * c**2
    units, damping = (torch.tensor([x], dtype=torch.float64) for x in (c, eps))
    stored = Problem((S / c**2)[None], units, damping, "absolute", p)
    found = solve(stored, solver)
    assert relative_error(found.root.A[0] * c ** (-2 / p), inverse_root(S, eps, p)) < 1e-12
    assert float(found.root.shift) == pytest.approx(1e-3)
    assert float(found.residual) < 1e-12


def test_a_shift_below_the_range_of_float32_is_kept() -> None:
    unit = torch.tensor([1e25, 1e-25, 0.5])  # in float32, whose range ends at 1e-45 and 3e38
    largest, eps = torch.tensor([2.0, 3.0, 4.0]).double(), torch.tensor([1e-10, 1e-10, 1e-3])
    absolute = damping_shift(largest, unit, eps, "absolute")
    assert absolute.dtype == torch.float64
    assert absolute.tolist() == pytest.approx([1e-60, 1e40, 4e-3], rel=1e-6)
    assert damping_shift(largest, unit, eps, "relative").tolist() == pytest.approx([2e-10, 3e-10, 4e-3], rel=1e-6)


@pytest.mark.parametrize(("d", "bad"), [(1, math.nan), (9, math.nan), (9, math.inf), (9, -math.inf)])
def test_a_residual_shows_whatever_is_not_finite(d: int, bad: float) -> None:
    """In any place of the root, of any matrix of a batch, of zeros too."""
    S = torch.stack([matrix(d, 1e2), torch.zeros(d, d, dtype=torch.float64)])
    for i, j in ((0, 0), (d - 1, 0), (d // 2, d - 1)):
        for k in range(2):
            root = eigh_root(S, rule(1e-3), 4)
            root.A[k, i, j] = bad
            found = residual(S, root, 4)
            assert not math.isfinite(float(found[k]))
            assert float(found[1 - k]) < 1e-12
            assert not bool(found[k] <= 0.9)


@pytest.mark.parametrize("alternating", [False, True])
def test_the_largest_eigenvalue_of_rows_that_are_equal_up_to_their_sign(alternating: bool) -> None:
    """As in a layer whose units all begin alike. Vectors of signs are orthogonal to some of these statistics."""
    for d in range(1, 65):
        row = torch.ones(d) * (-1.0) ** torch.arange(d) if alternating else torch.ones(d)
        assert float(largest_eigenvalue(torch.outer(row, row)[None])) == pytest.approx(d, rel=1e-5)


# ---- residuals


@pytest.mark.parametrize(("d", "p"), [(8, 4), (17, 2), (64, 6), (200, 4)])
def test_a_residual_is_the_dense_one_within_the_error_of_eight_probes(d: int, p: int) -> None:
    for condition in (1.0, 1e3, 1e6):
        S = matrix(d, condition, seed=4)
        for size in (1e-3, 1e-1):
            root = eigh_root(S[None], rule(1e-2 / condition), p)
            root.A = moved(root.A[0], size, seed=5)[None]
            dense = dense_residual(S, root.A[0], float(root.shift), p)
            assert 0.5 < float(residual(S[None], root, p)) / dense < 2
            assert dense > 0.1 * size


def test_probes_are_signs_and_always_the_same() -> None:
    probes = probe_vectors(50, torch.float64, torch.device("cpu"))
    assert probes.shape == (PROBES, 50)
    assert probes.abs().eq(1).all()
    assert len(torch.unique(probes, dim=0)) == PROBES
    assert torch.equal(probes.float(), probe_vectors(50, torch.float32, torch.device("cpu")))


@pytest.mark.parametrize(
    ("counts", "solver"), [((1,), "eigh"), ((2,), "newton"), ((5,), "auto"), ((1, 2, 3), "newton"), ((4, 1), "eigh")]
)
def test_two_threads_give_what_one_gives(counts: tuple[int, ...], solver: str, two_threads: None) -> None:
    """Fewer matrices than threads, as many, more, and not a multiple; several problems of different sizes.

    To rounding: LAPACK adds up in another order on another thread, in memory that is aligned otherwise.
    """
    sizes = [64, 17, 32]
    made = [torch.stack([matrix(d, 1e3, seed=i) for i in range(K)]) for K, d in zip(counts, sizes, strict=False)]
    together = solve_all([problem(S) for S in made], solver)
    torch.set_num_threads(1)
    alone = [solve(problem(S), "eigh" if solver == "auto" else solver) for S in made]
    assert [len(found.root.A) for found in together] == list(counts)
    for several, one in zip(together, alone, strict=True):
        for i in range(len(one.root.A)):
            assert relative_error(several.root.A[i], one.root.A[i]) < 0.1 * rounding(1e3, 64)
        torch.testing.assert_close(several.root.shift, one.root.shift, rtol=1e-13, atol=0)
        torch.testing.assert_close(several.root.condition, one.root.condition, rtol=1e-11, atol=0)
        torch.testing.assert_close(several.residual, one.residual, rtol=0, atol=1e-12)
