"""Parameters of `fully_shard`: the same weights as one process."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pairs import pairs
from ranks import Ranks, alone
from rows import OPTIONS, SHAPES, Net, fit, full_state, sharded, train, weights, whole
from torch import Tensor, nn

from caspr_cli.optim import CASPR, FullAdagrad, Shampoo, engine
from caspr_cli.optim.blocks import Layout
from caspr_cli.optim.fsdp import block_shards, shard_rows
from caspr_cli.optim.probe import counters

SQUARES = [(64, 64), (160, 160), (128, 128), (64, 64)]


def weights_after(
    rank: int, how: str, dtype: torch.dtype, shapes: list[tuple[int, ...]], kwargs: dict[str, Any]
) -> tuple[list[Tensor], dict[str, int]]:
    params = weights(how, dtype, shapes)
    optimizer = train(params, range(8), how, **kwargs)
    return [whole(p) for p in params], counters(optimizer)


BARE: dict[str, Any] = {"graft": "none", "betas": (0.0, 0.9), "interval": 1, "start_step": 1}
EXACT: dict[str, dict[str, Any]] = {
    "bare": BARE,
    "shampoo": {"graft": "none", "cls": Shampoo},
    "gradient first": {"graft": "none", "precondition": "gradient", "maximize": True, "start_step": 5},
}


@pytest.mark.parametrize("case", EXACT)
def test_the_weights_are_those_of_one_process_bit_for_bit(ranks: Ranks, case: str) -> None:
    kwargs = EXACT[case] | {"signs": True}
    expected, _ = alone(weights_after, "plain", torch.float64, SQUARES, kwargs)
    for found, _ in ranks(weights_after, "rows", torch.float64, SQUARES, kwargs):
        assert all(map(torch.equal, found, expected))


@pytest.mark.release
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_and_in_lower_types(four: Ranks, dtype: torch.dtype) -> None:
    """Where a quarter of a matrix has a norm that is exact, too."""
    shapes, kwargs = [(64, 64), (128, 128)], {"graft": "none", "signs": True, "gather_dtype": torch.float32}
    expected, _ = alone(weights_after, "plain", dtype, shapes, kwargs)
    for found, _ in four(weights_after, "rows", dtype, shapes, kwargs):
        assert all(map(torch.equal, found, expected))
        assert all(w.dtype == dtype for w in found)


CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rmsprop": {"lr": 1e-3, "graft": "rmsprop", "merge": "square"},
    "sgd": {"graft": "sgd", "merge": "none", "precondition_1d": True},
    "muon": {"lr": 0.1, "graft": "rms", "polar": True, "exponent": 0, "nesterov": True},
    "rms": {"lr": 0.1, "graft": "rms", "exponent": 0.25, "precondition_1d": True, "block_size": 12},
    "gradient first": {"precondition": "gradient", "nesterov": True},
    "never": {"start_step": 100, "graft": "rmsprop"},
    "flatten": {"cls": FullAdagrad, "block_size": 100},
    "one side": {"axes": "first", "merge": "none", "nesterov": True, "maximize": True},
    "each row": {"axes": "row", "block_size": 16, "precondition_1d": True},
    "members": {"batch_axes": 1},
    "unused": {"without": {1: {0, 3}, 2: {0}, 4: {2}, 5: set(range(9)), 6: set(range(10))}},
    "broken": {"broken": {0: {1}, 3: {0, 4, 8}, 5: {7}}},
    "lower": {"root_dtype": torch.bfloat16, "pack_roots": True, "solver": "newton", "maximize": True},
}


def check(ranks: Ranks, how: str, case: str) -> None:
    """A NaN in one rank's rows makes all leave the tensor out."""
    expected = alone(weights_after, "plain", torch.float64, SHAPES, CASES[case])
    for found, counted in ranks(weights_after, how, torch.float64, SHAPES, CASES[case]):
        torch.testing.assert_close(found, expected[0], rtol=1e-9, atol=1e-11)
        assert counted["skipped_gradients"] == expected[1]["skipped_gradients"]
    assert expected[1]["skipped_gradients"] == (5 if case == "broken" else 0)


@pytest.mark.parametrize("case", CASES)
def test_shapes_and_options(ranks: Ranks, case: str) -> None:
    check(ranks, "rows", case)


@pytest.mark.parametrize("case", ["defaults", "broken"])
def test_some_are_divided_and_some_are_not(two: Ranks, case: str) -> None:
    check(two, "some", case)


@pytest.mark.release
@pytest.mark.parametrize("case", ["defaults", "gradient first", "unused", "broken"])
def test_replicas(four: Ranks, case: str) -> None:
    check(four, "replicas", case)


def in_buckets(rank: int, how: str, case: str, alone: bool) -> tuple[list[Tensor], int]:
    """Whether each parameter, or block, travels alone. Owners are the same, and so is the order of sums."""
    with pytest.MonkeyPatch.context() as patch:
        if alone:
            each = lambda sizes, ranks: (range(i, i + 1) for i in range(len(sizes)))  # noqa: E731
            patch.setattr("caspr_cli.optim.exchange.buckets", each)
        params = weights(how, torch.float32, SQUARES)
        optimizer = train(params, range(8), how, **CASES[case])
    return [whole(p) for p in params], optimizer._exchange.bytes_kept


