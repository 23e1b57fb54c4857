"""Several ranks share the work: the same weights, a part of the state each, and whole checkpoints."""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks, alone
from stepping import advance, loaded, noise, saved, weights
from torch import Tensor, nn

from caspr_cli.optim import CASPR, Shampoo, plan, scatter, shard
from caspr_cli.optim.dealing import PADDED, Block, Loads, deal, group_size, received
from caspr_cli.optim.probe import counters, diagnose
from caspr_cli.optim.schedule import EIGH_FLOPS
from caspr_cli.optim.stacks import is_factor

# Bit for bit is asked where blocks are multiples of 32. Elsewhere a matrix of a stack may begin between two multiples
# of 64 bytes, or its eigenvalues be the rest that vector instructions leave over, and then the last bit may be another.
EVEN = [(32, 64), (64, 32), (128, 128), (32, 64), (32, 4, 8), (9,), (), (64, 32)]
OPTIONS: dict[str, Any] = {"lr": 0.01, "interval": 3, "start_step": 2, "block_size": 64, "weight_decay": 0.1}


def train(
    params: list[nn.Parameter],
    steps: range,
    optimizer: Any = None,
    cls: type = CASPR,
    without: dict[int, set[int]] | None = None,
    **options: Any,
) -> Any:
    optimizer = optimizer or cls(params, **OPTIONS | options)
    advance(params, optimizer, steps, without)
    return optimizer


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def weights_after(
    rank: int, steps: int, dtype: torch.dtype, kwargs: dict[str, Any], shapes: list[tuple[int, ...]] = EVEN
) -> list[Tensor]:
    params = weights(shapes, dtype)
    train(params, range(steps), **kwargs)
    return values(params)


