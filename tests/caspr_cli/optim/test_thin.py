"""Thin tensors, first roots, many small tensors: what could make a state or a step many times too large."""

import copy
from typing import Any

import pytest
import torch
from references.drive import relative_error, run_with_turns
from references.optimizer import reference_weights
from references.stream import random_stream
from stepping import advance, assert_alike, resumed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from caspr_cli.optim import CASPR, Shampoo, blocks, plan
from caspr_cli.optim.blocks import Layout
from caspr_cli.optim.cost import state_bytes
from caspr_cli.optim.probe import diagnose

# ---- an axis that is much longer than the others


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((4096, 8), (1,)),  # LoRA
        ((8, 4096), (0,)),
        ((50000, 64), (1,)),  # an embedding: blocks of 1021 x 64
        ((384, 9), (1,)),  # a convolution of each channel by itself
        ((1000, 2, 3), (1,)),  # seen as 1000 x 6
        ((2048, 512), (0, 1)),
        ((257, 32), (1,)),
        ((256, 8), (0, 1)),  # short
        ((257, 33), (0, 1)),
        ((4096, 200), (0, 1)),  # cut into 1024 x 200
    ],
)
def test_the_long_axis_of_a_thin_block_has_no_statistics(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    layout = Layout.of(shape, "matrix", 1024)
    assert layout.axes == axes
    assert {*layout.axes, *layout.long} == {0, 1}


def test_axes_that_were_asked_for_have_statistics() -> None:
    assert Layout.of((4096, 8), "matrix", 1024, "first").axes == (0,)
    assert Layout.of((600,), "matrix", 1024).axes == (0,)
    assert Layout.of((600, 1), "matrix", 1024).axes == (0, 1)  # with precondition_1d
    assert Layout.of((600, 2, 3), "none", 1024).axes == (1, 2)


def test_a_thin_tensor_has_a_small_state_and_the_update_of_its_thin_side() -> None:
    p, q = nn.Parameter(torch.zeros(4096, 8)), nn.Parameter(torch.zeros(4096, 8))
    optimizer, one_sided = CASPR([p], start_step=2), CASPR([q], start_step=2, axes="last")
    advance([p], optimizer, range(4))
    advance([q], one_sided, range(4))
    assert torch.equal(p, q)
    assert state_bytes(optimizer.state) < 2.1 * p.numel() * 4


@pytest.mark.parametrize("optimizer_class", [CASPR, Shampoo])
def test_a_state_from_before_there_was_a_limit_goes_on_with_new_roots(
    optimizer_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = nn.Parameter(torch.zeros(300, 5))
    with monkeypatch.context() as patched:
        patched.setattr(blocks, "LONG", 10**6)
        patched.setattr(plan, "_layout", Layout.of)  # without its cache
        old = optimizer_class([p], start_step=2)
        advance([p], old, range(4))
        assert "statistics_0.0" in old.state[p]
    q = nn.Parameter(p.detach().clone())
    new = optimizer_class([q], start_step=2)
    saved = copy.deepcopy(old.state_dict())
    names = set(saved["state"][0])
    new.load_state_dict(saved)
    assert set(saved["state"][0]) == names  # what is loaded is not changed
    assert diagnose(new) == {}
    advance([q], new, range(4, 5))
    assert not any(name.endswith("_0.0") for name in new.state[q])
    assert float(diagnose(new)["residual"].max()) < 1e-3  # of roots with the exponent of one side


def test_blocks_of_one_shape_and_other_axes_are_kept_apart() -> None:
    """Of 513 rows 257 and 256, which is not too long by itself."""
    shapes, together = [(513, 32), (256, 32)], [nn.Parameter(torch.zeros(s)) for s in ((513, 32), (256, 32))]
    advance(together, CASPR(together, start_step=2, block_size=300), range(4))
    for i, shape in enumerate(shapes):
        alone = [nn.Parameter(torch.zeros(s)) for s in shapes]
        optimizer = CASPR(alone[i : i + 1], start_step=2, block_size=300)
        for step in range(4):
            alone[i].grad = torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + i))
            optimizer.step()
        torch.testing.assert_close(together[i], alone[i])


