"""A state goes on: cut off at any step, moved about, saved otherwise, or under other options."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from caspr_cli.optim import CASPR
from caspr_cli.optim.state import COUNTERS
from caspr_cli.optim.symmetric import pack, packed_length, unpack

# Whole and cut, alike and alone, with statistics in one panel and in two (270), in one type and in another.
SHAPES: list[tuple[int, ...]] = [(6, 5), (6, 5), (4, 3, 3, 3), (7,), (270, 34), (9, 8), (300, 38), (2, 5), ()]
LOW = 5  # the one of them that is bfloat16
INTERVAL = 7
OPTIONS: dict[str, Any] = {
    "lr": 0.05,
    "betas": (0.9, 0.95),
    "eps": 1e-4,
    "start_step": 3,
    "interval": INTERVAL,
    "block_size": 280,
    "weight_decay": 0.1,
}


def parameters(shapes: Iterable[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    return [nn.Parameter(w.bfloat16() if i == LOW else w) for i, w in enumerate(weights)]


def advance(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """On gradients that depend on the step and the parameter alone."""
    for step in steps:
        for i, p in enumerate(params):
            generator = torch.Generator().manual_seed(100 * step + i)
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def through_disk(content: dict[str, Any]) -> dict[str, Any]:
    """What ``torch.save`` wrote and the safe loader reads back."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def resumed(
    params: list[nn.Parameter], optimizer: CASPR, change: Callable[[dict[str, Any]], None] = lambda content: None
) -> tuple[list[nn.Parameter], CASPR]:
    """Another process: copies of the weights, an optimizer with default options, and what was on disk."""
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other = CASPR(copies)
    content = through_disk(optimizer.state_dict())
    change(content)
    other.load_state_dict(content)
    return copies, other


def assert_equal(
    params: list[nn.Parameter], optimizer: CASPR, others: list[nn.Parameter], other: CASPR, *, but: Iterable[str] = ()
) -> None:
    """Weights and state, bit for bit, with the same types."""
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
        mine, theirs = optimizer.state[p], other.state[q]
        assert mine.keys() - set(but) == theirs.keys() - set(but)
        for name in mine.keys() - set(but):
            torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0, msg=f"{name} of {i}")


def assert_finite(params: list[nn.Parameter], optimizer: CASPR) -> None:
    for p in params:
        assert bool(torch.isfinite(p).all())
        assert all(bool(torch.isfinite(value).all()) for value in optimizer.state[p].values())


def distance(params: list[nn.Parameter], others: list[nn.Parameter], start: list[nn.Parameter]) -> float:
    """The largest difference between two runs, in units of the way that they went."""
    way = [float((q.detach() - s.detach()).double().norm()) for q, s in zip(others, start, strict=True)]
    apart = [float((p.detach() - q.detach()).double().norm()) for p, q in zip(params, others, strict=True)]
    return max(a / w for a, w in zip(apart, way, strict=True))