# All options are in the rows of test_contract; these are one of each kind of arithmetic.
CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "defaults": (torch.float32, {}),
    "shampoo": (torch.float32, {"cls": Shampoo, "graft": "rmsprop", "precondition": "gradient"}),
    "newton": (torch.float32, {"solver": "newton", "merge": "none"}),
    "one side": (torch.float32, {"axes": "last"}),
    "each row": (torch.float32, {"axes": "row", "block_size": 32}),
    "bfloat16": (
        torch.bfloat16,
        {"root_dtype": torch.bfloat16, "pack_roots": True, "gather_dtype": torch.float32},
    ),
    "bare": (torch.float32, {"graft": "none", "betas": (0.0, 0.9), "interval": 1, "start_step": 1}),
    "unused": (torch.float32, {"without": {1: {0, 3}, 2: {0}, 4: {2}, 5: {0, 1, 2, 3, 4, 7}, 6: set(range(8))}}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_one_process_bit_for_bit(ranks: Ranks, case: str) -> None:
    dtype, kwargs = CASES[case]
    expected = alone(weights_after, 9, dtype, kwargs)
    for found in ranks(weights_after, 9, dtype, kwargs):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def after_waking_and_waiting(rank: int) -> list[Tensor]:
    """First roots at their turns, and then a row without gradients until step 12."""
    plan.AT_ONCE, before = 0, plan.AT_ONCE
    try:
        params = weights([(64, 32), (32, 64), (64, 64), (2048, 32)])
        optimizer = CASPR(params, **OPTIONS | {"interval": 6})
        for step in range(15):
            for i, p in enumerate(params):
                p.grad = noise(step, i, p)
                if step < 12:
                    p.grad[5] = 0
            optimizer.step()
    finally:
        plan.AT_ONCE = before
    return values(params)


def test_who_waits_and_who_wakes_up_is_the_same_on_all_ranks(ranks: Ranks) -> None:
    expected = alone(after_waking_and_waiting)
    for found in ranks(after_waking_and_waiting):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def in_small_buckets(rank: int, dtype: torch.dtype, kwargs: dict[str, Any], size: int) -> tuple[list[Tensor], int]:
    """Return the weights, and the bytes of memory for what travels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("caspr_cli.optim.dealing.BUCKET", size)
        params = weights(EVEN, dtype)
        optimizer = train(params, range(9), **kwargs)
    return values(params), optimizer._exchange.bytes_kept


@pytest.mark.parametrize("case", ["defaults", "shampoo", "each row", "unused"])
def test_the_bits_are_the_same_whatever_the_size_of_a_bucket(ranks: Ranks, case: str) -> None:
    """Also where a parameter is in several, and where some have no gradient."""
    dtype, kwargs = CASES[case]
    expected = alone(weights_after, 9, dtype, kwargs)
    kept = []
    for size in (1, 4 * 4 * 64 * 64, 2**28):
        results = ranks(in_small_buckets, dtype, kwargs, size)
        for found, _ in results:
            assert all(map(torch.equal, found, expected))
        kept.append(results[0][1])
    if ranks.world == 2:  # of so few tensors four ranks have no more than two buckets, which are kept at any size
        assert kept[0] < min(kept[1:])


def bytes_of_a_step(rank: int, dtype: torch.dtype) -> list[int]:
    found = []
    for gather_dtype in (torch.float32, None):
        optimizer = train(weights([(64, 64)] * 4, dtype), range(3), gather_dtype=gather_dtype)
        found.append(optimizer.bytes_received)
    return found


def test_many_small_tensors_are_looked_at_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    params, seen = [torch.zeros(600, 600) for _ in range(30)], []
    monkeypatch.setattr(scatter, "local", lambda p: seen.append(p) or p)
    assert [len(run) for run in scatter.chunks(params)] == [2] * 15
    assert len(seen) == 30


def test_updates_travel_in_bfloat16_where_parameters_are(two: Ranks) -> None:
    size = 4 * 64 * 64
    assert two(bytes_of_a_step, torch.float32) == [[4 * size, 4 * size]] * 2
    assert two(bytes_of_a_step, torch.bfloat16) == [[4 * size, 2 * size]] * 2


def updates_in_bfloat16(rank: int) -> list[Tensor]:
    return weights_after(rank, 9, torch.float32, {"gather_dtype": torch.bfloat16})


def test_updates_may_travel_in_bfloat16(two: Ranks) -> None:
    """All ranks have the same weights still, the owner of a block too; and they are near those of float32."""
    first, second = two(updates_in_bfloat16)
    start, exact = weights(EVEN), alone(weights_after, 9, torch.float32, {})
    changed = False
    for a, b, c, w in zip(first, second, exact, start, strict=True):
        assert torch.equal(a, b)
        moved = torch.linalg.vector_norm(c - w.detach())
        assert torch.linalg.vector_norm(a - c) <= 0.01 * moved
        changed |= not torch.equal(a, c)
    assert changed


def factor_bytes(optimizer: CASPR) -> int:
    entries = (entry for state in optimizer.state.values() for entry in state.items())
    return sum(x.numel() * x.element_size() for name, x in entries if is_factor(name))


def bytes_of_a_rank(rank: int, count: int) -> int:
    params = [nn.Parameter(torch.ones(32, 64)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = CASPR(params, start_step=1)
    optimizer.step()
    return factor_bytes(optimizer)


def test_each_rank_keeps_its_part_of_the_factors(ranks: Ranks) -> None:
    whole = alone(bytes_of_a_rank, 8)
    assert ranks(bytes_of_a_rank, 8) == [whole // ranks.world] * ranks.world
    assert sum(ranks(bytes_of_a_rank, 5)) == alone(bytes_of_a_rank, 5)  # unequal shares
    assert sorted(ranks(bytes_of_a_rank, 1)) == [0] * (ranks.world - 1) + [alone(bytes_of_a_rank, 1)]


def save(rank: int, steps: int, path: str, axes: str = "all") -> list[Tensor]:
    """Train, and save on rank 0 alone what all have gathered."""
    params = weights(EVEN)
    optimizer = train(params, range(steps), axes=axes)
    content = optimizer.state_dict()
    if rank == 0:
        torch.save({"optimizer": content, "weights": values(params)}, path)
    return values(params)


def resume(rank: int, start: int, stop: int, path: str) -> list[Tensor]:
    saved = torch.load(path, weights_only=True)
    params = weights(EVEN)
    with torch.no_grad():
        for p, w in zip(params, saved["weights"], strict=True):
            p.copy_(w)
    optimizer = loaded(CASPR(params, **OPTIONS), saved["optimizer"])
    train(params, range(start, stop), optimizer)
    return values(params)


@pytest.mark.parametrize("axes", ["all", "last", "row"])
def test_a_checkpoint_is_whole_and_loads_at_any_number_of_ranks(
    ranks: Ranks, two: Ranks, tmp_path: Path, axes: str
) -> None:
    path, single = str(tmp_path / "ranks.pt"), str(tmp_path / "one.pt")
    ranks(save, 5, path, axes)
    alone(save, 5, single, axes)
    saved, expected = (torch.load(p, weights_only=True)["optimizer"] for p in (path, single))
    assert saved["param_groups"] == expected["param_groups"]
    for i, state in expected["state"].items():
        assert saved["state"][i].keys() == state.keys()
        for name, value in state.items():
            assert torch.equal(saved["state"][i][name], value), (i, name)
            assert saved["state"][i][name].dtype == value.dtype
    uncut = alone(weights_after, 9, torch.float32, {"axes": axes})
    for found in [alone(resume, 5, 9, path), *ranks(resume, 5, 9, path), *two(resume, 5, 9, path)]:
        for a, b in zip(found, uncut, strict=True):
            assert torch.equal(a, b)


def save_at_once(rank: int, path: str) -> bool:
    """What was loaded is saved again, before and after a step, and by a copy."""
    saved = torch.load(path, weights_only=True)["optimizer"]
    params = weights(EVEN)
    optimizer = loaded(CASPR(params, **OPTIONS), saved)
    at_once = same(optimizer.state_dict(), saved)
    train(params, range(5, 6), optimizer)
    both = copy.deepcopy([params, optimizer])
    of_the_copy = same(optimizer.state_dict(), both[1].state_dict())
    train(params, range(6, 8), optimizer)
    train(both[0], range(6, 8), both[1])
    return at_once and of_the_copy and all(map(torch.equal, params, both[0]))


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, b["state"][i][k]) for i, state in a["state"].items() for k, x in state.items())


def test_state_is_gathered_whenever_it_is_asked_for(two: Ranks, tmp_path: Path) -> None:
    path = str(tmp_path / "one.pt")
    alone(save, 5, path)
    assert two(save_at_once, path) == [True, True]


def saved_on_the_first_alone(rank: int) -> str:
    """As many training loops do."""
    params = weights(EVEN)
    optimizer = CASPR(params, **OPTIONS)
    optimizer.timeout = 1
    train(params, range(3), optimizer)
    try:
        return "" if rank else str(optimizer.state_dict())
    except RuntimeError as error:
        return str(error)


def test_a_rank_that_saves_alone_is_told(two: Ranks) -> None:
    first, _ = two(saved_on_the_first_alone)
    assert "state_dict() gathers what ranks have: call it on every rank" in first
    assert "After 1 s timed out waiting for rank 1" in first


def saved_after_a_first_try_alone(rank: int) -> bool:
    """On a network that is not gloo's, as where ranks have NCCL."""
    params = weights(EVEN)
    optimizer, store = CASPR(params, **OPTIONS), dist.distributed_c10d._get_default_store()
    optimizer.timeout = 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("torch.distributed.new_group")
        patch.delattr("torch.distributed.monitored_barrier")
        train(params, range(3), optimizer)
        if rank == 0:
            with pytest.raises(RuntimeError, match="waiting for rank 1"):
                optimizer.state_dict()
            store.set("tried", "")
        store.wait(["tried"])
        optimizer.timeout = 30
        return same(optimizer.state_dict(), optimizer.state_dict())


def test_ranks_meet_in_the_store_that_is_there(two: Ranks) -> None:
    assert two(saved_after_a_first_try_alone) == [True, True]


def consolidated(rank: int, to: int) -> list[Any]:
    """What Lightning does, and what each rank would have had."""
    params = weights(EVEN)
    optimizer = CASPR(params, **OPTIONS)
    optimizer.consolidate_state_dict(to)  # there is nothing yet
    train(params, range(5), optimizer)
    whole = optimizer.state_dict()
    optimizer.consolidate_state_dict(to)
    found: list[Any] = []
    if rank == to:
        found += [same(optimizer.state_dict(), whole), same(whole, optimizer.state_dict())]
    else:
        assert all(not is_factor(k) for s in optimizer._gathered[1].values() for k in s)
        with pytest.raises(RuntimeError, match=f"gathered the state on rank {to}: call state_dict"):
            optimizer.state_dict()
    train(params, range(5, 6), optimizer)
    again = optimizer.state_dict()  # of all ranks again
    return [*found, not same(again, whole), same(again, optimizer.state_dict())]


@pytest.mark.parametrize("to", [0, 1])
def test_the_state_can_be_gathered_on_one_rank_alone(two: Ranks, to: int) -> None:
    results = two(consolidated, to)
    assert results[to] == [True] * 4
    assert results[1 - to] == [True] * 2


def loaded_sizes(rank: int, path: str) -> tuple[int, int]:
    """Bytes of the factors that torch was given to move, and of those that are there."""
    saved = torch.load(path, weights_only=True)["optimizer"]
    optimizer, moved = CASPR(weights(EVEN), **OPTIONS), 0
    was = torch.optim.Optimizer._process_value_according_to_param_policy

    def seen(p: Any, value: Tensor, number: int, groups: Any, key: str) -> Tensor:
        nonlocal moved
        moved += value.nbytes * is_factor(key)
        return was(p, value, number, groups, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "_process_value_according_to_param_policy", staticmethod(seen))
        optimizer.load_state_dict(saved)
    return moved, factor_bytes(optimizer)


def test_a_loaded_state_is_cut_before_it_is_moved(ranks: Ranks, tmp_path: Path) -> None:
    """To a GPU, which may have no room for the whole of it."""
    path = str(tmp_path / "one.pt")
    alone(save, 5, path)
    whole = sum(
        x.nbytes
        for state in torch.load(path, weights_only=True)["optimizer"]["state"].values()
        for name, x in state.items()
        if is_factor(name)
    )
    sizes = ranks(loaded_sizes, path)
    assert [moved for moved, _ in sizes] == [0] * ranks.world
    assert sum(kept for _, kept in sizes) == whole
    assert max(kept for _, kept in sizes) < whole


def test_what_ranks_tell_each_other_goes_by_the_device_of_their_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user of NCCL may not have set the current one, which then is the first GPU on all ranks."""
    calls: list[Any] = []

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        calls.append(device)
        yield

    monkeypatch.setattr("torch.cuda.device", current)
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda into, mine, group: calls.append(mine))
    team = cast(Any, SimpleNamespace(size=1, group=None))
    shard.gathered("a", torch.device("cuda", 3), team)
    shard.gathered("b", torch.device("cpu"), team)
    assert calls == [torch.device("cuda", 3), "a", "b"]


def with_torchs_checkpoints(rank: int, path: str, steps: int, load: bool, parts: bool, layers: int = 2) -> list[Tensor]:
    """torch.distributed.checkpoint, which writes and reads in parallel and by parameter name."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))[:layers]
    optimizer = CASPR(model.parameters(), **OPTIONS)
    optimizer.sharded_state = parts
    if load:
        weights_now, state_now = get_state_dict(model, optimizer)
        dcp.load({"model": weights_now, "optimizer": state_now}, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=weights_now, optim_state_dict=state_now)
    train(list(model.parameters()), range(steps, steps + 4), optimizer)
    if not load:
        weights_now, state_now = get_state_dict(model, optimizer)
        dcp.save({"model": weights_now, "optimizer": state_now}, checkpoint_id=path)
        train(list(model.parameters()), range(steps + 4, steps + 8), optimizer)
    return values(list(model.parameters()))


@pytest.mark.parametrize("parts", [False, True])
def test_torchs_distributed_checkpoints(ranks: Ranks, two: Ranks, parts: bool, tmp_path: Path) -> None:
    """Whole ones and those of parts are the same, and load into both, at any number of ranks."""
    expected = ranks(with_torchs_checkpoints, str(tmp_path), 0, False, parts)[0]
    for again, as_parts in itertools.product({ranks, two}, (False, True)):
        for found in again(with_torchs_checkpoints, str(tmp_path), 4, True, as_parts):
            assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, alone(with_torchs_checkpoints, str(tmp_path), 4, True, True), expected))


