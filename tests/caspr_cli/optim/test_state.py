"""What a state holds, and how it goes on under other options, from an older version, or changed by hand."""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references.drive import run
from references.stream import random_stream
from stepping import (
    advance,
    assert_alike,
    assert_finite,
    assert_same,
    copies,
    distance,
    loaded,
    resumed,
    saved,
    through_disk,
    weights,
)
from torch import Tensor, nn

from caspr_cli.optim import CASPR
from caspr_cli.optim.symmetric import pack, packed_length, unpack

# Statistics in one panel and in two (270).
SHAPES: list[tuple[int, ...]] = [(6, 5), (6, 5), (4, 3, 3, 3), (7,), (270, 34), (9, 8), (300, 38), (2, 5)]
SMALL = [shape for shape in SHAPES if max(shape) < 200]
OPTIONS: dict[str, Any] = {
    "lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-4, "start_step": 3, "interval": 7, "block_size": 280,
    "weight_decay": 0.1,
}  # fmt: skip


def trained(steps: int, shapes: list[tuple[int, ...]] = SHAPES, **options: Any) -> tuple[list[nn.Parameter], CASPR]:
    params = weights(shapes)
    optimizer = CASPR(params, **OPTIONS | options)
    advance(params, optimizer, range(steps))
    return params, optimizer


def roots(params: list[nn.Parameter], optimizer: Any) -> list[Tensor]:
    return [v.clone() for p in params for k, v in optimizer.state[p].items() if k.startswith(("root_0", "root_1"))]


# ---- other options after loading


@pytest.mark.parametrize("loaded", [True, False])
def test_roots_are_packed_and_unpacked_bit_for_bit(loaded: bool) -> None:
    """pack_roots False, True, False: a run like the one that never changed."""
    params, steady = trained(6)
    others, other = trained(6)
    for packed, steps in ((True, range(6, 11)), (False, range(11, 16))):
        if loaded:
            others, other = resumed(others, other)
        other.param_groups[0]["pack_roots"] = packed
        advance(params, steady, steps)
        advance(others, other, steps)
        root = other.state[others[4]]["root_0.0"]
        assert root.shape == ((1, packed_length(270)) if packed else (1, 270, 270))
        full = unpack(root, 270) if packed else root
        assert torch.equal(full, steady.state[params[4]]["root_0.0"])
    assert_same(params, steady, others, other)


@pytest.mark.parametrize(("loaded", "solver"), [(False, "eigh"), (True, "newton")])
def test_roots_in_bfloat16_and_back(loaded: bool, solver: str) -> None:
    """root_dtype None, bfloat16, None: rounded to three digits on the way, and no further."""
    start = weights(SMALL)
    params, steady = trained(6, SMALL, solver=solver)
    others, other = trained(6, SMALL, solver=solver)
    for dtype, steps in ((torch.bfloat16, range(6, 13)), (None, range(13, 30))):
        if loaded:
            others, other = resumed(others, other)
        other.param_groups[0]["root_dtype"] = dtype
        advance(params, steady, steps)
        advance(others, other, steps)
        state = other.state[others[0]]
        assert state["root_0.0"].dtype == (dtype or torch.float32)
        assert state["statistics_0.0"].dtype == torch.float32
        assert not state["rejected.0"].any()
    assert 0 < distance(params, others, start) < 0.02
    for old, new in zip(roots(params, steady), roots(others, other), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=2e-2 * float(old.abs().max()))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("block_size", 280, 4), ("block_size", 4, 3), ("merge", "matrix", "none"), ("axes", "all", "first"),
     ("axes", "first", "last"), ("axes", "last", "row"), ("axes", "row", "all")],
)  # fmt: skip
def test_a_state_of_other_blocks_or_axes_is_refused_in_words(name: str, old: Any, new: Any) -> None:
    """One error that names the options; with the old value all goes on as if nothing had been tried."""
    params, optimizer = trained(6, SMALL, **{name: old})
    others, other = resumed(params, optimizer)
    other.param_groups[0][name] = new
    before = copies(others)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"axes, merge, block_size, .* may not change after its first step"):
            advance(others, other, [6])
        assert all(map(torch.equal, others, before))
    other.param_groups[0][name] = old
    assert_alike((params, optimizer), (others, other), range(6, 16))