STORED: dict[str, dict[str, Any]] = {
    "plain": {},
    "pack_roots": {"pack_roots": True},
    "root_dtype": {"root_dtype": torch.bfloat16},
    "one side": {"axes": "first"},
    "each row": {"axes": "row", "pack_roots": True, "block_size": 4},
    "all": {"pack_roots": True, "root_dtype": torch.bfloat16, "block_size": 4},
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("solver", ["eigh", "newton"])
def test_cut_off_in_the_middle_of_an_interval(solver: str, stored: str) -> None:
    """Bit for bit, with everybody's turn where it was."""
    options = OPTIONS | {"solver": solver} | STORED[stored]
    if solver == "newton" or stored == "all":
        shapes = [shape for shape in SHAPES if max(shape, default=1) < 200]
    else:
        shapes = SHAPES
    whole = parameters(shapes)
    optimizer = CASPR(whole, **options)
    advance(whole, optimizer, range(12))
    others, other = resumed(whole, optimizer)
    assert_equal(whole, optimizer, others, other)
    advance(whole, optimizer, range(12, 20))
    advance(others, other, range(12, 20))
    assert_equal(whole, optimizer, others, other)
    assert [stack.refresh_offset for stack in optimizer.stacks(0)] == [
        stack.refresh_offset for stack in other.stacks(0)
    ]
    assert len({phase for stack in other.stacks(0) for phase in stack.refresh_offset}) > 3
    assert [p.dtype for p in others].count(torch.bfloat16) == 1


@pytest.mark.parametrize("cut", range(1, 11))
def test_cut_off_at_any_step(cut: int) -> None:
    """Before the first roots, at it, and at every turn of the interval."""
    shapes = [(6, 5), (6, 5), (4, 3, 3, 3), (7,), (9, 8), (9, 8)]
    whole, part = parameters(shapes), parameters(shapes)
    optimizer, first = CASPR(whole, **OPTIONS), CASPR(part, **OPTIONS)
    advance(whole, optimizer, range(20))
    advance(part, first, range(cut))
    others, other = resumed(part, first)
    advance(others, other, range(cut, 20))
    assert_equal(whole, optimizer, others, other)


@pytest.mark.parametrize("options", [{"factor_dtype": torch.float64}, STORED["root_dtype"]], ids=str)
def test_every_tensor_keeps_its_type_through_the_safe_loader(options: dict[str, Any]) -> None:
    params = parameters()
    optimizer = CASPR(params, **(OPTIONS | options))
    advance(params, optimizer, range(4))
    params[LOW].grad = torch.full((9, 8), torch.nan, dtype=torch.bfloat16)
    optimizer.step()
    others, other = resumed(params, optimizer)
    for p, q in zip(params, others, strict=True):
        mine, theirs = optimizer.state[p], other.state[q]
        assert {name: value.dtype for name, value in mine.items()} == {n: v.dtype for n, v in theirs.items()}
    low = other.state[others[LOW]]
    assert low["exp_avg"].dtype == torch.bfloat16
    assert low["skipped"].dtype == low["step"].dtype == torch.float32
    assert low["statistics_0.0"].dtype == (options.get("factor_dtype") or torch.float32)
    assert low["root_0.0"].dtype == (options.get("root_dtype") or low["statistics_0.0"].dtype)
    assert float(low["skipped"]) == 1


# Other options after loading.


@pytest.mark.parametrize("loaded", [False, True])
def test_roots_are_packed_and_unpacked_bit_for_bit(loaded: bool) -> None:
    """pack_roots False, True, False: a run like the one that never changed."""
    params, others = parameters(), parameters()
    steady, other = CASPR(params, **OPTIONS), CASPR(others, **OPTIONS)
    advance(params, steady, range(6))
    advance(others, other, range(6))
    for packed, steps in ((True, range(6, 11)), (False, range(11, 16))):
        if loaded:
            others, other = resumed(others, other)
        other.param_groups[0]["pack_roots"] = packed
        advance(params, steady, steps)
        advance(others, other, steps)
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)
        root = other.state[others[4]]["root_0.0"]
        assert root.shape == ((1, packed_length(270)) if packed else (1, 270, 270))
        full = unpack(root, 270) if packed else root
        assert torch.equal(full, steady.state[params[4]]["root_0.0"])
    assert packed_length(270) < 270**2
    assert_equal(params, steady, others, other)


@pytest.mark.parametrize("solver", ["eigh", "newton"])
@pytest.mark.parametrize("loaded", [False, True])
def test_roots_in_bfloat16_and_back(loaded: bool, solver: str) -> None:
    """root_dtype None, bfloat16, None: rounded to three digits on the way, and no further."""
    options = OPTIONS | {"solver": solver}
    shapes = SHAPES[:4]
    start, params, others = parameters(shapes), parameters(shapes), parameters(shapes)
    steady, other = CASPR(params, **options), CASPR(others, **options)
    advance(params, steady, range(6))
    advance(others, other, range(6))
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
    for i in (0, 1, 2):  # statistics know only the gradients, and all roots have been made anew
        mine, theirs = steady.state[params[i]], other.state[others[i]]
        torch.testing.assert_close(mine["statistics_0.0"], theirs["statistics_0.0"], rtol=0, atol=0)
        largest = float(mine["root_0.0"].abs().max())
        torch.testing.assert_close(mine["root_0.0"], theirs["root_0.0"], rtol=0, atol=2e-2 * largest)