def test_a_rank_that_owns_nothing_loads_its_part(two: Ranks, tmp_path: Path) -> None:
    """One block for two ranks: both have to know who owns it, or their next steps do not fit each other."""
    expected = two(with_torchs_checkpoints, str(tmp_path), 0, False, True, 1)[0]
    for found in two(with_torchs_checkpoints, str(tmp_path), 4, True, True, 1):
        assert all(map(torch.equal, found, expected))


def other_blocks(rank: int) -> list[Tensor]:
    """A whole state of smaller blocks is loaded where parts are saved, after some steps with larger ones."""
    params = weights([(64, 64), (64, 32)], torch.float32)
    smaller = train(params, range(4), block_size=32)
    kept, start = copy.deepcopy(smaller.state_dict()), values(params)
    train(params, range(4, 8), smaller)
    expected = values(params)
    again = weights([(64, 64), (64, 32)], torch.float32)
    optimizer = train(again, range(4))
    optimizer.sharded_state = True
    optimizer.load_state_dict(kept)
    with torch.no_grad():
        torch._foreach_copy_(again, start)
    train(again, range(4, 8), optimizer)
    assert all(map(torch.equal, again, expected))
    return expected


def test_a_whole_state_of_other_blocks_loads_where_parts_are_saved(two: Ranks) -> None:
    one, other = two(other_blocks)
    assert all(map(torch.equal, one, other))


