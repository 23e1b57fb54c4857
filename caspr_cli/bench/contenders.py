"""The optimizers that are compared, each over its own copy of the same weights, with the same gradients."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from caspr_cli.bench.shapes import ShapeSet
from caspr_cli.optim.caspr import CASPR, FullAdagrad, Shampoo
from caspr_cli.optim.cost import state_bytes
from caspr_cli.optim.mixed import MixedOptimizer
from caspr_cli.optim.options import Group
from caspr_cli.optim.registry import build
from caspr_cli.recipe.compose import options
from caspr_cli.recipe.errors import ConfigError, nearest
from caspr_cli.recipe.schema import OPTIMIZERS, KroneckerConf, Recipe

SCALABLE = "scalable_shampoo"
NEVER = 10**9  # an interval that no run reaches
WARM_UP = 3  # steps before anything is timed: they build state and the first roots
FLOPS = 6  # of training, for each parameter and token: two products forward, four backward
OWN_FLAGS = {"interval": "--interval", "block_size": "--block-size"}
NOT_FOR_SET = {"params", "start_step", "maximize"}  # the bench preconditions from the first step on


@dataclass(frozen=True)
class Workload:
    """Weights and their gradients, and what training them costs."""

    name: str
    groups: list[Group]  # "params" and "precondition"
    grads: dict[Tensor, Tensor]
    train_flops: float  # of one training step

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.grads)

    def copies(self) -> list[Group]:
        """The groups over copies of the weights; gradients are shared."""

        def copy(p: Tensor) -> nn.Parameter:
            new = nn.Parameter(p.detach().clone())
            new.grad = self.grads[p]
            return new

        return [group | {"params": [copy(p) for p in group["params"]]} for group in self.groups if group["params"]]


@dataclass(frozen=True)
class Settings:
    """What the command line says of the optimizers."""

    interval: int = 10
    block_size: int = 1024
    given: dict[str, Any] = field(default_factory=dict)  # options of the Kronecker family


def workload_of_shapes(shapes: ShapeSet, tokens: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """Tensors of one axis are not preconditioned; all others are."""
    weights = [torch.randn(shape, generator=_generator(i)) * 0.02 for i, shape in enumerate(shapes.shapes)]
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "precondition": True},
        {"params": [w for w in weights if w.ndim <= 1], "precondition": False},
    ]
    return _workload(shapes.name, groups, FLOPS * float(shapes.parameters) * tokens, dtype, device)


def workload_of_task(recipe: Recipe, dtype: torch.dtype, device: torch.device) -> Workload:
    """The parameters of a task's model, with its own rule of what is preconditioned.

    Raises:
        tasks.base.DataError: the model's shape depends on data that are not there.
    """
    import tasks  # here, as training below: Lightning alone takes seconds to import
    from caspr_cli.training.module import param_groups

    task = tasks.load(recipe.task, recipe.seed)
    torch.manual_seed(recipe.seed)
    model = task.model()
    groups = param_groups(task, model, weight_decay=0.0)
    return _workload(f"{recipe.task.name}-{recipe.scale}", groups, task.train_flops(model), dtype, device)


def _workload(name: str, groups: list[Group], train_flops: float, dtype: torch.dtype, device: torch.device) -> Workload:
    placed = [g | {"params": [p.detach().to(device, dtype) for p in g["params"]]} for g in groups]
    weights = [p for group in placed for p in group["params"]]
    grads = {p: torch.randn(p.shape, generator=_generator(-1 - i)).to(device, dtype) for i, p in enumerate(weights)}
    return Workload(name, placed, grads, train_flops)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def has_interval(name: str) -> bool:
    """Whether it refreshes something only now and then, at an interval that is chosen here."""
    return hasattr(OPTIMIZERS.get(name), "interval")


def is_kronecker(name: str) -> bool:
    return name != SCALABLE and issubclass(OPTIMIZERS[name], KroneckerConf)


def accepts(name: str) -> dict[str, Any]:
    """The options of an optimizer of the Kronecker family, with their defaults."""
    classes: dict[str, type] = {"shampoo": Shampoo, "full_adagrad": FullAdagrad}
    parameters = inspect.signature(classes.get(name, CASPR)).parameters
    return {key: p.default for key, p in parameters.items() if key not in NOT_FOR_SET}


def parse_given(words: list[str], names: list[str]) -> dict[str, Any]:
    """``--set KEY=VALUE``, checked against the options of those chosen.

    Raises:
        ConfigError: no such option, a value that cannot be read, or an option that is a flag of its own.
    """
    known = {key: default for name in names if is_kronecker(name) for key, default in accepts(name).items()}
    given = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"--set {word}: options are written KEY=VALUE")
        if key in OWN_FLAGS:
            raise ConfigError(f"--set {word}: write {OWN_FLAGS[key]} {value}, which is for all optimizers")
        if not known:
            raise ConfigError(f"--set {word}: none of {', '.join(names)} takes options; it is for caspr and shampoo")
        if key not in known:
            raise ConfigError(f"--set {word}: {key} is no option.{nearest(key, known)} (help(caspr_cli.optim.CASPR))")
        given[key] = _value(key, value)
        if isinstance(known[key], (int, float)) and isinstance(given[key], str):
            raise ConfigError(f"--set {word}: {key} is {known[key]} unless it is set; '{value}' is of another kind")
    return given


def _value(key: str, text: str) -> int | float | bool | str:
    if key.endswith("dtype"):
        names = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
        if text not in names:
            raise ConfigError(f"--set {key}={text}: {text} is no type of torch.{nearest(text, names)}")
        return text  # the registry takes names, as they stand in recipes
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def enter(name: str, groups: list[Group], settings: Settings, interval: int) -> Optimizer:
    """The optimizer ``name`` over ``groups``, which become its own.

    Args:
        interval: steps between two refreshes.

    Raises:
        ConfigError: it refuses an option.
    """
    try:
        if name == SCALABLE:
            return _scalable_shampoo(groups, settings)
        return build(name, groups, _options(name, settings, interval))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {str(error).splitlines()[0]}") from error


def _options(name: str, settings: Settings, interval: int) -> dict[str, Any]:
    found = options(OPTIMIZERS[name]())
    if is_kronecker(name):
        found |= {"start_step": 1, "block_size": settings.block_size}
        found |= {key: value for key, value in settings.given.items() if key in accepts(name)}
    if has_interval(name):
        found["interval"] = interval
    return found | ({"fused": True} if name == "adamw" else {})


def _scalable_shampoo(groups: list[Group], settings: Settings) -> Optimizer:
    """pytorch_optimizer's, over what is preconditioned, and AdamW over the rest.

    Its roots are never refreshed here: its own interval is 1,000 steps, and a refresh of the default set takes about
    a minute on one core. A step multiplies by the first roots, identity matrices, as by any other.
    """
    from pytorch_optimizer import ScalableShampoo  # here, because importing it takes a second

    matrices = [group for group in groups if group["precondition"]]
    rest = [group for group in groups if not group["precondition"]]
    parts: list[Optimizer] = []
    if matrices:
        parts.append(
            ScalableShampoo(
                matrices,
                lr=1e-3,
                block_size=settings.block_size,
                start_preconditioning_step=1,
                preconditioning_compute_steps=NEVER,
            )
        )
    if rest:
        parts.append(torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.0, fused=True))
    return MixedOptimizer(parts)


def bytes_of_state(optimizer: Optimizer) -> int:
    """Of all tensors in the state, also of those that objects in it hold (as some optimizers keep them there)."""

    def opened(value: Any) -> Any:
        return value if isinstance(value, Tensor) or not hasattr(value, "__dict__") else list(vars(value).values())

    return state_bytes({p: {name: opened(v) for name, v in kept.items()} for p, kept in optimizer.state.items()})
