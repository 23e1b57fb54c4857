"""Groups that change while ranks share the work: taken out, switched on late, left to each rank, or copied."""

import copy
from typing import Any

import pytest
import torch
from dividing import EVEN, OPTIONS, train, values
from ranks import Ranks, alone
from stepping import advance, loaded, weights
from torch import Tensor, nn

from caspr_cli.optim import CASPR

SHAPES = EVEN[:4]


def in_groups(params: list[nn.Parameter], **second: Any) -> CASPR:
    return CASPR([{"params": params[:2]}, {"params": params[2:], **second}], **OPTIONS)


def taken_out(rank: int, what: str) -> list[int]:
    """Return how many parameters are in the state, whole and in parts."""
    params = weights(SHAPES)
    optimizer = in_groups(params)
    advance(params, optimizer, range(4))
    gone = optimizer.param_groups.pop()["params"] if what == "group" else [optimizer.param_groups[1]["params"].pop()]
    for p in gone:  # torch's state_dict asks for it
        del optimizer.state[p]
    advance(params, optimizer, range(4, 6))
    whole = optimizer.state_dict()
    loaded(copy.deepcopy(optimizer), whole)
    optimizer.sharded_state = True
    return [len(whole["state"]), len(optimizer.state_dict()["state"])]


@pytest.mark.parametrize("what", ["group", "parameter"])
def test_a_state_is_saved_after_some_were_taken_out(two: Ranks, what: str) -> None:
    left = 2 if what == "group" else 3
    assert two(taken_out, what) == [[left, left]] * 2


def on_after_loading(rank: int) -> list[Tensor]:
    """A group is off when the state is saved, and its factors are whole in it."""
    params = weights(SHAPES)
    optimizer = in_groups(params)
    advance(params, optimizer, range(5))
    optimizer.param_groups[1]["precondition"] = False
    advance(params, optimizer, range(5, 7))
    optimizer = loaded(in_groups(params), optimizer.state_dict())
    advance(params, optimizer, range(7, 8))
    optimizer.param_groups[1]["precondition"] = "momentum"
    advance(params, optimizer, range(8, 11))
    loaded(in_groups(params), optimizer.state_dict())
    return values(params)


def test_a_group_may_be_switched_on_after_loading(two: Ranks) -> None:
    expected = alone(on_after_loading)
    for found in two(on_after_loading):
        assert all(map(torch.equal, found, expected))


def shared_late(rank: int) -> list[Tensor]:
    params = weights(SHAPES)
    optimizer = in_groups(params, shard="none")
    advance(params, optimizer, range(5))
    optimizer.param_groups[1]["shard"] = "auto"
    advance(params, optimizer, range(5, 9))
    return values(params)


def test_ranks_may_begin_to_share_the_work_on_a_group(two: Ranks) -> None:
    expected = alone(shared_late)
    for found in two(shared_late):
        assert all(map(torch.equal, found, expected))


def left_alone_late(rank: int) -> str:
    params = weights(SHAPES)
    optimizer = train(params, range(3))
    optimizer.param_groups[0]["shard"] = "none"
    before = values(params)
    with pytest.raises(ValueError, match="since its first step") as refused:
        advance(params, optimizer, [3])
    assert all(map(torch.equal, before, params))
    return str(refused.value)


def test_what_ranks_share_stays_shared(two: Ranks) -> None:
    first, second = two(left_alone_late)
    assert first == second
    assert first.startswith('shard="none" of a parameter of shape (32, 64)')


def test_a_copy_saves_as_the_optimizer_does() -> None:
    optimizer = CASPR(weights(SHAPES[:1]))
    optimizer.sharded_state, optimizer.timeout = True, 7
    other = copy.deepcopy(optimizer)
    assert (other.sharded_state, other.timeout) == (True, 7)