@pytest.mark.parametrize(("old", "new"), [(280, 4), (4, 280), (4, 3), (5, 6), (3, 5)])
def test_another_block_size_is_refused_in_words(old: int, new: int) -> None:
    """One error that names the option; with the old value all goes on as if nothing had been tried."""
    shapes = [(6, 5), (5, 5), (4, 3, 3, 3), (7,)]
    params = parameters(shapes)
    optimizer = CASPR(params, **(OPTIONS | {"block_size": old}))
    advance(params, optimizer, range(6))
    others, other = resumed(params, optimizer)
    other.param_groups[0]["block_size"] = new
    weights = [q.detach().clone() for q in others]
    for _ in range(2):
        with pytest.raises(ValueError, match="block_size"):
            advance(others, other, [6])
        assert all(torch.equal(q.detach(), w) for q, w in zip(others, weights, strict=True))
    other.param_groups[0]["block_size"] = old
    advance(others, other, range(6, 16))
    advance(params, optimizer, range(6, 16))
    assert_equal(params, optimizer, others, other)


# State that is moved, cast, or of another version.


@pytest.mark.parametrize("solver", ["eigh", "newton"])
@pytest.mark.parametrize(
    "move",
    [Tensor.clone, lambda t: t.to("cpu", copy=True), copy.deepcopy],
    ids=["clone", "to", "deepcopy"],
)
def test_moved_in_the_middle(move: Callable[[Tensor], Tensor], solver: str) -> None:
    """After each of some steps, for all entries or for those of some parameters: it changes nothing."""
    options = OPTIONS | {"solver": solver, "pack_roots": True, "block_size": 5}
    shapes = [(6, 5), (6, 5), (4, 3, 3, 3), (7,), (9, 8), (9, 8)]
    params, others = parameters(shapes), parameters(shapes)
    steady, other = CASPR(params, **options), CASPR(others, **options)
    advance(params, steady, range(20))
    for step in range(20):
        advance(others, other, [step])
        if step in (0, 2, 5, 6, 12):
            chosen = others if step % 2 == 0 else others[1::2]
            for q in chosen:
                other.state[q] = {name: move(value) for name, value in other.state[q].items()}
    assert_equal(params, steady, others, other)


def test_moved_away_and_changed_there() -> None:
    """That the state was replaced is seen: the new values count, not those in the old stacks."""
    params = parameters([(6, 5)])
    optimizer = CASPR(params, **(OPTIONS | {"statistics": "accumulate"}))
    advance(params, optimizer, range(5))
    state = optimizer.state[params[0]]
    before = state["statistics_0.0"].clone()
    state.update({name: value.clone() for name, value in state.items()})
    state["statistics_0.0"].zero_()
    advance(params, optimizer, [5])
    left = optimizer.state[params[0]]["statistics_0.0"].view(6, 6).trace() / before.view(6, 6).trace()
    assert 0.05 < float(left) < 0.5  # one gradient's, not six


@pytest.mark.parametrize("options", [{}, {"precondition": "gradient"}, {"graft": "sgd"}, {"start_step": 100}], ids=str)
def test_a_model_cast_after_loading_goes_on(options: dict[str, Any]) -> None:
    """float32 in the file, ``.double()`` after: factors and moments follow, in steps near those of float32."""
    shapes = [(6, 5), (4, 3, 3, 3), (7,)]
    start, params = parameters(shapes), parameters(shapes)
    optimizer = CASPR(params, **(OPTIONS | options))
    advance(params, optimizer, range(6))
    others, other = resumed(params, optimizer)
    for q in others:
        q.data = q.data.double()
        q.grad = None
    advance(params, optimizer, range(6, 16))
    advance(others, other, range(6, 16))
    assert_finite(others, other)
    assert distance(params, others, start) < 1e-2
    if "start_step" not in options:
        assert other.state[others[0]]["statistics_0.0"].dtype == torch.float64


