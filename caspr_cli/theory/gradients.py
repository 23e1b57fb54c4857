"""Gradients of real training: those of small layers in a small model of each task, on its bundled sample.

Models are scaled down until the full-matrix statistic of a layer, ``[mn, mn]``, can be decomposed in float64 in a
fraction of a second; data, losses and batches are those of the task.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from caspr_cli import tasks
from caspr_cli.common.errors import nearest
from caspr_cli.optim.registry import build
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import TaskConf
from caspr_cli.tasks.base import DataError, Task
from caspr_cli.tasks.registry import Augment, C4LMConf, MolPCBAConf, ResNetConf, TaggingConf, ViTConf
from caspr_cli.theory.choices import Layers

Log = Callable[[str], None]

LARGEST = 1024  # numbers in a recorded parameter: its statistic has 8 MB, and takes a second to decompose
STEPS = (1, 3, 10, 30, 100, 300)  # at which statements are checked; training goes to the last
QUICK_STEPS = STEPS[:3]
RATE = 1e-2  # the learning rate of both: the middle of those that are tuned for the samples

MODELS: dict[str, TaskConf] = {
    "c4_lm": C4LMConf(batch_size=8, sequence=64, layers=1, width=8, heads=1),
    "ogbg_molpcba": MolPCBAConf(batch_size=32, width=8, steps=2, dropout=0.0),
    "ud_pos": TaggingConf(batch_size=16, max_length=32, vocab_size=8000, layers=1, width=8, heads=2),
    "resnet": ResNetConf(batch_size=16, depth=10, width=4, stem=2),
    "vit": ViTConf(batch_size=64, patch=8, layers=1, width=8, heads=2, augment=Augment.none),
}
# Where nothing is named: a small layer and a larger one of each task.
LAYERS = {
    "c4_lm": ("blocks.0.attention.value.weight", "blocks.0.up.weight"),
    "ogbg_molpcba": ("node_embedding.weight", "steps.1.node.dense.weight"),
    "ud_pos": ("blocks.0.attention.query.weight", "blocks.0.down.weight"),
    "resnet": ("conv1.weight", "layer2.0.conv1.weight"),
    "vit": ("blocks.0.attention.output.weight", "blocks.0.up.weight"),
}
QUICK = ("ogbg_molpcba", "vit")  # tasks that are read in a second; the first layer of each


@dataclass(frozen=True)
class Recording:
    """The gradients of one parameter in one run."""

    task: str
    parameter: str
    seed: int
    gradients: Tensor  # [T, m, n], float64; a convolution is seen as [out, in x height x width]
    losses: tuple[float, float]  # means over the first and the last tenth of the steps

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.gradients.shape[1]), int(self.gradients.shape[2])

    @property
    def size(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}"

    @cached_property
    def rank(self) -> int:
        """Return r, the largest rank of a gradient."""
        return max(int(torch.linalg.matrix_rank(self.gradients).max()), 1)


def recordings(choice: Layers, log: Log) -> list[Recording]:
    """Return the gradients of the chosen parameters, for each task and seed.

    Raises ConfigError for an unknown task or parameter, one that is too large, or data that cannot be read.
    """
    if choice.task and choice.task not in MODELS:
        hint = nearest(choice.task, MODELS)
        raise ConfigError(f"--task {choice.task}: no such task.{hint} (choices: {', '.join(MODELS)})")
    if choice.parameter and not choice.task:
        raise ConfigError(f"--parameter {choice.parameter}: needs a task; add --task (choices: {', '.join(MODELS)})")
    found: list[Recording] = []
    steps = (QUICK_STEPS if choice.quick else STEPS)[-1]
    try:
        for name in (choice.task,) if choice.task else QUICK if choice.quick else MODELS:
            log(f"{name}: reading its data")
            for seed in choice.all_seeds:
                log(f"{name}: training for {steps} steps, seed {seed}")
                found += record(name, seed, steps, _wanted(choice, name), choice.optim)
    except (DataError, OSError) as error:  # OSError: the disk of the cache is full
        raise ConfigError(str(error)) from error
    return found


def _wanted(choice: Layers, task: str) -> tuple[str, ...]:
    if choice.parameter:
        shapes = {name: p.shape for name, p in _preconditioned(*_made(task, choice.seed)).items()}
        return matching(choice.parameter, shapes)
    return LAYERS[task][:1] if choice.quick else LAYERS[task]


def matching(pattern: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Return the names of parameters with ``pattern`` in them.

    Raises ConfigError if no parameter matches, or one is too large for its full matrix.
    """
    found = tuple(name for name in shapes if pattern in name)
    if not found:
        known = f"{nearest(pattern, shapes)} (there are: {', '.join(shapes)})"
        raise ConfigError(f"--parameter {pattern}: no preconditioned parameter has this in its name.{known}")
    for name in found:
        if (size := math.prod(shapes[name])) > LARGEST:
            numbers = f"{' x '.join(map(str, shapes[name]))} = {size:,} numbers"
            limit = f"a full matrix is computed for at most {LARGEST:,}"
            raise ConfigError(f"--parameter {pattern}: {name} has {numbers}, and {limit}")
    return found


