import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from caspr_cli.bench.gemm_bound import Call, Product, Recorder, gemm_bound, kronecker_products, replay_calls
from caspr_cli.optim import CASPR, Shampoo
from caspr_cli.optim.cost import called_flops
from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.polar import flops as polar_flops

CPU = torch.device("cpu")


def params(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def recorded(optimizer: Optimizer) -> list[Call]:
    return calls_of(optimizer.step)


def total(optimizer: KroneckerOptimizer) -> int:
    return sum(product.blocks * product.count for product in kronecker_products(optimizer))


def flops(products: list[Product]) -> int:
    return sum(2 * p.blocks * p.count * p.rows * p.inner * p.columns for p in products)


def test_six_products_a_block_for_caspr_and_four_for_shampoo() -> None:
    shapes = (20, 12), (20, 12), (8, 8)
    assert total(CASPR(params(*shapes))) == 6 * 3
    assert total(Shampoo(params(*shapes))) == 4 * 3
    assert total(CASPR(params(*shapes), order=3)) == 8 * 3
    assert total(CASPR(params(*shapes), measured=0.5)) == 8 * 3
    assert total(CASPR(params(*shapes), polar=True)) == (6 + 15) * 3
    assert total(CASPR(params(*shapes), polar=True, polar_steps=3)) == (6 + 9) * 3
    assert total(CASPR(params((5, 12)), polar=True)) == 6 + 2 + 5 + 3 * 4  # of the small Gram matrix
    assert total(CASPR(params(*shapes), block_size=10)) == 6 * (4 + 4 + 1)
    assert kronecker_products(CASPR(params((7,)))) == []  # vectors are no part of it
    assert total(CASPR([{"params": params((5, 5)), "precondition": False}, {"params": params((6, 5))}])) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_a_block_are_the_cost_of_the_formula(dtype: torch.dtype) -> None:
    found = kronecker_products(CASPR(params((20, 12), dtype=dtype)))
    assert flops(found) == 3 * 2 * 20 * 12 * (20 + 12)  # statistics, and two passes
    assert {product.dtype for product in found} == {dtype}
    a, b, c = 4, 5, 6
    for shape in (20, 12), (30, 12):
        assert flops(kronecker_products(CASPR(params(shape), exponent=0, polar=True))) == polar_flops(
            shape, 5, torch.float32
        )
    found = kronecker_products(CASPR(params((a, b, c), (a, b, c)), merge="none"))  # every axis counts
    assert sum(product.blocks * product.count for product in found) == 2 * 3 * (1 + 2)
    assert flops(found) == 2 * 3 * 2 * a * b * c * (a + b + c)


class Known(Optimizer):
    """Five products in a step, one of each kind, and what is no product."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            G: Tensor = p.grad
            S = G @ G.mT
            torch.addmm(S, G, G.mT, beta=0.5, alpha=0.25)
            batch = torch.stack([G, G])
            out = torch.bmm(batch, batch.mT)
            out.baddbmm_(batch, batch.mT, beta=0.9)
            torch.tensordot(G, G, dims=[[1], [1]])
            p.add_(G.mul(2).sum())


def shapes(call: Call) -> tuple[str, list[tuple[int, ...]]]:
    return call.function.__name__, [x.size for x in call.operands]


def test_the_products_of_a_step_are_found() -> None:
    calls = recorded(Known(params((4, 3))))
    assert [shapes(call) for call in calls] == [
        ("mm", [(4, 3), (3, 4)]),
        ("addmm", [(4, 4), (4, 3), (3, 4)]),
        ("bmm", [(2, 4, 3), (2, 3, 4)]),
        ("baddbmm", [(2, 4, 4), (2, 4, 3), (2, 3, 4)]),
        ("mm", [(4, 3), (3, 4)]),
    ]
    assert dict(calls[1].scale) == {"beta": 0.5, "alpha": 0.25}
    assert calls[0].operands[1].stride == (1, 3)  # a transposed view, and replayed as one
    assert called_flops(Known(params((4, 3)))) == 96 + 96 + 192 + 192 + 96


def calls_of(run: Callable[[], None]) -> list[Call]:
    with Recorder() as recorder:
        run()
    return recorder.calls


def test_a_replay_calls_the_same_products() -> None:
    calls = recorded(Known(params((4, 3), (6, 3))))
    replays = replay_calls(calls, CPU)
    again = [call for replay in replays for call in calls_of(replay)]
    assert [shapes(call) for call in again] == [shapes(call) for call in calls]
    assert [call.operands for call in again] == [call.operands for call in calls]
    assert [call.scale for call in again] == [call.scale for call in calls]


def test_adamw_calls_no_products_and_muon_some() -> None:
    assert gemm_bound(torch.optim.AdamW(params((4, 3))), CPU, seconds) is None
    bound = gemm_bound(torch.optim.Muon(params((4, 3))), CPU, seconds)
    bound()


@pytest.mark.parametrize("faster", ["bmm", "mm"])
def test_the_faster_way_is_taken(faster: str) -> None:
    """What is timed decides: with a clock that says so, either way."""
    optimizer = CASPR(params((6, 4), (6, 4), (6, 4)))

    def says(run: Callable[[], None]) -> float:
        return 1.0 if called(run) == {faster} else 2.0

    bound = gemm_bound(optimizer, CPU, says)
    assert called(bound) == {faster}


def called(run: Callable[[], None]) -> set[str]:
    return {call.function.__name__ for call in calls_of(run)}
