"""Faults are put in on purpose: training goes on through them, and recovers after."""

import itertools
import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import pytest
import stepping
import torch
from pairs import pairs
from stepping import advance as drive
from torch import Tensor, nn

from caspr_cli.optim import CASPR, FullAdagrad, Shampoo, solve
from caspr_cli.optim.roots import Root
from caspr_cli.optim.solve import Problem, Solution
from caspr_cli.optim.symmetric import pack, unpack

NAN, INF = math.nan, math.inf

# One of each kind; "twin" lies in one stack with "matrix", "plain" is in a group that is not preconditioned.
SHAPES = {
    "matrix": (6, 5),
    "twin": (6, 5),
    "convolution": (4, 3, 3, 3),
    "vector": (7,),
    "low": (6, 5),
    "plain": (5, 4),
}
KINDS = ["matrix", "convolution", "vector", "low", "plain"]
START = 4
OPTIONS: dict[str, Any] = {
    "lr": 0.1,
    "betas": (0.9, 0.95),
    "start_step": START,
    "interval": 2,
    "weight_decay": 0.1,
    "eps": 1e-4,
}
Fault = Callable[[int, str], Tensor | None]  # the gradient of a parameter at a step


def model() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(noise(-1, name, torch.bfloat16 if name == "low" else torch.float32)) for name in SHAPES}


