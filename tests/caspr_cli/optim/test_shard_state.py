"""The state of ranks that share the work: whole checkpoints, those of parts, and what each rank keeps."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dividing import EVEN, OPTIONS, factor_bytes, train, values, weights_after
from ranks import Ranks, alone
from stepping import loaded, saved, weights
from torch import Tensor, nn

from caspr_cli.optim import CASPR
from caspr_cli.optim.stacks import is_factor


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
    """A GPU may have too little memory for the whole of it."""
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
