"""What a step asks of a GPU: no answer. (One that is not there; what its masks compute is tested on the CPU.)"""

import math
import warnings
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from benchmarks.launches import measured, on_the_gpu
from fake_gpu import FakeGPU, fake_gpu
from fake_ranks import Sent, many
from pairs import pairs
from stepping import noise, weights
from torch import Tensor, nn

from caspr_cli.optim import CASPR, Shampoo, engine, roots, statistics, step
from caspr_cli.optim.state import COUNTERS

SHAPES: list[tuple[int, ...]] = [(64, 48)] * 2 + [(20, 2, 3)]
OPTIONS: dict[str, Any] = {"interval": 2, "start_step": 2}
LOW: dict[str, Any] = {"apply_dtype": torch.bfloat16, "root_dtype": torch.bfloat16, "pack_roots": True}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nesterov": {"nesterov": True, "weight_decay": 0.1, "block_size": 32},
    "polar": {"polar": True, "graft": "rms", "weight_decay": 0.1, **LOW},
    "gradient": {"precondition": "gradient", "nesterov": True, "weight_decay": 0.1},
    "eigenbasis": {"measured": 1.0, "graft": "none"},
}
# Launches of a step, with two steps of each iteration.
MOST = {"plain": 600, "nesterov": 715, "polar": 665, "gradient": 715, "eigenbasis": 715}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few steps of an iteration that asks the same in each."""
    monkeypatch.setattr(roots, "NEWTON_STEPS", 2)
    monkeypatch.setattr(roots, "POWER_STEPS", 2)
    roots.scaled_steps.cache_clear()
    yield
    roots.scaled_steps.cache_clear()


def made(cls: type = CASPR, shapes: list[tuple[int, ...]] = SHAPES, **options: Any) -> Any:
    rest = {"params": on_the_gpu([(100, 48), (48,)]), "precondition": False}
    return cls([{"params": on_the_gpu(shapes)}, rest], **OPTIONS | options)


def waits(gpu: FakeGPU, optimizer: Any, count: int) -> list[dict[str, int]]:
    found = []
    for _ in range(count):
        gpu.reset()
        optimizer.step()
        found.append(dict(gpu.waits))
    return found


def captured(gpu: FakeGPU, optimizer: Any, count: int) -> list[list[Any]]:
    """Return what each of so many steps would leave in a CUDA graph; there may be no wait and no copy to the host."""
    gpu.capturing = True
    found = []
    for _ in range(count):
        gpu.reset()
        optimizer.step()
        assert not gpu.waits
        found.append(gpu.calls)
    gpu.capturing = False
    return found


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("cls", "way"),
    [(Shampoo, "polar"), (CASPR, "plain"), (CASPR, "nesterov"), (CASPR, "gradient"), (CASPR, "eigenbasis")],
)
def test_no_step_waits_for_the_device_and_a_graph_of_each_turn_can_be_repeated(cls: type, way: str) -> None:
    """Nor does one that computes roots wait; but for the first, and the first roots. And each step of an interval asks
    what that of the next interval does: the same operations, with the same numbers, on the same memory."""
    with fake_gpu() as gpu:
        optimizer = made(cls, **WAYS[way], lr=torch.ones((), device="cuda"))
        assert waits(gpu, optimizer, 4)[2:] == [{}] * 2
        assert all(stack.rooted for stack in optimizer.stacks(0))
        first, second = captured(gpu, optimizer, 2), captured(gpu, optimizer, 2)
        assert first == second
        assert first[0] != first[1]  # other blocks have their turn
        assert gpu.launches <= MOST[way]


@pytest.mark.usefixtures("quick")
def test_on_several_ranks_a_graph_of_each_turn_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same collectives, on the same memory. (What waits for NCCL is a stream, and not the host.)"""
    monkeypatch.setattr("caspr_cli.optim.dealing.BUCKET", 1)  # a block of each rank
    with many(2), fake_gpu() as gpu:

        def gather(received: Tensor, sent: Tensor, **options: Any) -> Sent:
            gpu.note("all_gather", received, sent)
            return Sent()

        monkeypatch.setattr("caspr_cli.optim.shard.all_gather", gather)
        optimizer = made(shapes=[(64, 48)] * 5, lr=torch.ones((), device="cuda"))
        assert waits(gpu, optimizer, 4)[2:] == [{}] * 2
        first, second = captured(gpu, optimizer, 2), captured(gpu, optimizer, 2)
        assert first == second
        assert first[0] != first[1]
        assert [name for name, _ in first[0]].count("all_gather") == 3
        assert optimizer.ranks == 2