def noise(step: int, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Normal numbers that depend on parameter and step alone."""
    generator = torch.Generator().manual_seed(100 * (step + 1) + list(SHAPES).index(name))
    default = torch.bfloat16 if name == "low" else torch.float32
    return torch.randn(SHAPES[name], generator=generator).to(dtype or default)


def optimizer_of(params: dict[str, nn.Parameter], **options: Any) -> CASPR:
    rest = [p for name, p in params.items() if name != "plain"]
    return CASPR([{"params": rest}, {"params": [params["plain"]], "precondition": False}], **(OPTIONS | options))


def play(params: dict[str, nn.Parameter], optimizer: CASPR, steps: Iterable[int], fault: Fault = noise) -> None:
    for step in steps:
        for name, p in params.items():
            p.grad = fault(step, name)
        optimizer.step()


def with_bad(at: int, names: Iterable[str], bad: float | None) -> Fault:
    """Gradients of which one element is ``bad``, or that are missing, at one step for some parameters."""

    def gradient(step: int, name: str) -> Tensor | None:
        G = noise(step, name)
        if step != at or name not in names:
            return G
        if bad is None:
            return None
        G.view(-1)[G.numel() // 2] = bad
        return G

    return gradient


def snapshot(optimizer: CASPR, p: nn.Parameter) -> dict[str, Tensor]:
    return {"weight": p.detach().clone()} | {k: v.clone() for k, v in optimizer.state[p].items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], *, but: Iterable[str] = ()) -> None:
    assert one.keys() - set(but) == other.keys() - set(but)
    for name in one.keys() - set(but):
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, msg=name)


OTHERS: list[tuple[list[str], float, int, dict[str, Any]]] = [
    (["matrix", "convolution"], NAN, START - 1, {"statistics": "accumulate"}),
    (["matrix", "convolution"], NAN, START - 1, {"precondition": "gradient", "graft": "sgd"}),
    (["matrix", "convolution"], NAN, 7, {"graft": "rmsprop", "precondition_1d": True}),
    (["matrix", "convolution"], NAN, START - 1, {"graft": "none", "maximize": True}),
    (["matrix", "convolution"], NAN, 7, {"block_size": 4, "solver": "newton"}),
    (["matrix", "convolution"], NAN, 7, {"merge": "none"}),
    (["matrix", "convolution"], NAN, START - 1, {"pack_roots": True, "root_dtype": torch.bfloat16}),
    *(([*SHAPES], bad, at, {}) for bad, at in [(NAN, 0), (INF, START - 1), (NAN, 7)]),
]
# At the very first step, at that of the first roots, at the next, and later.
EACH = pairs({"victim": KINDS, "bad": [NAN, INF, -INF], "at": [0, START - 1, START, 6]})
SKIPPED = [*(([row["victim"]], row["bad"], row["at"], {}) for row in EACH), *OTHERS]


@pytest.mark.parametrize(("victims", "bad", "at", "options"), SKIPPED, ids=itertools.count())
def test_a_gradient_that_is_not_finite_is_as_good_as_none(
    victims: list[str], bad: float, at: int, options: dict[str, Any]
) -> None:
    """The victims stay as they are, all else is as if their gradient had been None, then and ever after."""
    params, others = model(), model()
    faulty, clean = optimizer_of(params, **options), optimizer_of(others, **options)
    play(params, faulty, range(at))
    play(others, clean, range(at))
    before = {name: snapshot(faulty, params[name]) for name in victims}
    play(params, faulty, [at], with_bad(at, victims, bad))
    play(others, clean, [at], with_bad(at, victims, None))
    for name in victims:
        after = snapshot(faulty, params[name])
        assert float(after["skipped"]) == 1
        if at > 0:
            assert_same(after, before[name], but=["skipped"])
        else:  # there was no state yet: it is all zeros
            assert torch.equal(after.pop("weight"), before[name]["weight"])
            assert not any(bool(value.any()) for key, value in after.items() if key != "skipped")
    for step in range(at + 1, at + 4):
        play(params, faulty, [step])
        play(others, clean, [step])
        for name in SHAPES:
            assert_same(snapshot(faulty, params[name]), snapshot(clean, others[name]), but=["skipped"])
            assert bool(torch.isfinite(params[name]).all())
    for name in victims:
        assert not torch.equal(params[name].detach(), before[name]["weight"])


# A quadratic regression: Y = X W + b with the loss ||error||^2 / 2 a sample.


FIRST, LAST, STEPS = 20, 26, 76  # the faulty steps are FIRST ... LAST - 1
Change = Callable[[Tensor], Tensor]


def same(G: Tensor) -> Tensor:
    return G


@lru_cache
def regression(change: Change = same, last: int = LAST, kind: Any = CASPR, **options: Any) -> list[float]:
    """The loss before each step; ``change`` spoils the gradient of the matrix from FIRST until before ``last``."""
    generator = torch.Generator().manual_seed(0)
    X, W, b = (torch.randn(*shape, generator=generator) for shape in [(64, 8), (8, 6), (6,)])
    weight, bias = nn.Parameter(torch.zeros(8, 6)), nn.Parameter(torch.zeros(6))
    optimizer = kind([weight, bias], **options)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = (X @ (weight - W) + bias - b).square().sum() / 2 / len(X)
        loss.backward()
        losses.append(loss.item())
        assert weight.grad is not None
        if FIRST <= step < last:
            weight.grad = change(weight.grad)
        optimizer.step()
        if step in range(FIRST, last + 4):
            for state in [{"weight": weight}, *optimizer.state.values()]:
                assert all(bool(torch.isfinite(value).all()) for value in state.values())
    assert all(map(math.isfinite, losses))
    return losses


def set_first_row(G: Tensor, value: float) -> Tensor:
    G = G.clone()
    G[0] = value
    return G


def low_rank(G: Tensor, rank: int) -> Tensor:
    U, s, V = torch.linalg.svd(G, full_matrices=False)
    return U[:, :rank] * s[:rank] @ V[:rank]


SIGNS = itertools.cycle([1, -1])
FAULTS: dict[str, Change] = {
    "not finite": lambda G: set_first_row(G, NAN),
    "zero": torch.zeros_like,
    "a row of zeros": lambda G: set_first_row(G, 0),
    "rank one": lambda G: low_rank(G, 1),
    "rank three": lambda G: low_rank(G, 3),
    "1e-20": lambda G: torch.full_like(G, 1e-20),
    "spike": lambda G: 1e6 * G,
    "1e+20": lambda G: torch.full_like(G, 1e20),
    "G 1e+20": lambda G: 1e20 * G,
    "to and fro": lambda G: G * 1e20 ** (next(SIGNS)),
    "a row of 1e+20": lambda G: set_first_row(G, 1e20),
}
SUM: dict[str, Any] = {"statistics": "accumulate"}
BARE: dict[str, Any] = {"graft": "none"}
# Without a graft: the square of 1e20, which Adam's second moment would have to hold, is no float32.
HUGE: dict[str, Any] = {"lr": 0.1, "betas": (0.1, 0.1), "interval": 1, **BARE}
SHORT: dict[str, Any] = {"betas": (0.3, 0.3)}


@pytest.mark.parametrize(
    ("fault", "end", "options"),
    [
        ("not finite", 0.01, {}),
        ("zero", 0.01, BARE),
        ("a row of zeros", 0.01, SUM),
        ("rank one", 0.01, {}),
        ("rank three", 0.01, BARE | SUM | {"lr": 0.5}),
        ("1e-20", 0.01, BARE | SUM | {"lr": 0.5}),
        ("spike", 0.02, SHORT),
        ("spike", 0.02, SHORT | BARE | {"interval": 1, "lr": 0.1}),
        ("spike", 0.02, SHORT | SUM),  # a sum of statistics never forgets it, yet training goes on
        ("1e+20", 0.05, HUGE | {"kind": FullAdagrad, "lr": 0.3}),
        ("G 1e+20", 0.05, HUGE),
        ("to and fro", 0.05, HUGE | {"kind": Shampoo}),
        ("a row of 1e+20", 0.05, HUGE),
    ],
    ids=itertools.count(),
)
def test_a_regression_recovers(fault: str, end: float, options: dict[str, Any]) -> None:
    """Fifty steps after the fault the loss is near that of a run without one."""
    options = {"lr": 0.05, "betas": (0.5, 0.5), "start_step": 2, "interval": 3} | options
    last = FIRST + 1 if fault == "spike" else LAST
    disturbed, undisturbed = regression(FAULTS[fault], last, **options), regression(**options)
    assert disturbed != undisturbed
    assert undisturbed[-1] < 0.05 * undisturbed[0]
    assert disturbed[-1] < max(3 * undisturbed[-1], end * undisturbed[0])
    assert disturbed[-1] < disturbed[last] < 2 * disturbed[0]


@pytest.mark.parametrize(("graft", "start_step"), [("adam", 3), ("adam", 1000), ("rmsprop", 3)])
def test_a_gradient_whose_square_is_no_number_leaves_the_second_moment_finite(graft: str, start_step: int) -> None:
    """Else the average would be infinite for ever: those elements lend no length, and the tensor would never move."""
    params = [nn.Parameter(torch.ones(6, 5))]
    optimizer = CASPR(params, lr=0.1, graft=graft, start_step=start_step, interval=1, betas=(0.5, 0.5))
    for step in range(60):
        params[0].grad = noise(step, "matrix") * (1e25 if step == 5 else 1)
        before = params[0].detach().clone()
        optimizer.step()
    assert all(bool(torch.isfinite(value).all()) for value in optimizer.state[params[0]].values())
    assert float((params[0].detach() - before).norm()) > 0.05


@pytest.mark.parametrize(
    ("damping", "graft"), [("relative", "adam"), ("relative", "sgd"), ("absolute", "rmsprop"), ("absolute", "none")]
)
def test_zero_gradients_for_ever(damping: str, graft: str) -> None:
    """Nothing moves, nothing is refused, everything stays finite; and the first gradient moves it."""
    p = nn.Parameter(torch.ones(6, 5))
    optimizer = CASPR([p], lr=0.1, graft=graft, damping=damping, start_step=2, interval=2)
    for _ in range(10):
        p.grad = torch.zeros(6, 5)
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(6, 5))
    assert all(bool(torch.isfinite(value).all()) for value in optimizer.state[p].values())
    assert not optimizer.state[p]["rejected.0"].any()
    for step in range(4):
        p.grad = noise(step, "matrix")
        optimizer.step()
    assert 0.01 < float((p.detach() - 1).norm()) < 100


# Statistics that are corrupted in place. They are then left alone: they are gathered at the first step only.

D, N = 8, 6
ONCE: dict[str, Any] = {
    "lr": 0.01,
    "betas": (0.0, 0.9),
    "start_step": 1,
    "interval": 1,
    "graft": "none",
}


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
    for p, q in zip(params, others, strict=True):  # the statistics are constant, so the old roots are today's
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
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
    assert G is not None
    torch.testing.assert_close(step / step.norm(), G / G.norm(), rtol=1e-3, atol=1e-5)
    drive(params, optimizer, range(4, 8))
    assert all(bool(torch.isfinite(p).all()) for p in params)
    assert counts(optimizer, params)[0][0] == 5


# Solvers that raise.


def fails_on(fails: Callable[[Tensor], bool], error: type[Exception] = torch.linalg.LinAlgError) -> Any:
    """``torch.linalg.eigh`` that raises for some batches."""
    eigh = torch.linalg.eigh

    def failing(S: Tensor) -> Any:
        if fails(S):
            raise error("put in on purpose")
        return eigh(S)

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
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("where", [torch.float32, torch.float64, "newton"], ids=str)
def test_want_of_memory_is_not_hidden(monkeypatch: pytest.MonkeyPatch, where: Any) -> None:
    """Neither in a solver nor where float64 takes over."""
    _, _, steps = marked_run(**({"solver": "newton", "betas": (0.0, 0.999)} if where == "newton" else {}))
    steps(range(2))

    def failing(S: Tensor, *_: Any) -> Any:
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

    def spoiled(problem: Problem) -> Solution:
        root = original(problem).root
        if problem.S.shape[-1] == (D, N)[axis]:
            root.A = GARBAGE[garbage](root.A)
        return Solution.of(problem, root)

    monkeypatch.setitem(solve.SOLVERS, "eigh", spoiled)
    drive(params, optimizer, range(1, 3))
    assert all(map(torch.equal, old, factors(optimizer, params[0])))
    assert counts(optimizer, params)[0][0] == 2
    assert bool(torch.isfinite(params[0]).all())


# Parameters that come and go.


def turns(optimizer: CASPR, index: int = 0) -> dict[tuple[int, tuple[int, ...]], list[int]]:
    """(number of the parameter, block shape) to the steps of the interval at which its roots are made anew."""
    members = optimizer.param_groups[index]["params"]
    return {
        (i, stack.shape): stack.refresh_offset[stack.rows[p]]
        for i, p in enumerate(members)
        for stack in optimizer.stacks(index)
        if p in stack.rows
    }


COMING_AND_GOING: list[tuple[int, ...]] = [(6, 5), (6, 5), (4, 3, 3), (7, 3), (6, 5)]
TURNING = {"lr": 0.05, "start_step": 2, "interval": 5, "block_size": 4, "betas": (0.9, 0.95)}


def tensors(shapes: Iterable[tuple[int, ...]] = COMING_AND_GOING) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape)) for shape in shapes]


def test_a_parameter_that_joins_a_group_later() -> None:
    """The list of a group's parameters may grow: the newcomer is rooted at its own start_step, all go on."""
    params, late = tensors(), tensors([(6, 5)])
    optimizer = CASPR(params, **TURNING)
    drive(params, optimizer, range(7))
    optimizer.param_groups[0]["params"] += late
    drive(params + late, optimizer, range(7, 16))
    state = optimizer.state[late[0]]
    assert float(state["step"]) == 9
    assert bool(state["root_0.0"].any())
    assert all(bool(torch.isfinite(p).all()) for p in params + late)
    assert float((late[0].detach() - 1).norm()) > 0.1


def nothing(optimizer: CASPR) -> None:
    pass


def another_interval(optimizer: CASPR) -> None:
    optimizer.param_groups[0]["interval"] = 3


def moved(optimizer: CASPR) -> None:
    for state in optimizer.state.values():
        state.update({name: value.clone() for name, value in state.items()})


def reloaded(optimizer: CASPR) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("meanwhile", "name", "on"),
    [
        (nothing, "precondition", "momentum"),
        (another_interval, "precondition_1d", True),
        (moved, "precondition", "momentum"),
        (reloaded, "precondition_1d", True),
    ],
)
def test_preconditioning_may_be_switched_off_and_on(name: str, on: Any, meanwhile: Callable[[CASPR], None]) -> None:
    """Off, it is the graft method; on again, it goes on from the old statistics, at everybody's own turn."""
    params = tensors([*COMING_AND_GOING, (9,)])
    optimizer = CASPR(params, **(TURNING | {"precondition_1d": True}))
    drive(params, optimizer, range(8))
    optimizer.param_groups[0][name] = False
    drive(params, optimizer, range(8, 10))
    meanwhile(optimizer)
    drive(params, optimizer, range(10, 13))
    changed = params if name == "precondition" else params[-1:]
    old = [optimizer.state[p]["statistics_0.0"].clone() for p in changed]
    optimizer.param_groups[0][name] = on
    drive(params, optimizer, range(13, 25))
    for p, S in zip(changed, old, strict=True):
        assert not torch.equal(optimizer.state[p]["statistics_0.0"], S)
    assert all(float(optimizer.state[p]["step"]) == 25 for p in params)
    assert all(float((p.detach() - 1).norm()) > 0.1 for p in params)
    assert all(bool(torch.isfinite(value).all()) for state in optimizer.state.values() for value in state.values())
    assert all(len(stack.refresh_offset) == len(stack.scale) for stack in optimizer.stacks(0))
    fresh = tensors([*COMING_AND_GOING, (9,)])
    never_off = CASPR(fresh, **(TURNING | {"precondition_1d": True}))
    never_off.param_groups[0]["interval"] = optimizer.param_groups[0]["interval"]
    drive(fresh, never_off, range(1))
    assert turns(optimizer) == turns(never_off)


