"""Statistics that are spoiled, and solvers that raise or return garbage: old roots stay until new ones are right."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import stepping
import torch
from stepping import advance as drive
from torch import Tensor, nn

from caspr_cli.optim import CASPR, solve
from caspr_cli.optim.roots import Root
from caspr_cli.optim.solve import Problem
from caspr_cli.optim.symmetric import pack, unpack

NAN, INF = math.nan, math.inf

# Statistics that are corrupted in place. They are then left alone: they are gathered at the first step only.

D, N = 8, 6
ONCE: dict[str, Any] = {"lr": 0.01, "betas": (0.0, 0.9), "start_step": 1, "interval": 1, "graft": "none"}


class Once(CASPR):
    """Gathers statistics at its first step only."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            group["betas"] = (group["betas"][0], 1.0)
        return loss


def matrices(count: int, kind: type[CASPR] = Once, **options: Any) -> tuple[list[nn.Parameter], CASPR]:
    params = [nn.Parameter(torch.zeros(D, N)) for _ in range(count)]
    return params, kind(params, **(ONCE | options))


def factors(optimizer: CASPR, p: nn.Parameter) -> list[Tensor]:
    """The roots of both axes."""
    return [optimizer.state[p][f"root_{axis}.0"].clone() for axis in (0, 1)]


def counts(optimizer: CASPR, params: list[nn.Parameter]) -> list[tuple[float, float]]:
    """How often new roots were refused, and how often eps is ten times as large, for each parameter."""
    return [tuple(float(optimizer.state[p][f"{name}.0"]) for name in ("rejected", "retries")) for p in params]


def corrupted(S: Tensor, how: str) -> Tensor:
    """``[d, d]`` spoiled; what is said of eigenvalues is exact to rounding."""
    values, Q = torch.linalg.eigh(S.double())
    if how == "indefinite":
        values[0] = -0.1 * values[-1]
        return (Q * values @ Q.mT).to(S.dtype)
    if how == "singular":
        return torch.outer(S[0], S[0])
    S = S.clone()
    S[2, 2] = {"nan": NAN, "inf": INF}[how]
    return S


def corrupt(optimizer: CASPR, p: nn.Parameter, axis: int, how: str) -> Tensor:
    """In place; returns what was there."""
    S = optimizer.state[p][f"statistics_{axis}.0"]
    before = S.clone()
    S.copy_(pack(corrupted(unpack(S, p.shape[axis])[0], how)[None]))
    return before


@pytest.mark.parametrize(
    ("how", "axis", "solver"),
    [
        ("nan", 0, "eigh"),
        ("nan", 1, "newton"),
        ("inf", 1, "eigh"),
        ("inf", 0, "newton"),
        ("indefinite", 0, "newton"),
        ("indefinite", 1, "eigh"),
        ("indefinite", 0, "eigh"),
    ],
)
def test_roots_of_spoiled_statistics_are_refused(how: str, axis: int, solver: str) -> None:
    """The old roots of both axes stay bit for bit, the counters rise, the other blocks know nothing of it."""
    params, optimizer = matrices(3, solver=solver, eps=1e-4)
    others, undisturbed = matrices(3, solver=solver, eps=1e-4)
    drive(params, optimizer, range(2))
    old, clean = factors(optimizer, params[1]), corrupt(optimizer, params[1], axis, how)
    drive(params, optimizer, range(2, 5))
    assert all(map(torch.equal, old, factors(optimizer, params[1])))
    assert counts(optimizer, params) == [(0, 0), (3, 3), (0, 0)]
    drive(others, undisturbed, range(5))
    torch.testing.assert_close(params, others, rtol=1e-4, atol=1e-6)  # statistics are constant: old roots are today's
    # Mended, the damping falls back by one step each time, until the root is the first one again.
    optimizer.state[params[1]][f"statistics_{axis}.0"].copy_(clean)
    drive(params, optimizer, [5])
    assert counts(optimizer, params)[1] == (3, 2)
    assert not torch.equal(factors(optimizer, params[1])[0], old[0])
    drive(params, optimizer, range(6, 10))
    assert counts(optimizer, params)[1] == (3, 0)
    for before, now in zip(old, factors(optimizer, params[1]), strict=True):
        torch.testing.assert_close(before, now, rtol=2e-3, atol=1e-3 * float(before.abs().max()))


