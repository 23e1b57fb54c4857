from itertools import islice
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from caspr_cli.recipe.schema import Strategy
from caspr_cli.tasks.base import DataError
from caspr_cli.training.data import Seeded, StepSampler, TaskData, mix

shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 11), st.integers(0, 9)
)


@settings(deadline=None, max_examples=60)
@given(shapes)
def test_a_step_has_the_same_batch_however_it_is_cut(shape: tuple[int, ...]) -> None:
    world, accumulate, part, steps, extra, seed = shape
    batch = world * accumulate * part
    size = batch * steps + extra % batch
    whole = list(islice(StepSampler(size, batch, seed=seed), 3 * steps))
    ranks = [
        list(
            islice(
                StepSampler(size, batch, seed=seed, rank=r, world=world, accumulate=accumulate), 3 * steps * accumulate
            )
        )
        for r in range(world)
    ]
    for step, expected in enumerate(whole):
        parts = [b for rank in ranks for b in rank[step * accumulate : (step + 1) * accumulate]]
        assert all(len(p) == part for p in parts)
        assert sorted(i for p in parts for i in p) == sorted(expected)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 9), st.integers(0, 30), st.integers(0, 3))
def test_it_resumes_at_any_step(batch: int, steps: int, extra: int, start: int, seed: int) -> None:
    size = batch * steps + extra % batch
    whole = list(islice(StepSampler(size, batch, seed=seed), start + 5))
    assert list(islice(StepSampler(size, batch, seed=seed, start=start), 5)) == whole[start:]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 9), st.integers(0, 3))
def test_an_epoch_repeats_nothing(batch: int, steps: int, extra: int, seed: int) -> None:
    size = batch * steps + extra % batch
    batches = list(islice(StepSampler(size, batch, seed=seed), 2 * steps))
    for epoch in (batches[:steps], batches[steps:]):
        seen = [i for b in epoch for i, _ in b]
        assert len(set(seen)) == len(seen) == batch * steps
        assert set(seen) <= set(range(size))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = (list(islice(StepSampler(64, 8, seed=s), 16)) for s in (0, 1))
    assert first != second
    assert first[:8] != first[8:]


def test_a_sample_draws_another_number_each_epoch_and_the_same_however_it_is_read() -> None:
    class Noise(Dataset[float]):
        def __getitem__(self, index: int) -> float:
            return index + torch.rand(()).item()

    batches = list(islice(StepSampler(4, 4, seed=0), 2))
    torch.manual_seed(7)
    first, second = (sorted(Seeded(Noise()).__getitems__(batch)) for batch in batches)
    after = torch.rand(())
    torch.manual_seed(7)
    assert torch.rand(()) == after  # reading moves nobody else's generator
    assert [int(x) for x in first] == [int(x) for x in second] == [0, 1, 2, 3]
    assert not set(first) & set(second)
    ranks = [next(iter(StepSampler(4, 4, seed=0, rank=r, world=2))) for r in (0, 1)]
    assert sorted(x for rank in ranks for x in Seeded(Noise()).__getitems__(rank)) == first


def test_a_batch_larger_than_the_data_is_the_users_to_mend() -> None:
    with pytest.raises(DataError, match=r"task\.batch_size=9 is more than the 8 samples"):
        StepSampler(8, 9, seed=0)


def test_mixed_seeds_do_not_collide() -> None:
    seeds = {mix(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(seeds) == 12**3
    assert all(0 <= s < 1 << 63 for s in seeds)


def data_of(world: int, rank: int, batch: int = 4, strategy: Strategy = Strategy.ddp, **sizes: int) -> TaskData:
    """The loaders of a task whose splits have these numbers of samples."""
    task = SimpleNamespace(dataset=lambda split: range(sizes[split]), collate=None)
    trainer = SimpleNamespace(accumulate=1, workers=0, strategy=strategy)
    recipe = SimpleNamespace(task=SimpleNamespace(batch_size=batch), seed=0, trainer=trainer)
    return TaskData(cast(Any, task), cast(Any, recipe), start=0, rank=rank, world=world)


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize(("size", "world"), [(1, 2), (3, 4), (0, 1)])
def test_a_split_that_leaves_a_rank_idle_is_refused_before_training(split: str, size: int, world: int) -> None:
    """By every rank alike, as none may wait for the others."""
    sizes = {"train": 8, "validation": 9, "test": 9, split: size}
    for rank in range(world):
        with pytest.raises(DataError, match=rf"^trainer\.devices: the {split} split has {size} sample"):
            data_of(world, rank, **sizes)


def test_every_rank_has_a_sample_where_there_are_as_many_as_ranks() -> None:
    for rank in range(4):
        data = data_of(4, rank, train=4, validation=4, test=4)
        assert [len(loader) for loader in (data.val_dataloader(), data.test_dataloader())] == [1, 1]


@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 40))
def test_ranks_that_have_parts_of_a_model_validate_in_step(world: int, batch: int, more: int) -> None:
    """Each sample once, in as many batches on all ranks, of which none is too large."""
    size, seen = world + more, []
    counts = set()
    for rank in range(world):
        data = data_of(world, rank, batch, Strategy.fsdp, train=batch * world, validation=size, test=world)
        loader = data.val_dataloader()
        batches = list(cast(Any, loader.batch_sampler))
        assert all(0 < len(each) <= batch for each in batches)
        counts.add(len(batches))
        seen += [i for each in batches for i in each]
    assert len(counts) == 1
    assert sorted(seen) == list(range(size))
