"""Parameters of `fully_shard`: the same weights as one process, a part of the state each, and torch's checkpoints."""

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pairs import pairs
from ranks import Ranks, alone
from torch import Tensor, nn

from caspr_cli.optim import CASPR, FullAdagrad, Shampoo, engine
from caspr_cli.optim.blocks import Layout
from caspr_cli.optim.fsdp import block_shards, shard_rows
from caspr_cli.optim.probe import counters
from caspr_cli.optim.stacks import is_factor
from caspr_cli.optim.state import COUNTERS

OPTIONS: dict[str, Any] = {"lr": 0.01, "interval": 3, "start_step": 2, "block_size": 32, "weight_decay": 0.1}
# Matrices of several blocks that shards cut, uneven shards, and some without a row.
SHAPES = [(70, 33), (24, 16), (33, 70), (1, 40, 30), (3, 5, 7), (6, 4, 9), (2, 40), (1, 9), (9,), (24, 16)]
SQUARES = [(64, 64), (160, 160), (128, 128), (64, 64)]
Without = dict[int, set[int]]


def divided(tensor: Tensor, how: str, number: int) -> Tensor:
    """``plain``; by ``rows`` over all ranks; ``replicas`` of two ranks each; ``some``: every third is not divided."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if how == "plain" or (how == "some" and number % 3 == 0):
        return tensor
    placements = [Replicate(), Shard(0)] if how == "replicas" else [Shard(0)]
    return distribute_tensor(tensor, mesh(how, dist.group.WORLD), placements)


@functools.lru_cache(maxsize=1)
def mesh(how: str, group: Any) -> Any:
    """Of the ranks of this process group, which it is remembered for."""
    from torch.distributed.device_mesh import init_device_mesh

    ranks = group.size()
    return init_device_mesh("cpu", (ranks // 2, 2) if how == "replicas" else (ranks,))


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def weights(how: str, dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [nn.Parameter(divided(tensor, how, i)) for i, tensor in enumerate(tensors)]


def gradients(params: list[nn.Parameter], step: int, how: str, signs: bool, without: Without, broken: Without) -> None:
    """Signs have norms that are exact in any order; ``broken`` ones have a NaN in their last row."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        G = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if i in broken.get(step, ()):
            G.view(-1)[-1] = torch.nan
        p.grad = None if i in without.get(step, ()) else divided((G.sign() if signs else G).to(p.dtype), how, i)


def train(
    params: list[nn.Parameter],
    steps: range,
    how: str,
    optimizer: Any = None,
    cls: type = CASPR,
    signs: bool = False,
    without: Without | None = None,
    broken: Without | None = None,
    **options: Any,
) -> Any:
    optimizer = optimizer or cls(params, **OPTIONS | options)
    for step in steps:
        gradients(params, step, how, signs, without or {}, broken or {})
        optimizer.step()
    return optimizer


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


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64, width: int = 33) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = ((24, 70), (70, width), (width, width), (width, 2))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in sizes)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x).tanh() if i < 2 or x[0, 0] > -1 else x
        return x