@pytest.mark.parametrize("options", [{}, {"precondition": "gradient"}, {"graft": "sgd"}, {"start_step": 100}], ids=str)
def test_a_state_loaded_by_a_model_of_another_type_goes_on(options: dict[str, Any]) -> None:
    """``.double()`` before loading: torch casts the moments, and the factors follow at the first step."""
    shapes = [(6, 5), (4, 3, 3, 3), (7,)]
    start, params = parameters(shapes), parameters(shapes)
    optimizer = CASPR(params, **(OPTIONS | options))
    advance(params, optimizer, range(6))
    others = [nn.Parameter(p.detach().double()) for p in params]
    other = CASPR(others)
    other.load_state_dict(through_disk(optimizer.state_dict()))
    advance(params, optimizer, range(6, 16))
    advance(others, other, range(6, 16))
    assert_finite(others, other)
    assert distance(params, others, start) < 1e-2
    for q in others:
        assert {v.dtype for n, v in other.state[q].items() if n not in COUNTERS} == {torch.float64}


def unpacked(content: dict[str, Any]) -> None:
    """Statistics as an older version kept them, ``[n, d, d]``."""
    for state in content["state"].values():
        for name, value in state.items():
            if name.startswith("statistics_"):
                d = next(d for d in range(1, 400) if packed_length(d) == value.shape[1])
                state[name] = unpack(value, d)


