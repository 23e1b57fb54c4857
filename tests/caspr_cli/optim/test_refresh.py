"""Who is refreshed when, from which statistics, and in what precision roots are kept and used."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from references.drive import bare_updates, relative_error
from references.stream import random_stream
from stepping import advance
from torch import Tensor

from caspr_cli.optim import CASPR, refresh, solve, stacks
from caspr_cli.optim.cost import state_bytes
from caspr_cli.optim.engine import KroneckerOptimizer

SHAPES = [(24, 16), (16, 24), (40, 30), (7, 90), (5, 4, 3), (33, 33)]


def family(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[torch.nn.Parameter], KroneckerOptimizer]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    return params, CASPR(params, **{"start_step": 2, "interval": 5, "block_size": 16, "lr": 1e-2} | options)


def roots(optimizer: KroneckerOptimizer) -> list[Tensor]:
    return [A for stack in optimizer.stacks(0) for A in stack.A]


# ---- turns


def test_every_block_has_one_turn_in_an_interval_and_the_turns_cost_alike() -> None:
    params, optimizer = family()
    advance(params, optimizer, range(2))
    changes, costs = torch.zeros(0), []
    for step in range(2, 7):
        before = [A.clone() for A in roots(optimizer)]
        advance(params, optimizer, range(step, step + 1))
        moved = [(A != B).flatten(1).any(1) for A, B in zip(roots(optimizer), before, strict=True)]
        costs.append(sum(float(m.sum()) * A.shape[1] ** 3 for m, A in zip(moved, before, strict=True)))
        changed = torch.cat(moved).float()
        changes = changes + changed if len(changes) else changed
    assert changes.tolist() == [1.0] * len(changes)
    assert max(costs) <= 1.34 * sum(costs) / len(costs)


# ---- precision and memory


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({"pack_roots": True}, 0.0, 0.0),
        ({"root_dtype": torch.bfloat16}, 1e-4, 1e-2),
        ({"apply_dtype": torch.bfloat16}, 1e-4, 2e-2),
        ({"root_dtype": torch.bfloat16, "pack_roots": True, "apply_dtype": torch.bfloat16}, 1e-4, 2e-2),
    ],
)
def test_the_price_of_low_precision(options: dict[str, Any], least: float, most: float) -> None:
    """In U, relative to its length; nothing for packing alone (256 rows are two panels)."""
    gradients = [g.float() for g in random_stream(256, 130, steps=6, seed=4)]
    expected = bare_updates(CASPR, gradients, beta=0.9, eps=1e-4)[-1]
    assert least <= relative_error(bare_updates(CASPR, gradients, beta=0.9, eps=1e-4, **options)[-1], expected) <= most


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 24), ({"pack_roots": True, "root_dtype": torch.bfloat16}, 16), ({"pack_roots": True}, 19)],
)
def test_bytes_of_state_a_parameter(options: dict[str, Any], most: float) -> None:
    """Of a square block: statistics packed, roots, two moments of Adam."""
    p = torch.nn.Parameter(torch.zeros(512, 512))
    optimizer = CASPR([p], **options)
    p.grad = torch.randn(512, 512)
    optimizer.step()
    assert most - 4 < state_bytes(optimizer.state) / p.numel() <= most


# ---- ways of computing the same


@pytest.mark.parametrize("options", [{}, {"precondition": "gradient"}, {"merge": "none"}, {"weight_decay": 0.1}])
def test_small_chunks_are_the_same_as_large_ones(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    large, optimizer = family(**options)
    advance(large, optimizer, range(9))
    monkeypatch.setattr(stacks, "CHUNK_CPU", 600)
    small, optimizer = family(**options)
    advance(small, optimizer, range(9))
    torch.testing.assert_close(large, small, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_fused_moments_are_those_of_the_plain_ones(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, optimizer = family(dtype)
    advance(fused, optimizer, range(9))
    monkeypatch.setattr("caspr_cli.optim.step.fusible", lambda *tensors: False)
    plain, optimizer = family(dtype)
    advance(plain, optimizer, range(9))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)


# ---- what a session may have set, and what it must find as it left it


def test_blocks_of_many_shapes_are_decomposed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    whole = refresh.solve_all
    monkeypatch.setattr(
        refresh, "solve_all", lambda problems, solver: seen.append(len(problems)) or whole(problems, solver)
    )
    params, optimizer = family(interval=1)
    advance(params, optimizer, range(2))
    assert seen == [2 * len(optimizer.stacks(0))]
    seen.clear()
    monkeypatch.setattr(refresh, "BATCH", 300)  # of a stack as few rows at a time as there is room for
    advance(params, optimizer, range(2, 3))
    assert len(seen) > 5


def test_threads_that_start_later_have_as_many_as_before() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        solve._pool.cache_clear()
        params, optimizer = family()
        advance(params, optimizer, range(3))
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 2
        assert list(solve._pool(2).map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
    finally:
        torch.set_num_threads(threads)


def test_steps_are_counted_whatever_the_default_type() -> None:
    p = torch.nn.Parameter(torch.ones(4, 3))
    try:
        torch.set_default_dtype(torch.bfloat16)
        optimizer = CASPR([p], start_step=1)
        for _ in range(300):
            p.grad = torch.ones(4, 3, dtype=torch.float32)
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[p]["step"] == 300


def test_a_gradient_that_the_statistics_cannot_hold_is_left_out() -> None:
    p = torch.nn.Parameter(torch.ones(4, 3).double())
    optimizer = CASPR([p], start_step=1, factor_dtype=torch.float32, graft="none")
    for scale in (1.0, 1e50, 1.0):
        p.grad = scale * torch.ones(4, 3).double()
        optimizer.step()
    assert torch.isfinite(p).all()
    assert optimizer.state[p]["skipped"] == 1


def test_a_removed_group_takes_its_stacks_along() -> None:
    params, optimizer = family()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(4, 3))]})
    optimizer.param_groups[1]["params"][0].grad = torch.ones(4, 3)
    advance(params, optimizer, range(1))
    assert optimizer.stacks(1)
    optimizer.param_groups.pop()
    advance(params, optimizer, range(1, 2))
    assert not optimizer.stacks(1)