@pytest.mark.parametrize("meanwhile", [nothing, moved, reloaded])
def test_while_preconditioning_is_off_it_is_adamw(meanwhile: Callable[[CASPR], None]) -> None:
    """Whatever is left of the stacks takes no part."""
    params, others = tensors(), tensors()
    optimizer = CASPR(params, **TURNING)
    adamw = torch.optim.AdamW(others, lr=0.05, betas=(0.9, 0.95), weight_decay=0.0)
    drive(params, optimizer, range(8))
    drive(others, adamw, range(8))
    optimizer.param_groups[0]["precondition"] = False
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            p.copy_(q)
    meanwhile(optimizer)
    drive(params, optimizer, range(8, 14))
    drive(others, adamw, range(8, 14))
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(
    ("precondition", "graft", "small", "large"),
    [("momentum", "adam", 1e-20, 1e18), ("gradient", "none", 1e-20, 1e18), ("momentum", "sgd", 1e-36, 1e10)],
)
def test_a_gradient_that_outgrows_old_roots_beyond_float32(
    precondition: Any, graft: Any, small: float, large: float
) -> None:
    """Roots are of the small gradients until their next turn; momentum over their scale would be infinite."""
    p = nn.Parameter(torch.zeros(6, 4))
    optimizer = CASPR([p], lr=1e-3, start_step=2, precondition=precondition, graft=graft)
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        p.grad = torch.randn(6, 4, generator=generator) * (small if step < 4 else large)
        optimizer.step()
    assert bool(p.isfinite().all())