def parts_of_a_rank(rank: int) -> tuple[int, int]:
    """Bytes of factors in the state_dict and in the state. Each rank asks for its own when the other has gone on."""
    params, store = weights(EVEN), dist.distributed_c10d._get_default_store()
    optimizer = train(params, range(5))
    optimizer.sharded_state, optimizer.timeout = True, 0
    if rank == 1:
        store.wait(["the first has saved"])
    content = optimizer.state_dict()
    store.set("the first has saved", "")
    own = {x.data_ptr() for state in optimizer.state.values() for name, x in state.items() if is_factor(name)}
    found = [x for state in content["state"].values() for name, x in state.items() if is_factor(name)]
    assert {x.data_ptr() for x in found} == own  # no copies
    with pytest.raises(RuntimeError, match="this rank's part alone: save it with"):
        saved(copy.deepcopy(content))
    return sum(x.nbytes for x in found), factor_bytes(optimizer)


def test_a_state_of_parts_takes_no_memory_and_no_other_rank(two: Ranks) -> None:
    sizes = two(parts_of_a_rank)
    assert all(given == kept for given, kept in sizes)
    assert sum(given for given, _ in sizes) == factor_bytes(train(weights(EVEN), range(5)))


def parts_that_do_not_fit(rank: int) -> list[str]:
    params, others = weights(EVEN), weights(EVEN)
    optimizer, other = train(params, range(3)), train(others, range(3), group_size=1)
    optimizer.sharded_state = True
    before, messages = values(others), []
    for attempt in (lambda: other.load_state_dict(optimizer.state_dict()), optimizer.state_dict):
        with pytest.MonkeyPatch.context() as patch:
            if attempt == optimizer.state_dict:
                patch.delattr("torch.distributed.checkpoint.CheckpointableTensor")
            try:
                attempt()
            except (RuntimeError, ValueError) as error:
                messages.append(str(error))
    train(others, range(3, 4), other)
    assert not any(map(torch.equal, before, others))  # it can go on
    return messages