@pytest.mark.parametrize(("how", "case"), [("some", "broken"), ("rows", "gradient first"), ("rows", "muon")])
def test_the_bits_are_the_same_whatever_the_size_of_a_bucket(ranks: Ranks, how: str, case: str) -> None:
    (expected, most), *_ = ranks(in_buckets, how, case, False)
    for found, kept in ranks(in_buckets, how, case, True):
        assert all(map(torch.equal, found, expected))
        assert kept < most


def weights_by_masks(rank: int, how: str, kwargs: dict[str, Any]) -> tuple[list[Tensor], dict[str, int]]:
    """As on a GPU, where the device alone knows which gradients are finite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "is_masked", lambda params: True)
        return weights_after(rank, how, torch.float64, SHAPES, kwargs)


@pytest.mark.parametrize("case", ["defaults", "sgd", "rms", "muon", "never", "gradient first"])
def test_masks_leave_out_what_the_host_leaves_out(two: Ranks, case: str) -> None:
    kwargs = CASES[case] | {"broken": {0: {1}, 3: {0, 4, 8}, 5: {7}}}
    expected, counted = alone(weights_after, "plain", torch.float64, SHAPES, kwargs)
    for found, theirs in two(weights_by_masks, "some", kwargs):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
        assert theirs["skipped_gradients"] == counted["skipped_gradients"] == 5


def updates_in_bfloat16(rank: int) -> tuple[list[Tensor], int, int]:
    shapes, received = [(64, 64), (128, 96), (33, 70)], []
    for dtype in (None, torch.bfloat16):
        params = weights("rows", torch.float32, shapes)
        optimizer = train(params, range(4), "rows", gather_dtype=dtype)
        received.append(optimizer.bytes_received)
    return [whole(p) for p in params], *received


def test_updates_may_travel_in_bfloat16(two: Ranks) -> None:
    expected, _ = alone(weights_after, "plain", torch.float32, [(64, 64)], {})
    start = weights("plain", torch.float32, [(64, 64)])
    size = 4 * (64 * 64 + 128 * 96 + 33 * 70)
    for found, exact, rounded in two(updates_in_bfloat16):
        assert exact == pytest.approx(size * 3 / 2, rel=0.1)  # gradient, momentum and update, a half of each
        assert rounded == pytest.approx(size * 2.5 / 2, rel=0.1)
        assert torch.dist(found[0], expected[0]) < torch.dist(start[0], expected[0])


def real(rank: int, shard: bool, options: dict[str, Any]) -> list[Tensor]:
    model = sharded(Net()) if shard else Net()
    head = {"params": model.layers[-1].parameters(), "precondition": False}
    optimizer = CASPR([{"params": model.layers[:-1].parameters()}, head], **OPTIONS | options)
    return fit(model, optimizer, range(8))


@pytest.mark.parametrize("options", [{}, {"precondition": "gradient", "start_step": 4}], ids=["momentum", "gradient"])
def test_a_model_of_fully_shard(ranks: Ranks, options: dict[str, Any]) -> None:
    expected = alone(real, False, options)
    for found in ranks(real, True, options):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def on_a_mesh(rank: int, how: str, width: int) -> tuple[list[Tensor], Any]:
    """``replicas``: halves of the ranks have replicas of all rows (HSDP); ``stages``: each half has a model of its own,
    as in pipeline parallelism, the second of this width. The state is saved on the way."""
    from torch.distributed.device_mesh import init_device_mesh

    half = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (2, half), mesh_dim_names=("outer", "inner"))
    if how == "replicas":
        model, part = sharded(Net(), mesh=mesh), None
    else:
        model, part = sharded(Net(width=33 if rank < half else width), mesh=mesh["inner"]), (rank % half, half)
    optimizer = CASPR(model.parameters(), **OPTIONS)
    fit(model, optimizer, range(4), part)
    assert optimizer.repeats == (how == "replicas" and rank >= half)
    return fit(model, optimizer, range(4, 7), part), full_state(optimizer)


def in_one_process(rank: int, width: int) -> tuple[list[Tensor], Any]:
    model = Net(width=width)
    optimizer = CASPR(model.parameters(), **OPTIONS)
    return fit(model, optimizer, range(7)), full_state(optimizer)


@pytest.mark.parametrize("how", ["replicas", "stages"])
def test_fully_shard_on_a_mesh_of_two_axes(ranks: Ranks, how: str) -> None:
    found = ranks(on_a_mesh, how, 40)
    for rank, (trained, state) in enumerate(found):
        width = 40 if how == "stages" and rank >= len(found) // 2 else 33
        expected, whole_state = alone(in_one_process, width)
        torch.testing.assert_close(trained, expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(state["state"], whole_state["state"], rtol=1e-7, atol=1e-9)


def one_rank(rank: int) -> list[Tensor]:
    return real(rank, True, {})


@pytest.mark.release
def test_one_rank_alone() -> None:
    single = Ranks(1)
    try:
        torch.testing.assert_close(single(one_rank)[0], alone(real, False, {}), rtol=1e-8, atol=1e-10)
    finally:
        single.close()


def mixed_precision(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights in float32, forward and backward in bfloat16; beside them an optimizer that gets the same gradients."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(Net(torch.float32), mp_policy=policy)
    options = OPTIONS | {"eps": 1e-3}  # eight samples leave most eigenvalues at zero
    optimizer = CASPR(model.parameters(), **options)
    params = [nn.Parameter(whole(p)) for p in model.parameters()]
    other = CASPR(params, **options, shard="none")
    for step in range(6):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(10 * step + rank))
        model(x).square().mean().backward()
        for p, q in zip(model.parameters(), params, strict=True):
            q.grad = whole(p.grad)  # type: ignore[arg-type]
        optimizer.step()
        other.step()
        optimizer.zero_grad()
    return [whole(p) for p in model.parameters()], [whole(p) for p in params]


def test_mixed_precision(two: Ranks) -> None:
    for found, expected in two(mixed_precision):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def refused(rank: int, how: str) -> str:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    everyone = DeviceMesh("cpu", [0, 1])
    tensor = torch.ones(8, 4)
    if how == "halves of their own":  # five rows and three
        rows = tensor[:5] if rank == 0 else tensor[5:]
        p = nn.Parameter(DTensor.from_local(rows, everyone, [Shard(0)], run_check=False, shape=(8, 4), stride=(4, 1)))
        p.grad = torch.ones_like(p)
        start = p.to_local().clone()
        try:
            CASPR([p], start_step=1).step()
        except ValueError as error:
            assert torch.equal(p.to_local(), start)
            return str(error)
        return ""
    ranks = DeviceMesh("cpu", [0]) if how == "one rank" else everyone
    placements = {"columns": Shard(1), "replicated": Replicate()}.get(how, Shard(0))
    p = nn.Parameter(distribute_tensor(tensor, ranks, [placements]))
    try:
        CASPR([p])
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", ["columns", "replicated", "one rank", "halves of their own"])
def test_other_placements_are_refused(two: Ranks, how: str) -> None:
    messages = two(refused, how)
    if how == "one rank":
        assert messages == ["", "a parameter of shape (8, 4) has nothing on this rank: leave it to its own ranks"]
        return
    assert messages[0] == messages[1]
    if how == "halves of their own":
        assert "parameters of rank 1 are not those of rank 0" in messages[0]
        return
    assert "\n" not in messages[0]
    assert "shape (8, 4)" in messages[0]
    assert "fully_shard divides rows (Shard(0))" in messages[0]
    assert "tensor parallelism that divides columns" in messages[0]
    assert {"columns": "S(1)", "replicated": "R"}[how] in messages[0]


@pytest.mark.parametrize(
    ("shape", "merge", "axes"),
    [tuple(row.values()) for row in pairs({"shape": [(70, 33), (1, 40, 30), (3, 5, 7), (6, 4, 9), (2, 40), (9,)],
                                           "merge": ["matrix", "square", "none", "flatten"], "axes": ["all", "row"]})],
)  # fmt: skip
def test_pieces_cover_each_block_once(shape: tuple[int, ...], merge: str, axes: str) -> None:
    """In a count of every number of a tensor, by its place in the shards of five ranks."""
    layout = Layout.of(shape, merge, 32, axes)
    numbers = torch.arange(torch.Size(shape).numel()).view(layout.shape)
    per_row = layout.shape[0] // shape[0]
    rows = [slice(x.start * per_row, x.stop * per_row) for x in shard_rows(shape[0], 5)]
    flat = torch.arange(numbers.numel()).view(shape)
    for part, mine in zip(shard_rows(shape[0], 5), rows, strict=True):  # as torch cuts it
        assert torch.equal(flat[part].flatten(), numbers[mine].flatten())
    owners = {s: [i % 3 for i in range(len(cuts))] for s, cuts in layout.blocks.items()}
    seen: dict[tuple[int, tuple[int, ...], int], Tensor] = {}
    found = {rank: block_shards(layout, owners, rows, rank) for rank in range(5)}
    by_holder = [piece for rank in found for piece in found[rank] if piece.holder == rank]
    by_owner = [piece for rank in found for piece in found[rank] if piece.owner == rank]
    for holder, owner in itertools.product(range(5), repeat=2):  # both have the same in the same order
        assert [x for x in found[holder] if (x.holder, x.owner) == (holder, owner)] == [
            x for x in found[owner] if (x.holder, x.owner) == (holder, owner)
        ]
    assert len(by_holder) == len(by_owner)
    for piece in by_owner:
        block = seen.setdefault((piece.owner, piece.block, piece.number), torch.full(piece.block, -1))
        assert bool((block[piece.rows] == -1).all())
        block[piece.rows] = numbers[rows[piece.holder]][piece.cut]
        assert block[piece.rows].shape == piece.shape
    for s, blocks in layout.blocks.items():
        counts = dict.fromkeys(range(3), 0)
        for cut, owner in zip(blocks, owners[s], strict=True):
            assert torch.equal(seen[owner, s, counts[owner]], numbers[cut])
            counts[owner] += 1
