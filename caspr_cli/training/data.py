"""Batches as a pure function of (seed, step): the same whatever the number of ranks, and wherever a run resumes."""

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from caspr_cli.recipe.schema import Recipe, Strategy
from caspr_cli.runs.processes import cores
from caspr_cli.tasks.base import SPLITS, DataError, Split, Task

MOST_WORKERS = 8  # processes a rank, where their number is not given

Draw = tuple[int, int]  # index of a sample, and the seed of what it draws when it is read


class StepSampler:
    """Endless batches of draws for one rank, from a given optimizer step on.

    The global batch of step s is the same set for every ``world`` and ``accumulate``. Each epoch is a permutation
    drawn from (seed, epoch) alone, and the seed of each sample comes from (seed, epoch, index); the last incomplete
    batch of an epoch is left out. It has no length: the number of steps ends a run, and a resumed one has no epoch
    to be in the middle of.
    """

    def __init__(
        self, size: int, batch: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1, accumulate: int = 1
    ) -> None:
        if size < batch:
            raise DataError(f"task.batch_size={batch} is more than the {size} samples of the training split")
        self.size, self.batch, self.seed, self.start = size, batch, seed, start
        self.rank, self.world, self.accumulate = rank, world, accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        step, steps_an_epoch = self.start, self.size // self.batch
        epoch, order = -1, torch.empty(0)
        while True:
            if step // steps_an_epoch != epoch:
                epoch = step // steps_an_epoch
                generator = torch.Generator().manual_seed(mix(self.seed, epoch))
                order = torch.randperm(self.size, generator=generator)
            at = step % steps_an_epoch * self.batch
            parts = order[at : at + self.batch].view(self.accumulate, self.world, -1)
            for part in parts[:, self.rank]:
                yield [(index, mix(self.seed, epoch, index)) for index in part.tolist()]
            step += 1


def mix(*words: int) -> int:
    """Return one seed from several numbers, by splitmix64's finisher: neighbours give unrelated streams."""
    mask, state = (1 << 64) - 1, 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1  # torch takes 63 bits


class Seeded(Dataset[Any]):
    """A data set read by draws: whatever its samples take from torch's global generator follows from their seeds.

    So augmentation is the same for any number of ranks and loader processes, and wherever a run resumes.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, draws: list[Draw]) -> list[Any]:
        """Return the samples of a batch (the loader calls this name)."""
        samples = []
        with torch.random.fork_rng(devices=[]):
            for index, seed in draws:
                torch.default_generator.manual_seed(seed)
                samples.append(self.dataset[index])
        return samples


class TaskData(LightningDataModule):
    """The splits of a task as loaders for this rank.

    Raises DataError if a split has not enough samples, for a batch or for each rank to have one.
    """

    def __init__(self, task: Task, recipe: Recipe, *, start: int, rank: int, world: int) -> None:
        super().__init__()
        self.task, self.recipe, self.start, self.rank, self.world = task, recipe, start, rank, world
        self.begun = False  # training samples were asked for: whatever a checkpoint holds is restored by then
        self._datasets = {split: task.dataset(split) for split in SPLITS}
        self._sampler = StepSampler(
            self._size("train"), recipe.task.batch_size, seed=recipe.seed, start=start, rank=rank, world=world,
            accumulate=recipe.trainer.accumulate,
        )  # fmt: skip
        for split in SPLITS:
            if (size := self._size(split)) < world:
                raise DataError(
                    f"trainer.devices: the {split} split has {size} sample{'s' if size > 1 else ''}, and each of the "
                    f"{world} processes needs one; take trainer.devices={max(size, 1)}, or a larger split"
                )

    def _size(self, split: Split) -> int:
        return len(cast(Any, self._datasets[split]))

    def train_dataloader(self) -> DataLoader[Any]:
        self.begun = True
        dataset = Seeded(self._datasets["train"])
        return DataLoader(dataset, batch_sampler=cast(Any, self._sampler), **self._loading("train"))

    def first_batches(self, count: int) -> Iterator[Any]:
        """Yield the first batches of the run on this rank (with ``accumulate``: parts of batches)."""
        dataset, sampler = Seeded(self._datasets["train"]), copy.copy(self._sampler)
        sampler.start = 0
        for draws in islice(sampler, count):
            yield self.task.collate(dataset.__getitems__(draws))

    def val_dataloader(self) -> DataLoader[Any]:
        return self._in_order("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._in_order("test")

    def _in_order(self, split: Split) -> DataLoader[Any]:
        """Return a loader of this rank's share: each sample once, so that ranks may have one more or less.

        Under ``fsdp`` all ranks have as many batches, as a batch of one is work for all.
        """
        size, batch = self._size(split), self.recipe.task.batch_size
        share = list(range(self.rank, size, self.world))
        if self.recipe.trainer.strategy == Strategy.fsdp:
            count = min(-(-size // (batch * self.world)), size // self.world)
            batches = [share[start::count] for start in range(count)]
            return DataLoader(self._datasets[split], batch_sampler=cast(Any, batches), **self._loading(split))
        mine = torch.utils.data.Subset(self._datasets[split], share)
        return DataLoader(mine, batch_size=batch, **self._loading(split))

    def _loading(self, split: Split) -> dict[str, Any]:
        workers = self.recipe.trainer.workers
        if workers is None:
            costs = getattr(self._datasets[split], "reading_costs", False)
            own = cores() // self.recipe.trainer.devices - 1  # a core is for the steps
            workers = min(MOST_WORKERS, max(own, 0)) if costs else 0
        return {
            "collate_fn": self.task.collate,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available() and self.recipe.trainer.accelerator.name != "cpu",
            # a forked copy of a process with threads may wait for one of them for ever
            "multiprocessing_context": "spawn" if workers else None,
        }