def test_parts_of_other_blocks_and_an_old_torch_are_refused(two: Ranks) -> None:
    for other_blocks, old in two(parts_that_do_not_fit):
        assert "is a part, of other blocks than this rank owns: load into what this optimizer's own" in other_blocks
        assert old == f"sharded_state needs torch 2.14 or newer, and this is {torch.__version__}"


def different_weights(rank: int, shared: str) -> str:
    p = nn.Parameter(torch.full((4, 4), float(rank)))
    p.grad = torch.ones(4, 4)
    optimizer = CASPR([p], shard=shared, start_step=1)
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    optimizer.state_dict()
    return f"{factor_bytes(optimizer)}"


def test_ranks_with_models_of_their_own_are_refused_or_left_alone(two: Ranks) -> None:
    first, second = two(different_weights, "auto")
    assert first == second
    assert "parameters of rank 1 are not those of rank 0" in first
    assert 'shard="none"' in first
    own = two(different_weights, "none")
    assert own[0] == own[1] == alone(different_weights, "none")


def thawed(rank: int, count: int, parts: bool) -> list[Tensor]:
    """Layers that are thawed later: frozen ones have no gradient, and a group is added. Owners are then others than
    those of a new optimizer."""
    params = weights(EVEN)
    optimizer = CASPR(params[:count], **OPTIONS)
    optimizer.sharded_state = parts
    for step in range(8):
        if step == 3:
            optimizer.add_param_group({"params": params[count:]})
        advance(params, optimizer, [step], {s: {1} for s in range(5)})
    optimizer.load_state_dict(optimizer.state_dict())
    train(params, range(8, 10), optimizer)
    return values(params)