# ---- first roots


def spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "AT_ONCE", 0)


def test_first_roots_that_are_many_come_at_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    spread(monkeypatch)
    params = [nn.Parameter(torch.zeros(8, 6)) for _ in range(10)]
    plain = [nn.Parameter(torch.zeros(8, 6)) for _ in range(10)]
    optimizer, adamw = CASPR(params, start_step=3, interval=5), torch.optim.AdamW(plain, weight_decay=0)
    counts = []
    for step in range(8):
        advance(params, optimizer, range(step, step + 1))
        advance(plain, adamw, range(step, step + 1))  # type: ignore[arg-type]
        counts.append(int(optimizer.stacks(0)[0].A[0].flatten(1).any(1).sum()))
        left = [torch.allclose(p, q, rtol=0, atol=1e-9) for p, q in zip(params, plain, strict=True)]
        assert sum(left) == 10 - counts[-1]  # who has no roots takes the step of the graft
    assert counts == [0, 0, 2, 4, 6, 8, 10, 10]


WAITING: list[dict[str, Any]] = [
    {}, {"precondition": "gradient"}, {"polar": True, "graft": "rms"}, {"polar": True, "measured": 0.6},
    {"polar": True, "precondition": "gradient", "graft": "none", "pack_roots": True},
]  # fmt: skip


@pytest.mark.parametrize("options", WAITING)
def test_a_tensor_waits_for_the_last_of_its_blocks(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a polar factor each block has roots from its own turn on, and the polar factor alone before it."""
    spread(monkeypatch)
    gradients = random_stream(6, 4, steps=14, seed=7)
    options = {"start_step": 3, "interval": 4, "block_size": 3} | options
    weights, turns = run_with_turns(CASPR, torch.zeros(6, 4).double(), gradients, lr=1.0, **options)
    assert sorted(turns.values()) == [0, 1, 2, 3]
    options.pop("pack_roots", None)
    expected = reference_weights(torch.zeros(6, 4), gradients, lr=1.0, turns=turns, wait=3, **options)
    for w, w_expected in zip(weights, expected, strict=True):
        assert relative_error(w, w_expected) < 1e-9


@pytest.mark.parametrize("polar", [False, True])
def test_a_cut_in_the_middle_of_the_first_roots_changes_nothing(polar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spread(monkeypatch)
    params = [nn.Parameter(torch.zeros(s)) for s in ((6, 4), (9, 5), (6, 4))]
    options: dict[str, Any] = {"start_step": 3, "interval": 5, "block_size": 3, "polar": polar}
    optimizer = CASPR(params, **options)
    advance(params, optimizer, range(5))
    assert_alike((params, optimizer), resumed(params, optimizer, **options), range(5, 14))


def test_roots_of_turns_that_are_over_come_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Amid the first turns the damping changes, for which the roots so far are not those."""
    spread(monkeypatch)
    p = nn.Parameter(torch.zeros(6, 4))
    optimizer = CASPR([p], start_step=3, interval=4, block_size=3)
    advance([p], optimizer, range(5))
    optimizer.param_groups[0]["eps"] = 1e-3
    advance([p], optimizer, range(5, 6))
    assert all(A.flatten(1).any(1).all() for stack in optimizer.stacks(0) for A in stack.A)


# ---- many small tensors


class Counted(TorchDispatchMode):
    """How many operations are called."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **kwargs or {})


def test_a_step_calls_as_many_operations_however_many_tensors_there_are() -> None:
    """But for reading the step of each."""
    calls = []
    for count in (10, 50):
        params = [nn.Parameter(torch.zeros(8, 8)) for _ in range(count)]
        optimizer = CASPR(params, start_step=2, interval=1000, weight_decay=0.1)
        advance(params, optimizer, range(5))
        with Counted() as counted:
            optimizer.step()
        calls.append(counted.calls)
    assert calls[1] - calls[0] <= 40
