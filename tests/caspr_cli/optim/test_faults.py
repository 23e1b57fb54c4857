"""Faults are put in on purpose: training goes on through them, and recovers after."""

import itertools
import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import pytest
import torch
from pairs import pairs
from torch import Tensor, nn

from caspr_cli.optim import CASPR, FullAdagrad, Shampoo

NAN, INF = math.nan, math.inf

# One of each kind; "twin" lies in one stack with "matrix", "plain" is in a group that is not preconditioned.
SHAPES = {"matrix": (6, 5), "twin": (6, 5), "convolution": (4, 3, 3, 3), "vector": (7,), "low": (6, 5), "plain": (5, 4)}
KINDS = ["matrix", "convolution", "vector", "low", "plain"]
START = 4
OPTIONS: dict[str, Any] = {
    "lr": 0.1, "betas": (0.9, 0.95), "start_step": START, "interval": 2, "weight_decay": 0.1, "eps": 1e-4,
}  # fmt: skip
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