def points(found: Sequence[Recording], log: Log) -> Iterator[tuple[Recording, int, Tensor]]:
    """Yield each recording, each of ``STEPS``, and the gradients up to it; steps with a gradient of zero are left out.

    Below a head that starts at zero there is no gradient at first.
    """
    for one in found:
        log(f"{one.task}: {one.parameter}, seed {one.seed}: decompositions")
        for step in STEPS:
            seen = one.gradients[:step]
            if len(seen) == step and seen[-1].any():
                yield one, step, seen


@lru_cache(maxsize=64)  # several questions want the same run
def record(
    task_name: str, seed: int, steps: int, wanted: tuple[str, ...], optimizer_name: str
) -> tuple[Recording, ...]:
    """Return the gradients of the parameters ``wanted`` over some steps of training.

    They depend on the arguments alone: torch's global generator is set here, and put back.
    """
    with torch.random.fork_rng(devices=[]):
        task, model = _made(task_name, seed)
        shown = _preconditioned(task, model)
        optimizer = build(optimizer_name, task.param_groups(model), {"lr": RATE})
        kept: dict[str, list[Tensor]] = {name: [] for name in wanted}
        losses = []
        batches = batches_of(task, MODELS[task_name].batch_size, seed)
        model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            loss = task.loss(model, next(batches))
            loss.backward()
            for name, gradients in kept.items():
                gradient = shown[name].grad
                gradients.append(as_matrix(torch.zeros_like(shown[name]) if gradient is None else gradient))
            losses.append(loss.item())
            optimizer.step()
    part = max(steps // 10, 1)
    ends = sum(losses[:part]) / part, sum(losses[-part:]) / part
    return tuple(Recording(task_name, name, seed, torch.stack(g), ends) for name, g in kept.items())


def as_matrix(gradient: Tensor) -> Tensor:
    """Return a gradient as [d_0, product of the rest] in float64: the paper's rule for tensors of more axes."""
    return gradient.detach().double().flatten(1)


def _made(name: str, seed: int) -> tuple[Task, nn.Module]:
    task = _prepared(name)
    torch.manual_seed(seed)
    return task, task.model()


@lru_cache(maxsize=len(MODELS))
def _prepared(name: str) -> Task:
    task = tasks.load(replace(MODELS[name]), 0)
    task.prepare()
    return task


def _preconditioned(task: Task, model: nn.Module) -> dict[str, nn.Parameter]:
    plain = task.plain(model)
    return {name: p for name, p in model.named_parameters() if name not in plain}


def batches_of(task: Task, batch: int, seed: int) -> Iterator[Any]:
    """Yield endless batches of the training split, in a new order each epoch; incomplete ones are left out."""
    data = task.dataset("train")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(cast(Any, data)), generator=generator).tolist()
        for start in range(0, len(order) - batch + 1, batch):
            yield task.collate([data[index] for index in order[start : start + batch]])


# ---- streams that are not training ------------------------------------------------------------------------------


def low_rank_stream(shape: tuple[int, int], rank: int, steps: int, seed: int) -> Tensor:
    """Return random gradients ``[T, m, n]`` of a rank, of sizes that differ from step to step."""
    generator = torch.Generator().manual_seed(seed)
    left, right, size = (
        torch.randn(steps, *rest, generator=generator, dtype=torch.float64)
        for rest in ((shape[0], rank), (rank, shape[1]), (1, 1))
    )
    return size.exp() * (left @ right)


def kronecker_stream(shape: tuple[int, int], steps: int, seed: int) -> Tensor:
    """Return gradients G_t = A Z_t B ``[T, m, n]``, Z_t normal, whose covariance is a Kronecker product, A^2 x B^2.

    A and B are symmetric, with spectra from 1 down to 1/16.
    """
    generator = torch.Generator().manual_seed(seed)

    def factor(size: int) -> Tensor:
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        spectrum = torch.logspace(0, -4, size, base=2, dtype=torch.float64)
        made: Tensor = (basis * spectrum) @ basis.mT
        return made

    A, B = map(factor, shape)
    return A @ torch.randn(steps, *shape, generator=generator, dtype=torch.float64) @ B