def assert_root(optimizer: CASPR, p: nn.Parameter, axis: int, eps: float, tolerance: float) -> None:
    """The root is that of the statistics with relative damping, but for a unit."""
    S = unpack(optimizer.state[p][f"statistics_{axis}.0"], p.shape[axis])[0].double()
    values, Q = torch.linalg.eigh(S)
    expected = Q * (values + eps * values[-1]).clamp(min=eps * float(values[-1]) / 10).pow(-1 / 4) @ Q.mT
    found = factors(optimizer, p)[axis][0].double()
    torch.testing.assert_close(found / found.norm(), expected / expected.norm(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("damping", "solver"), [("relative", "eigh"), ("relative", "newton"), ("absolute", "eigh")])
def test_damping_rises_until_an_indefinite_statistic_has_a_root(damping: str, solver: str) -> None:
    """Tenfold each time; what is then taken is the root with that damping."""
    params, optimizer = matrices(2, solver=solver, damping=damping, eps=1e-5)
    drive(params, optimizer, range(1))
    corrupt(optimizer, params[0], 0, "indefinite")
    old = factors(optimizer, params[0])
    refusals = 0
    while counts(optimizer, params)[0][0] >= refusals:
        assert refusals < 12
        assert torch.equal(factors(optimizer, params[0])[0], old[0])
        assert counts(optimizer, params) == [(refusals, refusals), (0, 0)]
        refusals += 1
        drive(params, optimizer, [refusals])
    refusals -= 1
    assert refusals >= 3
    assert counts(optimizer, params) == [(refusals, refusals - 1), (0, 0)]
    if damping == "relative":  # the smallest eigenvalue is -0.1 of the largest
        assert 4 <= refusals <= 5
        assert_root(optimizer, params[0], 0, 1e-5 * 10**refusals, 0.1)
    assert all(bool(torch.isfinite(p).all()) for p in params)


@pytest.mark.parametrize("statistics", ["ema", "accumulate"])
def test_nan_in_the_statistics_stays_and_the_step_goes_on_with_the_old_root(statistics: str) -> None:
    """For ever: no average forgets a NaN. The counter says so, and the damping has an upper end."""
    params, optimizer = matrices(1, CASPR, statistics=statistics, betas=(0.0, 0.5))
    drive(params, optimizer, range(5))
    corrupt(optimizer, params[0], 0, "nan")
    old = factors(optimizer, params[0])
    for step in range(5, 45):
        before = params[0].detach().clone()
        drive(params, optimizer, [step])
        moved = float((params[0].detach() - before).norm())
        assert 1e-4 < moved < 1
    assert bool(optimizer.state[params[0]]["statistics_0.0"].isnan().any())
    assert all(map(torch.equal, old, factors(optimizer, params[0])))
    assert counts(optimizer, params) == [(40, 24)]


@pytest.mark.parametrize(("how", "solver"), [("nan", "eigh"), ("inf", "newton")])
def test_where_no_root_ever_was_it_is_the_identity(how: str, solver: str) -> None:
    """Both axes; the step is then the gradient's own direction."""
    params, optimizer = matrices(2, CASPR, solver=solver, start_step=4)
    drive(params, optimizer, range(3))
    corrupt(optimizer, params[0], 1, how)
    before = params[0].detach().clone()
    drive(params, optimizer, [3])
    for A, B in zip(factors(optimizer, params[0]), factors(optimizer, params[1]), strict=True):
        assert torch.equal(A[0], torch.eye(A.shape[1]))
        assert not torch.equal(B[0], torch.eye(B.shape[1]))
    step, G = before - params[0].detach(), params[0].grad
    torch.testing.assert_close(step / step.norm(), G / G.norm(), rtol=1e-3, atol=1e-5)
    drive(params, optimizer, range(4, 8))
    assert all(bool(torch.isfinite(p).all()) for p in params)
    assert counts(optimizer, params)[0][0] == 5


# Solvers that raise.


def fails_on(fails: Callable[[Tensor], bool], error: type[Exception] = torch.linalg.LinAlgError) -> Any:
    """``torch.linalg.eigh`` that raises for some batches."""
    eigh = torch.linalg.eigh

    def failing(S: Tensor, **options: str) -> Any:
        if fails(S):
            raise error("put in on purpose")
        return eigh(S, **options)

    return failing


def is_marked(S: Tensor) -> bool:
    """Whether one of a batch is a statistic of gradients whose first row is zero, with a little damping or not."""
    return bool((S[..., 0, 0] < 1e-3 * S.diagonal(dim1=-2, dim2=-1).amax(-1)).any())


def marked_run(
    count: int = 4, victim: int = 2, **options: Any
) -> tuple[list[nn.Parameter], CASPR, Callable[..., None]]:
    """The victim's gradients have a first row of zeros, by which :func:`is_marked` knows its left statistic."""
    params, optimizer = matrices(count, CASPR, eps=1e-4, **options)

    def steps(which: Iterable[int]) -> None:
        for step in which:
            for i, p in enumerate(params):
                p.grad = stepping.noise(step, i, p)
                if i == victim:
                    p.grad[0] = 0
            optimizer.step()

    return params, optimizer, steps


def test_float64_takes_over_for_the_one_matrix_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    others, expected, undisturbed = marked_run()
    undisturbed(range(6))
    params, optimizer, steps = marked_run()
    steps(range(3))
    calls = []

    def fails(S: Tensor) -> bool:
        calls.append((S.dtype, len(S)))
        return S.dtype == torch.float32 and is_marked(S)

    monkeypatch.setattr(torch.linalg, "eigh", fails_on(fails))
    steps(range(3, 6))
    assert calls.count((torch.float64, 1)) == 3  # the victim's left statistic in each step, and no other
    assert not [call for call in calls if call[0] == torch.float64 and call[1] > 1]
    assert counts(optimizer, params) == [(0, 0)] * 4
    for row, (p, q) in enumerate(zip(params, others, strict=True)):
        for axis, (A, B) in enumerate(zip(factors(optimizer, p), factors(expected, q), strict=True)):
            tolerance = 1e-3 if (axis, row) == (0, 2) else 1e-6
            torch.testing.assert_close(A, B, rtol=0, atol=tolerance * float(B.max()))


def test_where_float64_raises_too_the_old_root_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others get theirs; after the fault so does the victim."""
    params, optimizer, steps = marked_run()
    others, expected, undisturbed = marked_run()
    steps(range(3))
    undisturbed(range(4))
    old = [factors(optimizer, p) for p in params]
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fails_on(is_marked))
        steps([3])
    for row, (p, q) in enumerate(zip(params, others, strict=True)):
        for A, B, before in zip(factors(optimizer, p), factors(expected, q), old[row], strict=True):
            assert torch.equal(A, before) == (row == 2)
            if row != 2:
                torch.testing.assert_close(A, B, rtol=0, atol=1e-5 * float(B.max()))
    assert counts(optimizer, params) == [(0, 0), (0, 0), (1, 1), (0, 0)]
    steps([4])
    assert not torch.equal(factors(optimizer, params[2])[0], old[2][0])
    assert counts(optimizer, params) == [(0, 0), (0, 0), (1, 0), (0, 0)]
    assert all(bool(torch.isfinite(p).all()) for p in params)


@pytest.mark.parametrize("how", ["one", "all"])
def test_newton_raises(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """For all matrices or for batches with one of them: the float64 decomposition takes over."""
    slow = {"betas": (0.0, 0.999), "solver": "newton"}
    params, _, undisturbed = marked_run(**slow)
    undisturbed(range(30))
    others, optimizer, steps = marked_run(**slow)
    original, calls = solve.newton_root, []

    def failing(S: Tensor, *rest: Any) -> Root:
        calls.append(len(S))
        if how == "all" or len(calls) % 3 == 1:
            raise RuntimeError("put in on purpose")
        return original(S, *rest)

    monkeypatch.setattr(solve, "newton_root", failing)
    steps(range(30))
    assert calls
    assert counts(optimizer, others) == [(0, 0)] * 4
    torch.testing.assert_close(params, others, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("where", [torch.float32, torch.float64, "newton"], ids=str)
def test_want_of_memory_is_not_hidden(monkeypatch: pytest.MonkeyPatch, where: Any) -> None:
    """Neither in a solver nor where float64 takes over."""
    _, _, steps = marked_run(**({"solver": "newton", "betas": (0.0, 0.999)} if where == "newton" else {}))
    steps(range(2))

    def failing(S: Tensor, *_: Any, **options: str) -> Any:
        if where in ("newton", S.dtype):
            raise torch.OutOfMemoryError("put in on purpose")
        raise torch.linalg.LinAlgError("put in on purpose")

    monkeypatch.setattr(*((solve, "newton_root") if where == "newton" else (torch.linalg, "eigh")), failing)
    with pytest.raises(torch.OutOfMemoryError):
        steps(range(2, 40))


# Solvers that return anything.

GARBAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda A: torch.randn(A.shape, generator=torch.Generator().manual_seed(0)),
    "zeros": torch.zeros_like,
    "nan": lambda A: torch.full_like(A, NAN),
    "one nan": lambda A: A.index_put((torch.tensor(0), torch.tensor(1), torch.tensor(1)), torch.tensor(NAN)),
    "inf": lambda A: torch.full_like(A, INF),
    "negated row": lambda A: torch.cat([-A[:, :1], A[:, 1:]], 1),
    "ten times as large": lambda A: 10 * A,
}


@pytest.mark.parametrize(
    ("garbage", "axis", "pack_roots"), [(name, i % 2, i % 3 == 0) for i, name in enumerate(GARBAGE)]
)
def test_garbage_is_refused(monkeypatch: pytest.MonkeyPatch, garbage: str, axis: int, pack_roots: bool) -> None:
    """Wherever it comes from, on whichever axis: a root is taken for what it does, not for who made it."""
    params, optimizer = matrices(1, eps=1e-3, pack_roots=pack_roots)
    drive(params, optimizer, range(1))
    old, original = factors(optimizer, params[0]), solve.SOLVERS["eigh"]

    def spoiled(problem: Problem) -> Root:
        root = original(problem)
        if problem.S.shape[-1] == (D, N)[axis]:
            root.A = GARBAGE[garbage](root.A)
        return root

    monkeypatch.setitem(solve.SOLVERS, "eigh", spoiled)
    drive(params, optimizer, range(1, 3))
    assert all(map(torch.equal, old, factors(optimizer, params[0])))
    assert counts(optimizer, params)[0][0] == 2
    assert bool(torch.isfinite(params[0]).all())
