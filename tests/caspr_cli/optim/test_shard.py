"""Several ranks share the work: the same weights, and a part of the factors each."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from dividing import EVEN, OPTIONS, factor_bytes, train, values, weights_after
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks, alone
from stepping import advance, noise, weights
from torch import Tensor, nn

from caspr_cli.optim import CASPR, Shampoo, plan, scatter, shard
from caspr_cli.optim.dealing import PADDED, Block, Loads, deal, group_size, received
from caspr_cli.optim.probe import counters, diagnose
from caspr_cli.optim.schedule import EIGH_FLOPS

# All options are in the rows of test_contract; these are one of each kind of arithmetic.
CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "defaults": (torch.float32, {}),
    "shampoo": (torch.float32, {"cls": Shampoo, "graft": "rmsprop", "precondition": "gradient"}),
    "newton": (torch.float32, {"solver": "newton", "merge": "none"}),
    "one side": (torch.float32, {"axes": "last"}),
    "each row": (torch.float32, {"axes": "row", "block_size": 32}),
    "bfloat16": (torch.bfloat16, {"root_dtype": torch.bfloat16, "pack_roots": True, "gather_dtype": torch.float32}),
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
