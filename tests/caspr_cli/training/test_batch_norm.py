import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from caspr_cli.training.batch_norm import BatchNormOverRanks, measured_anew, statistics, synchronize


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5), nn.BatchNorm1d(5)]
    return nn.Sequential(*layers).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = 100 + torch.randn(8, 3, 5, 5, generator=generator, dtype=torch.float64)  # a mean far from zero
    return x, torch.randint(5, (8,), generator=generator)


def train(model: nn.Module, parts: list[slice], steps: int = 3) -> None:
    """Plain steps on one rank, or under DDP on this rank's part of the batch."""
    x, y = batch()
    rank = dist.get_rank() if dist.is_initialized() else 0
    for _ in range(steps):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[parts[rank]]), y[parts[rank]]).backward()
        for p in model.parameters():
            p.data -= 0.1 * p.grad


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
    model = synchronize(network(), torch.device("cpu"))
    width = 8 // world
    ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    train(ddp, [slice(width * r, width * (r + 1)) for r in range(world)])
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.release)])
def test_ranks_train_the_model_that_one_process_trains(world: int, tmp_path: Path) -> None:
    mp.spawn(_rank, (world, str(tmp_path)), nprocs=world)
    alone = network()
    train(alone, [slice(0, 8)])
    for rank in range(world):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert state.keys() == alone.state_dict().keys()
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-9)


def test_without_ranks_and_in_evaluation_it_is_torchs_own() -> None:
    model = network()
    over_ranks = synchronize(copy.deepcopy(model), torch.device("cpu"))
    assert [type(m) for m in over_ranks.modules()].count(BatchNormOverRanks) == 2
    x, _ = batch()
    for training in (True, False):
        assert torch.equal(over_ranks.train(training)(x), model.train(training)(x))


def test_statistics_measured_anew_are_the_mean_of_those_of_batches() -> None:
    model = network().eval()
    train(model, [slice(0, 8)])  # in evaluation mode: the weights alone
    x = batch()[0]
    halves = x[:3], 2 * x[3:]
    with measured_anew(model):
        assert model.training
        for half in halves:
            model(half)
    assert not model.training
    assert model[1].momentum == 0.1
    first = [model[0](half) for half in halves]
    mean = sum(y.mean((0, 2, 3)) for y in first) / 2
    variance = sum(y.transpose(0, 1).flatten(1).var(1) for y in first) / 2
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)
    assert set(statistics(model)) == {
        f"{layer}.{key}" for layer in (1, 5) for key in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert not statistics(nn.Linear(2, 2))
