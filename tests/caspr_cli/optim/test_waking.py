"""Rows and columns that were silent, and then have gradients: dead units, unused classes, padded vocabularies."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from caspr_cli.optim import CASPR, Shampoo
from caspr_cli.optim.engine import KroneckerOptimizer


def woken(
    cls: Any, axis: int = 0, dtype: torch.dtype = torch.float32, silent: int = 104, **options: Any
) -> list[tuple[float, float]]:
    """Of 14 steps after ``silent`` without a gradient in slice 0: how far it moves, and the others' median, over lr."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(64, 48, dtype=dtype))
    optimizer = cls([p], lr=1e-3, **options)
    found = []
    for step in range(silent + 14):
        gradient = torch.randn(64, 48, generator=generator)
        if step < silent:
            gradient.select(axis, 0).zero_()
        p.grad, before = gradient.to(dtype), p.detach().double().clone()
        optimizer.step()
        moved = ((p.detach().double() - before) / 1e-3).movedim(axis, 0).square().mean(1).sqrt()
        if step >= silent:
            found.append((float(moved[0]), float(moved[1:].median())))
    return found


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (CASPR, {"silent": 304}),
        (CASPR, {"axis": 1}),
        (CASPR, {"statistics": "accumulate"}),
        (CASPR, {"precondition": "gradient"}),
        (CASPR, {"block_size": 32}),
        (CASPR, {"dtype": torch.bfloat16, "axes": "first"}),
        (Shampoo, {"axis": 1}),
    ],
)
def test_it_takes_a_few_times_the_step_of_the_others_and_leaves_them_theirs(cls: Any, options: dict[str, Any]) -> None:
    """Without new roots at once 11 to 620 times, and .003 to .14 lr; AdamW 7 times after 304 steps."""
    found = woken(cls, **options)
    assert max(row / others for row, others in found) < 8
    assert min(others for _, others in found) > 0.17


@pytest.mark.parametrize("options", [{}, {"exponent": 1.0}, {"polar": True}, {"merge": "none", "order": 1}])
def test_a_whole_block_that_wakes_up_goes_where_a_new_one_would(options: dict[str, Any]) -> None:
    """As an expert that had no tokens: with new roots at once. It kept the identity until its turn."""
    own: dict[str, Any] = {"lr": 1.0, "graft": "none", "betas": (0.0, 0.9), "interval": 50} | options
    p, q = torch.nn.Parameter(torch.zeros(2, 8, 6)), torch.nn.Parameter(torch.zeros(1, 8, 6))
    optimizer, fresh = (CASPR([each], batch_axes=1, **own) for each in (p, q))
    generator = torch.Generator().manual_seed(0)
    for step in range(66):
        p.grad, before = torch.randn(2, 8, 6, generator=generator), (p.detach().clone(), q.detach().clone())
        if step < 60:
            p.grad[1] = 0
        optimizer.step()
        if step >= 60:
            q.grad = p.grad[1:].clone()
            fresh.step()
            moved, expected = (p.detach() - before[0])[1].flatten(), (q.detach() - before[1]).flatten()
            assert torch.cosine_similarity(moved, expected, dim=0) > 0.999


def test_a_tensor_whose_first_gradients_are_zero_has_roots_from_its_first_gradient_on() -> None:
    """As the second factor of LoRA has, at step 2."""
    late, soon = (torch.nn.Parameter(torch.zeros(8, 6)) for _ in range(2))
    options: dict[str, Any] = {"lr": 1.0, "graft": "none", "betas": (0.0, 0.9)}
    with_zero, without = CASPR([late], **options), CASPR([soon], **options)
    late.grad = torch.zeros(8, 6)
    with_zero.step()
    late.grad = soon.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for optimizer in (with_zero, without):
        optimizer.step()
    new, old = (optimizer.stacks(0)[0].A[0] for optimizer in (with_zero, without))
    assert torch.allclose(new / new.norm(), old / old.norm(), atol=1e-5)  # roots of one gradient, up to their scale


def test_only_the_blocks_that_hold_it_have_new_roots_and_a_cut_changes_nothing() -> None:
    def advance(p: Tensor, optimizer: KroneckerOptimizer, steps: range) -> None:
        for step in steps:
            p.grad = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
            if step < 36:
                p.grad[3] = 0
            optimizer.step()

    def roots(optimizer: KroneckerOptimizer) -> list[Tensor]:
        return [A.clone() for stack in optimizer.stacks(0) for A in stack.A]

    options: dict[str, Any] = {"block_size": 16, "start_step": 2, "interval": 20}
    p = torch.nn.Parameter(torch.zeros(32, 16))
    optimizer = CASPR([p], **options)
    advance(p, optimizer, range(36))
    assert optimizer.stacks(0)[0].refresh_offset == [0, 10]  # and 36 is nobody's turn
    q = torch.nn.Parameter(p.detach().clone())
    other = CASPR([q], **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = roots(optimizer)
    advance(p, optimizer, range(36, 37))
    for A, B in zip(roots(optimizer), before, strict=True):
        assert (A != B).flatten(1).any(1).tolist() == [True, False]
    advance(p, optimizer, range(37, 40))
    advance(q, other, range(36, 40))
    assert torch.equal(p, q)


def test_a_gradient_that_grows_everywhere_is_no_row_that_wakes_up() -> None:
    p = torch.nn.Parameter(torch.zeros(16, 8))
    optimizer = CASPR([p], start_step=2, interval=50)
    for step in range(40):
        p.grad = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)) * (1 if step < 30 else 1000)
        optimizer.step()
        if step == 20:
            before = optimizer.stacks(0)[0].A[0].clone()
    assert torch.equal(optimizer.stacks(0)[0].A[0], before)