def without(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for state in content["state"].values():
            for name in [name for name in state if name.partition(".")[0] in names]:
                del state[name]

    return change


def test_statistics_of_an_older_version_load() -> None:
    """Full ones are packed, bit for bit."""
    params = parameters()
    optimizer = CASPR(params, **OPTIONS)
    advance(params, optimizer, range(6))
    others, other = resumed(params, optimizer, unpacked)
    assert other.state[others[4]]["statistics_0.0"].shape == (1, 270, 270)
    advance(params, optimizer, range(6, 14))
    advance(others, other, range(6, 14))
    assert other.state[others[4]]["statistics_0.0"].shape == (1, packed_length(270))
    assert_equal(params, optimizer, others, other)


def test_what_is_above_the_panels_of_full_statistics_is_not_read() -> None:
    """The lower triangle alone counts."""
    full = torch.randn(1, 270, 270, generator=torch.Generator().manual_seed(0))
    symmetric = full.tril() + full.tril(-1).mT
    assert torch.equal(unpack(pack(symmetric), 270), symmetric)
    spoiled = symmetric.clone()
    spoiled[:, 0, -1] = torch.nan
    assert torch.equal(pack(spoiled), pack(symmetric))


def test_counters_that_are_missing_are_zero() -> None:
    params = parameters()
    optimizer = CASPR(params, **OPTIONS)
    advance(params, optimizer, range(6))
    for stack in optimizer.stacks(0):
        stack.rejected += 2
    others, other = resumed(params, optimizer, without("retries", "rejected"))
    assert not any(name.startswith(("retries", "rejected")) for q in others for name in other.state[q])
    advance(params, optimizer, range(6, 14))
    advance(others, other, range(6, 14))
    names = [f"{name}.{part}" for name, part in itertools.product(("retries", "rejected"), range(4))]
    assert_equal(params, optimizer, others, other, but=names)
    for p, q in zip(params, others, strict=True):
        for name in names:
            if name in optimizer.state[p]:
                missed = optimizer.state[p][name] - other.state[q][name]
                assert bool((missed == (2 if name.startswith("rejected") else 0)).all())


def test_without_roots_in_the_file_they_are_made_at_once() -> None:
    """Of statistics alone: nobody waits for their turn."""
    params = parameters()
    optimizer = CASPR(params, **OPTIONS)
    advance(params, optimizer, range(6))
    others, other = resumed(params, optimizer, without("root_0", "root_1"))
    advance(others, other, [6])
    for stack in other.stacks(0):
        for A in stack.A:
            assert bool(A.flatten(1).any(1).all())
    assert_finite(others, other)


def test_skips_and_refusals_are_part_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block whose damping was raised goes on with it, bit for bit."""
    params = parameters(SHAPES[:4])
    optimizer = CASPR(params, **(OPTIONS | {"interval": 2}))
    advance(params, optimizer, range(4))
    monkeypatch.setattr("caspr_cli.optim.step.accumulate", lambda *_, **__: None)  # what is spoiled stays as it is
    for stack in optimizer.stacks(0):
        S = unpack(stack.S[0], stack.shape[0])
        values, Q = torch.linalg.eigh(S)
        values[:, 0] = -0.1 * values[:, -1]
        stack.S[0].copy_(pack(Q * values.unsqueeze(1) @ Q.mT))
    params[3].grad = torch.full((7,), torch.nan)
    optimizer.step()
    advance(params, optimizer, range(5, 8))
    assert float(optimizer.state[params[0]]["retries.0"]) > 0
    others, other = resumed(params, optimizer)
    assert_equal(params, optimizer, others, other)
    advance(params, optimizer, range(8, 20))
    advance(others, other, range(8, 20))
    assert_equal(params, optimizer, others, other)
    assert float(other.state[others[3]]["skipped"]) == 1
    assert float(other.state[others[0]]["rejected.0"]) > 2


# Options that were removed.


def old_keys(**values: Any) -> Callable[[dict[str, Any]], None]:
    """What a state_dict of an older version has beside today's."""

    def change(content: dict[str, Any]) -> None:
        for group in content["param_groups"]:
            group |= {"statistics_interval": 1, "refresh_above": 0.0} | values

    return change


def test_a_state_with_removed_options_at_their_defaults_loads() -> None:
    params = parameters(SHAPES[:4])
    optimizer = CASPR(params, **OPTIONS)
    advance(params, optimizer, range(6))
    others, other = resumed(params, optimizer, old_keys())
    assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()
    copies = pickle.loads(pickle.dumps(other))
    old_keys()({"param_groups": copies.param_groups})
    assert pickle.loads(pickle.dumps(copies)).param_groups[0].keys() == optimizer.param_groups[0].keys()
    advance(params, optimizer, range(6, 12))
    advance(others, other, range(6, 12))
    assert_equal(params, optimizer, others, other)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"statistics_interval": 2},
            "statistics_interval was removed, and can only be read where it is 1, but it",
        ),
        ({"refresh_above": 0.1}, "refresh_above was removed, .* but it is 0.1"),
        ({"solver": "warm"}, "solver=warm was removed: use eigh"),
    ],
)
def test_a_state_with_another_value_is_refused_by_name(values: dict[str, Any], words: str) -> None:
    params = parameters(SHAPES[:2])
    optimizer = CASPR(params, **OPTIONS)
    advance(params, optimizer, range(3))
    with pytest.raises(ValueError, match=words):
        resumed(params, optimizer, old_keys(**values))
    with pytest.raises(ValueError, match=words):
        CASPR([{"params": parameters(SHAPES[:2])} | values])


def test_eigenvectors_in_an_older_state_are_left_out() -> None:
    params = parameters(SHAPES[:2])
    optimizer = CASPR(params, **OPTIONS)
    advance(params, optimizer, range(3))

    def change(content: dict[str, Any]) -> None:
        for state in content["state"].values():
            state["basis_0.0"] = torch.zeros_like(state["root_0.0"])

    others, other = resumed(params, optimizer, change)
    advance(params, optimizer, [3])
    advance(others, other, [3])
    assert_equal(params, optimizer, others, other)