# ---- a state that is changed by hand, or of another version


@pytest.mark.parametrize("moved", [False, True])
def test_the_live_state_is_the_current_one(moved: bool) -> None:
    """``optimizer.state`` shows what the steps use, also where a loop has replaced its tensors: zeros there count."""
    gradients = random_stream(3, 4, steps=3, seed=1)
    parameter = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    bare: dict[str, Any] = {"interval": 1, "start_step": 1, "graft": "none", "betas": (0.0, 0.9)}
    optimizer = CASPR([parameter], lr=1.0, statistics="accumulate", **bare)
    for gradient in gradients[:2]:
        parameter.grad = gradient
        optimizer.step()
    state = optimizer.state[parameter]
    if moved:
        state.update({name: value.clone() for name, value in state.items()})
    for tensor in state.values():
        tensor.zero_()
    with torch.no_grad():
        parameter.zero_()
    parameter.grad = gradients[2]
    optimizer.step()
    alone = run(CASPR, torch.zeros(3, 4).double(), gradients[2:], lr=1.0, statistics="accumulate", **bare)[0]
    torch.testing.assert_close(parameter.detach(), alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("solver", ["eigh", "newton"])
def test_statistics_of_an_older_version_load(solver: str) -> None:
    """Full ones ``[n, d, d]`` are packed, bit for bit."""
    params, optimizer = trained(6, solver=solver)
    content = through_disk(optimizer.state_dict())
    for state in content["state"].values():
        for name in [name for name in state if name.startswith("statistics_")]:
            d = next(d for d in range(1, 400) if packed_length(d) == state[name].shape[1])
            state[name] = unpack(state[name], d)
    others, other = resumed(params, optimizer, content)
    assert other.state[others[4]]["statistics_0.0"].shape == (1, 270, 270)
    assert_alike((params, optimizer), (others, other), range(6, 14))


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {name: value for name, value in state.items() if name.partition(".")[0] not in names}


def test_counters_that_are_missing_are_zero() -> None:
    params, optimizer = trained(6, SMALL)
    for p in params[:2]:
        optimizer.state[p]["rejected.0"] += 2
    content = through_disk(optimizer.state_dict())
    content["state"] = {i: without("retries", "rejected")(state) for i, state in content["state"].items()}
    others, other = resumed(params, optimizer, content)
    advance(params, optimizer, range(6, 14))
    advance(others, other, range(6, 14))
    assert all(map(torch.equal, params, others))
    for i, name in itertools.product((0, 1, 2, 4), ("retries", "rejected")):
        missed = optimizer.state[params[i]][f"{name}.0"] - other.state[others[i]][f"{name}.0"]
        assert missed.unique().tolist() == [2 if name == "rejected" and i < 2 else 0]


def test_without_roots_in_the_file_they_are_made_at_once() -> None:
    """Of statistics alone: nobody waits for their turn."""
    params, optimizer = trained(6, SMALL)
    content = through_disk(optimizer.state_dict())
    content["state"] = {i: without("root_0", "root_1")(state) for i, state in content["state"].items()}
    others, other = resumed(params, optimizer, content)
    advance(others, other, [6])
    assert all(bool(A.flatten(1).any(1).all()) for A in roots(others, other))
    assert_finite(others, other)


def test_skips_and_refusals_are_part_of_a_checkpoint() -> None:
    """A block whose damping was raised goes on with it, bit for bit."""
    params, optimizer = trained(4, SHAPES[:4], interval=2)
    optimizer.param_groups[0]["betas"] = (0.9, 1 - 1e-7)  # from here on the statistics hardly change
    for p in params[:3]:
        statistics = optimizer.state[p]["statistics_0.0"]
        values, Q = torch.linalg.eigh(unpack(statistics, p.shape[0]))
        values[:, 0] = -0.1 * values[:, -1]
        statistics.copy_(pack(Q * values.unsqueeze(1) @ Q.mT))
    params[3].grad = torch.full((7,), torch.nan)
    optimizer.step()
    advance(params, optimizer, range(5, 8))
    assert float(optimizer.state[params[0]]["retries.0"]) > 0
    others, other = resumed(params, optimizer)
    assert_same(params, optimizer, others, other)
    assert_alike((params, optimizer), (others, other), range(8, 20))
    assert float(other.state[others[3]]["skipped"]) == 1
    assert float(other.state[others[0]]["rejected.0"]) > 2


def test_a_checkpoint_and_a_pickle_are_no_larger_than_their_tensors() -> None:
    """Views into shared memory are saved with the memory behind them: once, not once each."""
    params = weights([(64, 64)] * 8)
    optimizer = CASPR(params, start_step=1)
    advance(params, optimizer, range(1))
    size = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert size >= 8 * 5.5 * 64 * 64 * 4  # two moments, two packed statistics, two roots
    assert len(saved(optimizer.state_dict())) < 1.1 * size + 200_000
    assert len(pickle.dumps(optimizer)) < 1.1 * size + sum(p.nbytes for p in params) + 50_000


@pytest.mark.parametrize("part", [
    lambda o, p: o.state[p], lambda o, p: o.state_dict()["state"][3], lambda o, p: o.state[p]["root_0.0"],
    lambda o, p: copy.deepcopy(o.state[p]["root_0.0"]),
])  # fmt: skip
def test_a_part_of_the_state_is_saved_without_the_rest(part: Callable[[CASPR, Tensor], Any]) -> None:
    params = weights([(32, 32)] * 40)
    optimizer = CASPR(params, start_step=1)
    advance(params, optimizer, range(2))
    content = part(optimizer, params[3])
    tensors = list(content.values()) if isinstance(content, dict) else [content]
    assert max(len(saved(content)), len(pickle.dumps(content))) < 1.1 * sum(t.nbytes for t in tensors) + 8_000
    back = through_disk(content)
    for a, b in zip(tensors, back.values() if isinstance(back, dict) else [back], strict=True):
        assert torch.equal(a, b)
        assert type(b) is Tensor


@settings(deadline=None, max_examples=15, derandomize=True)
@given(data=st.data())
def test_any_pattern_of_gradients_and_cuts(data: st.DataObject) -> None:
    """Five parameters of one shape with gradients in steps of their own, and a save and load at any step:
    each moves as alone."""
    count, steps, shape = 5, 7, (3, 4)  # in blocks of 2 x 2 and 1 x 2, two of each
    marks = st.lists(st.booleans(), min_size=steps, max_size=steps)
    present = data.draw(st.lists(marks, min_size=count, max_size=count))
    cut = data.draw(st.integers(0, steps))
    options: dict[str, Any] = {"lr": 0.1, "start_step": 2, "interval": 2, "betas": (0.9, 0.95), "block_size": 2}
    streams = [random_stream(*shape, steps=steps, seed=i) for i in range(count)]
    gradients = [
        [g if here else None for g, here in zip(stream, marks, strict=True)]
        for stream, marks in zip(streams, present, strict=True)
    ]
    start = torch.ones(shape, dtype=torch.float64)
    parameters = [nn.Parameter(start.clone()) for _ in present]
    optimizer = CASPR(parameters, **options)
    for step in range(steps):
        if step == cut:
            optimizer = loaded(CASPR(parameters, **options), optimizer.state_dict())
        for parameter, stream in zip(parameters, gradients, strict=True):
            parameter.grad = None if stream[step] is None else stream[step].clone()
        optimizer.step()
    for parameter, stream in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), run(CASPR, start, stream, **options)[-1], rtol=1e-10, atol=1e-12)