def sharded(model: Net, **options: Any) -> Net:
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fit(model: nn.Module, optimizer: Any, steps: range, part: tuple[int, int] | None = None) -> list[Tensor]:
    """Train; ``part``: which of how many parts of a batch this rank has, if not as many as there are ranks."""
    there = dist.is_initialized()
    rank, world = part or ((dist.get_rank(), dist.get_world_size()) if there else (0, 1))
    dtype = next(model.parameters()).dtype
    for step in steps:
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step), dtype=dtype)
        model(x.chunk(world)[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [whole(p) for p in model.parameters()]


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
    return fit(model, optimizer, range(4, 7), part), full_state(optimizer)


def in_one_process(rank: int, width: int) -> tuple[list[Tensor], Any]:
    model = Net(width=width)
    optimizer = CASPR(model.parameters(), **OPTIONS)
    return fit(model, optimizer, range(7)), full_state(optimizer)


@pytest.mark.parametrize("how", ["replicas", "stages"])
def test_fully_shard_on_a_mesh_of_two_axes(ranks: Ranks, how: str) -> None:
    found = ranks(on_a_mesh, how, 40)
    for rank, (weights, state) in enumerate(found):
        width = 40 if how == "stages" and rank >= len(found) // 2 else 33
        expected, whole_state = alone(in_one_process, width)
        torch.testing.assert_close(weights, expected, rtol=1e-8, atol=1e-10)
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


def state_bytes(rank: int, how: str, shapes: list[tuple[int, ...]]) -> tuple[int, int]:
    """Of factors and of moments, on this rank."""
    optimizer = train(weights(how, torch.float32, shapes), range(2), how)
    sizes = {True: 0, False: 0}
    for state in optimizer.state.values():
        for name, x in state.items():
            if name not in COUNTERS:
                here = x.to_local() if hasattr(x, "to_local") else x
                sizes[is_factor(name)] += here.numel() * here.element_size()
    return sizes[True], sizes[False]


def test_each_rank_keeps_its_part_of_the_state(ranks: Ranks) -> None:
    shapes = [(64, 64)] * 4
    factors, moments = alone(state_bytes, "plain", shapes)
    assert ranks(state_bytes, "rows", shapes) == [(factors // ranks.world, moments // ranks.world)] * ranks.world


def through_torch(rank: int, path: str, load: bool, kind: str, how: str) -> list[Tensor]:
    """torch.distributed.checkpoint, of whole factors or, with ``parts``, of those of each rank; ``full``: one file with
    everything in it, as `torch.save` writes it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    model: nn.Module = sharded(Net()) if how == "fsdp" else Net()
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = CASPR(model.parameters(), **OPTIONS)
    optimizer.sharded_state, full = kind == "parts", kind == "full"
    options = StateDictOptions(full_state_dict=full, cpu_offload=kind != "whole")

    def save_or_load(model_state: Any, optimizer_state: Any) -> Any:
        content = {"model": model_state, "optimizer": optimizer_state}
        if full and load:
            return torch.load(f"{path}/full.pt", weights_only=True)
        if full and rank == 0:
            torch.save(content, f"{path}/full.pt")
        elif load:
            dcp.load(content, checkpoint_id=path)
        elif not full:
            dcp.save(content, checkpoint_id=path)
        return content

    if load:
        content = save_or_load(*get_state_dict(model, optimizer, options=options))
        set_state_dict(
            model,
            optimizer,
            model_state_dict=content["model"],
            optim_state_dict=content["optimizer"],
            options=options,
        )
    else:
        fit(model, optimizer, range(4))
        save_or_load(*get_state_dict(model, optimizer, options=options))
    return fit(model, optimizer, range(4, 7))


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("fsdp", "parts"),
        ("ddp", "full"),
        pytest.param("fsdp", "full", marks=pytest.mark.release),
        pytest.param("fsdp", "whole", marks=pytest.mark.release),
        pytest.param("ddp", "whole", marks=pytest.mark.release),
        pytest.param("ddp", "parts", marks=pytest.mark.release),
    ],
)
def test_torchs_checkpoints_load_at_another_number_of_ranks(
    two: Ranks, ranks: Ranks, how: str, kind: str, tmp_path: Path
) -> None:
    expected = ranks(through_torch, str(tmp_path), False, kind, how)[0]
    for again in {two, ranks}:
        for other in ("fsdp", "ddp"):
            for found in again(through_torch, str(tmp_path), True, kind, other):
                torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        alone(through_torch, str(tmp_path), True, kind, "plain"), expected, rtol=1e-8, atol=1e-10
    )


def bare(rank: int, how: str, path: str, load: bool) -> tuple[list[Tensor], bool]:
    """The state_dict itself, with moments made whole by the user; what was loaded is saved again."""
    params = weights(how, torch.float64, SHAPES)
    optimizer = CASPR(params, **OPTIONS)
    same = True
    if load:
        saved = torch.load(path, weights_only=True)
        with torch.no_grad():
            for i, (p, w) in enumerate(zip(params, saved["weights"], strict=True)):
                p.copy_(divided(w, how, i))
        optimizer.load_state_dict(saved["optimizer"])
        again = full_state(optimizer)["state"]
        same = all(torch.equal(x, again[i][k]) for i, s in saved["optimizer"]["state"].items() for k, x in s.items())
    else:
        train(params, range(4), how, optimizer)
        content = {"optimizer": full_state(optimizer), "weights": [whole(p) for p in params]}
        if rank == 0:
            torch.save(content, path)
    train(params, range(4, 7), how, optimizer)
    return [whole(p) for p in params], same


def full_state(optimizer: CASPR) -> dict[str, Any]:
    content = optimizer.state_dict()
    state = {i: {name: whole(x) for name, x in entries.items()} for i, entries in content["state"].items()}
    return content | {"state": state}


@pytest.mark.parametrize("source", ["ranks", "one"])
def test_a_bare_state_dict_loads_anywhere(two: Ranks, ranks: Ranks, source: str, tmp_path: Path) -> None:
    path = str(tmp_path / "state.pt")
    if source == "ranks":
        expected = ranks(bare, "rows", path, False)[0][0]
    else:
        expected, _ = alone(bare, "plain", path, False)
    for found, same in [
        *two(bare, "rows", path, True),
        *(ranks(bare, "replicas", path, True) if ranks.world == 4 else ()),
        *two(bare, "plain", path, True),
        alone(bare, "plain", path, True),
    ]:
        assert same
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def changed(rank: int, how: str) -> list[Tensor]:
    """AdamW, then preconditioned, with other roots, with another momentum, and its state in another class."""
    params = weights(how, torch.float64, SHAPES)
    optimizer = train(params, range(4), how, precondition=False)
    group = optimizer.param_groups[0]
    changes: list[dict[str, Any]] = [
        {"precondition": "gradient", "start_step": 3},
        {"order": 1},
        {"precondition": "momentum"},
    ]
    for number, change in enumerate(changes):
        group.update(change)
        train(params, range(5 * number + 4, 5 * number + 9), how, optimizer, broken={5: {0}})
    shampoo = Shampoo(params)
    shampoo.load_state_dict(optimizer.state_dict())
    train(params, range(19, 22), how, shampoo)
    warm = CASPR(params)  # without what it has learned of gradients
    warm.load_state_dict(without_factors(shampoo.state_dict()))
    warm.param_groups[0].update(start_step=2)
    params, warm = copy.deepcopy([params, warm])
    train(params, range(22, 26), how, warm)
    return [whole(p) for p in params]


def without_factors(content: dict[str, Any]) -> dict[str, Any]:
    """A state like that of AdamW."""
    moments = ("step", "exp_avg", "exp_avg_sq")
    return content | {"state": {i: {k: s[k] for k in moments} for i, s in content["state"].items()}}


@pytest.mark.parametrize("how", ["plain", "rows"])
def test_changes_on_the_way_are_the_same_on_all_ranks(ranks: Ranks, how: str) -> None:
    expected = alone(changed, "plain")
    for found in ranks(changed, how):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


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
