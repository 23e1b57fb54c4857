"""The weights and gradients that are measured, and the machine that they are on."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from caspr_cli.bench.shapes import ShapeSet
from caspr_cli.optim.options import Group
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe

TRAINING_FLOPS = 6  # for each parameter and token: two products forward, four backward


@dataclass(frozen=True)
class Machine:
    """The device, the type of weights and gradients, and the threads; None: as many as torch takes."""

    dtype: str
    device: str
    threads: int | None


@dataclass(frozen=True)
class Workload:
    name: str
    groups: list[Group]  # "params" and "precondition"
    grads: dict[Tensor, Tensor]
    train_flops: float

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.grads)

    @property
    def first(self) -> Tensor:
        """Return a weight: all have its type and its device."""
        return next(iter(self.grads))

    def copies(self) -> list[Group]:
        """Return the groups over copies of the weights; gradients are shared."""

        def copy(p: Tensor) -> nn.Parameter:
            new = nn.Parameter(p.detach().clone())
            new.grad = self.grads[p]
            return new

        return [group | {"params": [copy(p) for p in group["params"]]} for group in self.groups if group["params"]]


def workload_of(what: ShapeSet | Recipe, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """Return the weights of a set of shapes, or those of a task's model.

    Raises ConfigError if the model's shape depends on data of the task that are not there.
    """
    if isinstance(what, ShapeSet):
        weights = [torch.randn(shape, generator=_generator(i)) * 0.02 for i, shape in enumerate(what.shapes)]
        groups = [  # tensors of one axis are not preconditioned
            {"params": [w for w in weights if (w.ndim > 1) is chosen], "precondition": chosen}
            for chosen in (True, False)
        ]
        return _workload(what.name, groups, TRAINING_FLOPS * float(what.parameters) * tokens, dtype, device)
    from caspr_cli import tasks  # here, because the libraries of a task take seconds to import
    from caspr_cli.tasks.base import DataError

    try:
        task = tasks.load(what.task, what.seed)
        torch.manual_seed(what.seed)
        model = task.model()
    except (DataError, OSError) as error:  # OSError: the disk of the cache is full
        raise ConfigError(f"--task {what.task.name}: {str(error).splitlines()[0]}") from error
    name = f"{what.task.name}-{what.scale}"
    return _workload(name, task.param_groups(model), task.train_flops(model), dtype, device)


def _workload(name: str, groups: list[Group], train_flops: float, dtype: torch.dtype, device: torch.device) -> Workload:
    placed = [g | {"params": [p.detach().to(device, dtype) for p in g["params"]]} for g in groups]
    weights = [p for group in placed for p in group["params"]]
    grads = {p: torch.randn(p.shape, generator=_generator(-1 - i)).to(device, dtype) for i, p in enumerate(weights)}
    return Workload(name, placed, grads, train_flops)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