@pytest.mark.parametrize("parts", [False, True])
def test_layers_that_are_thawed_later(ranks: Ranks, parts: bool) -> None:
    expected = alone(thawed, 3, False)
    for found in ranks(thawed, 3, parts):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


class Gated(nn.Module):
    """A layer that some batches do not use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.frozen = nn.Parameter(torch.ones(16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x) * self.frozen
        if x[0, 0] > 0:
            hidden = self.second(hidden.tanh())
        result: Tensor = self.last(hidden)
        return result


def data_parallel(rank: int, accumulate: int) -> list[Tensor]:
    """A global batch of 8, split over ranks and, with ``accumulate``, over backward passes."""
    from torch.distributed import get_world_size, is_initialized
    from torch.nn.parallel import DistributedDataParallel

    model: nn.Module = Gated().double()
    params = [p for p in model.parameters() if p.requires_grad]
    world = get_world_size() if is_initialized() else 1
    if world > 1:
        model = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = CASPR(params, **OPTIONS)
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 8, generator=generator, dtype=torch.float64)
        x[:, 0] = x[:, 0].abs() * (1 if step % 3 else -1)  # all ranks without the layer at some steps
        if step == 4:
            x[:4, 0] *= -1  # the first half of the ranks alone
        part = x.chunk(world)[rank].chunk(accumulate)
        for i, piece in enumerate(part):
            sync = i == len(part) - 1 or world == 1
            with nullcontext() if sync else model.no_sync():  # type: ignore[operator]
                (model(piece).square().mean() / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(params)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_data_parallel_training_is_the_same_whatever_the_number_of_ranks(ranks: Ranks, accumulate: int) -> None:
    expected = alone(data_parallel, 4)
    for found in ranks(data_parallel, accumulate):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=60),
    st.integers(1, 8),
    st.integers(1, 10),
)
def test_no_rank_has_much_more_to_do(shapes: list[tuple[int, int]], ranks: int, interval: int) -> None:
    """In no step, refresh included, more than the mean and the largest block together."""
    loads = Loads(ranks)
    turns = [(0, i % interval) for i in range(len(shapes))]
    blocks = list(zip(shapes, shapes, turns, strict=True))
    owners = loads.assign(blocks)
    assert Loads(ranks).assign(blocks) == owners
    assert set(owners) <= set(range(ranks))
    always = [0.0] * ranks
    for (m, n), owner in zip(shapes, owners, strict=True):
        always[owner] += 6 * m * n * (m + n)
    assert always == loads.always
    if interval == 1:
        steps = [sum(pair) for pair in zip(always, loads.roots[0, 0], strict=True)]
        largest = max(6 * m * n * (m + n) + EIGH_FLOPS * (m**3 + n**3) for m, n in shapes)
        assert max(steps) <= sum(steps) / ranks + largest


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(1, 10))
def test_ranks_beyond_a_node_receive_little_more_than_the_updates(kinds: list[int], layers: int) -> None:
    """Where groups of eight allow it; that of one bucket is what one rank sends, times the ranks."""
    shapes = [(256 * kind, 512) for kind in kinds] * layers
    blocks: list[Block] = [(shape, shape, (0, i % 10)) for i, shape in enumerate(shapes)]
    sizes = [4 * m * n for m, n in shapes]
    n = group_size(blocks, sizes, 1024)
    assert 8 <= n <= 64
    taken = sum(received(sizes, deal(blocks, sizes, Loads(n)), n))
    assert sum(sizes) <= taken
    assert n == 8 or taken <= PADDED * sum(sizes)
    assert group_size(blocks, sizes, 6) == 6


def in_groups(rank: int, how: str, size: int | None) -> tuple[list[Tensor], int]:
    """Two groups, or two stages of a pipeline with models of their own."""
    from torch.distributed.device_mesh import init_device_mesh

    shapes, process_group, half = EVEN, None, dist.get_world_size() // 2
    if how == "stages":
        shapes = EVEN[:3] if rank < half else EVEN[3:]
        process_group = init_device_mesh("cpu", (2, half))
    params = weights(shapes)
    optimizer = CASPR(params, **OPTIONS, process_group=process_group, group_size=size)
    train(params, range(4), optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    params_, optimizer_ = copy.deepcopy([params, optimizer])
    train(params_, range(4, 7), optimizer_)
    assert optimizer_.repeats == (how == "groups" and size == 2 and rank >= 2)
    return values(params_), factor_bytes(optimizer_)


@pytest.mark.parametrize(("how", "size"), [("groups", 2), ("groups", 1), ("stages", None)])
def test_groups_of_ranks_do_the_same_work_beside_each_other(ranks: Ranks, how: str, size: int | None) -> None:
    whole = factor_bytes(train(weights(EVEN), range(7)))
    for rank, (found, kept) in enumerate(ranks(in_groups, how, size)):
        shapes = EVEN if how == "groups" else EVEN[:3] if rank < ranks.world // 2 else EVEN[3:]
        assert all(map(torch.equal, found, alone(weights_after, 7, torch.float32, {}, shapes)))
        if how == "groups":
            assert kept == whole if size == 1 else 0.2 * whole < kept < 0.8 * whole


def refused_groups(rank: int) -> list[str]:
    messages = []
    for options in ({"group_size": 3}, {"group_size": 0}):
        try:
            train(weights(EVEN[:1]), range(3), **options)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_groups_that_cannot_be(two: Ranks) -> None:
    messages = [
        "group_size=3 does not divide the 2 ranks that have the same parameters",
        "group_size should be a positive integer or None but is: 0",
    ]
    assert two(refused_groups) == [messages] * 2


def diagnosed(rank: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    optimizer = train(weights(EVEN), range(4))
    return diagnose(optimizer), counters(optimizer)


def test_diagnostics_are_of_the_blocks_of_a_rank(ranks: Ranks) -> None:
    whole, _ = alone(diagnosed)
    parts = ranks(diagnosed)
    for name in ("condition", "damping_share", "residual"):
        together = torch.cat([found[name] for found, _ in parts if name in found])
        torch.testing.assert_close(together.sort().values, whole[name].sort().values)