def divided(shape: tuple[int, ...], mesh: Any) -> nn.Parameter:
    """Return a parameter of which each of two ranks has half the rows, as `fully_shard` makes it."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(torch.Size(shape), torch.empty(shape, device="meta").stride(), torch.float32)
    spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=meta)

    def rows() -> Tensor:  # not from_local(), which would move them to the mesh
        here = torch.empty(shape[0] // 2, *shape[1:], device="cuda")
        return cast(Any, DTensor)(here, spec, requires_grad=False)

    p = nn.Parameter(rows())
    p.grad = rows()
    return p


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("way", ["plain", "gradient"])
def test_no_step_waits_where_rows_are_divided(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `fully_shard`, on the first of two ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    with many(2):
        mesh = init_device_mesh("cpu", (2,))
        with fake_gpu() as gpu:
            for name in ("all_reduce", "all_to_all_single"):
                monkeypatch.setattr(
                    torch.distributed, name, lambda *args, name=name, **_: gpu.note(name, *args) or Sent()
                )
            params = [divided(shape, mesh) for shape in [(64, 48)] * 3 + [(20, 2, 3)]]
            rest = {"params": [divided((100, 48), mesh), divided((48,), mesh)], "precondition": False}
            optimizer = CASPR(cast(Any, [{"params": params}, rest]), **OPTIONS | WAYS[way])
            assert waits(gpu, optimizer, 4)[2:] == [{}] * 2
            assert optimizer.ranks == 2
            first, second = captured(gpu, optimizer, 2), captured(gpu, optimizer, 2)
            assert first == second
            assert {"all_reduce", "all_to_all_single"} < {name for name, _ in first[0]}


@pytest.mark.usefixtures("quick")
def test_a_graph_that_would_keep_an_old_number_is_found() -> None:
    with fake_gpu() as gpu:
        optimizer = made(lr=0.1, interval=1)
        waits(gpu, optimizer, 3)
        first = captured(gpu, optimizer, 1)
        optimizer.param_groups[0]["lr"] = 0.2
        assert captured(gpu, optimizer, 1) != first


@pytest.mark.usefixtures("quick")
def test_a_wait_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = statistics.accumulate

    def asking(*args: Any, **options: Any) -> None:
        float(args[2][0])
        whole(*args, **options)

    monkeypatch.setattr(step, "accumulate", asking)
    with fake_gpu() as gpu:
        found = waits(gpu, made(), 3)[-1]
    assert len(found) == 1
    assert next(iter(found)).startswith("_local_scalar_dense @ test_on_a_gpu.py:")


@pytest.mark.usefixtures("quick")
def test_batches_do_not_follow_the_threads_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for threads in (1, 96):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        with fake_gpu() as gpu:
            optimizer = made(shapes=[(1024, 1024)] * 17, start_step=1)
            gpu.reset()
            optimizer.step()
            found.append((gpu.launches, gpu.peak))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("who", "first", "most", "gflop"),
    [("caspr", 1500, 1350, 1900), ("default", 1350, 1350, 3750), ("eight", 1100, 1100, 250)],
)
def test_few_launches_for_gpt2_small(who: str, first: int, most: int, gflop: float) -> None:
    """On one rank, and on the first of eight: averages over an interval, as published."""
    found = measured(who)
    assert found["launches"] <= most
    assert found["first interval"] <= first
    assert found["most"] <= 1.1 * first
    assert found["waits"] == 0
    assert found["GFLOP"] <= gflop


# ---- what masks compute

GRID: dict[str, list[Any]] = {
    "graft": ["adam", "rmsprop", "sgd", "none", "rms"],
    "precondition": ["momentum", "gradient"],
    "nesterov": [False, True],
    "block_size": [1024, 12],
    "weight_decay": [0.0, 0.1],
    "polar": [False, True],
    "dtype": [torch.float64, torch.float32],
    "statistics": ["ema", "accumulate"],
}
BROKEN = {(0, 0), (3, 1), (6, 0), (9, 2), (10, 2), (14, 5), (15, 4)}  # (step, parameter)


def trained(options: dict[str, Any]) -> tuple[list[nn.Parameter], Any, list[str]]:
    options = dict(options)
    params = weights([(24, 16), (24, 16), (16, 4, 3), (7,), (20, 12), (9, 30)], options.pop("dtype"))
    groups = [{"params": params[:4]}, {"params": params[4:], "precondition": False}]
    optimizer = CASPR(cast(Any, groups), lr=0.01, interval=1, start_step=3, **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step_number in range(18):
            for i, p in enumerate(params):
                p.grad = noise(step_number, i, p)
                if (step_number, i) in BROKEN:
                    p.grad.view(-1)[i] = math.nan if i % 2 else math.inf
            optimizer.step()
    return params, optimizer, [str(w.message) for w in told]


@pytest.mark.parametrize("options", pairs(GRID), ids=str)
def test_masks_leave_out_what_the_host_leaves_out(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, first, told = trained(options)
    monkeypatch.setattr(engine, "is_masked", lambda params: True)
    masked, second, told_later = trained(options)
    tolerance = 1e-9 if options["dtype"] == torch.float64 else 2e-5
    for p, q in zip(plain, masked, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        for name in COUNTERS:
            assert float(first.state[p].get(name, 0)) == float(second.state[q].get(name, 0)), name
    assert told_later == told  # the last was broken two steps before the end
    assert any("parameter 5 of shape (9, 30)" in line for line in told)
