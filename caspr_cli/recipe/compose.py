"""From Hydra's config to a :class:`Recipe`, and back from the file in a record. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from enum import Enum
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from caspr_cli.recipe import search
from caspr_cli.recipe.configs import CONF, PACKAGE, choices
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import (
    OPTIMIZERS,
    TASKS,
    AdamWConf,
    KroneckerConf,
    MuonConf,
    OptimConf,
    Recipe,
    SGDConf,
    SoapConf,
    Source,
    TaskConf,
)

__all__ = [
    "CONF",
    "PACKAGE",
    "choices",
    "freeze",
    "identity",
    "load",
    "options",
    "register_schemas",
    "save",
    "to_plain",
]

# What does not change the numbers of a run, or is in the record's path already.
NOT_IN_THE_NAME = (
    "seed", "resume", "output_dir", "search.trials",
    "trainer.timeout", "trainer.rendezvous", "trainer.keep_checkpoints",
)  # fmt: skip
# Keys that came when there were records, with the value at which a run is what it was without them: that is not in the
# name, so that those records are found again.
CAME_LATER = {"optim.axes": "all", "optim.exponent": 0.5}

LOWER_IS_BETTER = ("val/loss", "val/perplexity", "val/bits_per_byte")


def register_schemas() -> None:
    """Make the dataclasses known to Hydra as ``/schema``, ``/schema/task`` and ``/schema/optim``."""
    store = ConfigStore.instance()
    store.store(group="schema", name="recipe", node=Recipe, package="_global_")
    for task, task_conf in TASKS.items():
        store.store(group="schema/task", name=task, node=task_conf)
    for optimizer, optim_conf in OPTIMIZERS.items():
        store.store(group="schema/optim", name=optimizer, node=optim_conf)


def freeze(config: DictConfig, given: Iterable[str] = (), trial: int | None = None) -> Recipe:
    """The checked recipe.

    Args:
        given: overrides of the command line; a search leaves alone what they set.
        trial: in place of the config's own.

    Raises:
        ConfigError: a value is missing or out of range.
    """
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    plain.pop("hydra", None)
    plain["trial"] = plain["trial"] if trial is None else trial
    _draw(plain, given)
    recipe = _build(plain)
    _check(recipe)
    return recipe


def _draw(plain: dict[str, Any], given: Iterable[str]) -> None:
    """Put the trial's point of the search space in its place."""
    name, trial, space = plain["search"]["name"], plain["trial"], plain["search"]["space"]
    if name is None:
        if trial is not None:
            raise ConfigError(f"trial={trial} is of no search: add search=NAME (choices: {', '.join(_searches())})")
        return
    if trial is None:
        raise ConfigError(f"search={name}: add -m trial='range({plain['search']['trials']})', or one trial")
    if not isinstance(trial, int):
        raise ConfigError(f"trial should be an integer, or best, but is '{trial}'")
    values = search.draw(space, trial)  # of the whole space: what is given changes no other value
    plain["search"]["space"] = {key: space[key] for key in space.keys() - search.fixed(space, given)}
    if not plain["search"]["space"]:
        raise ConfigError(f"search={name} draws nothing: {', '.join(sorted(space))} is given; add search=none")
    search.put(plain, {key: values[key] for key in plain["search"]["space"]})


def _searches() -> list[str]:
    return [name for name in choices("search") if name != "none"]


def _build(plain: dict[str, Any]) -> Recipe:
    """Typed from plain values; ``task`` and ``optim`` get the type that their name asks for."""
    # merged on its own: Recipe.task is declared as what all tasks share
    rest = {k: v for k, v in plain.items() if k not in ("task", "optim")}
    for group, known in (("task", TASKS), ("optim", OPTIMIZERS)):
        if plain[group]["name"] not in known:
            raise ConfigError(f"{group}.name={plain[group]['name']} has no dataclass in caspr_cli/recipe/schema.py")
    merged = OmegaConf.merge(OmegaConf.structured(Recipe), rest)
    merged.task = OmegaConf.merge(OmegaConf.structured(TASKS[plain["task"]["name"]]), plain["task"])
    merged.optim = OmegaConf.merge(OmegaConf.structured(OPTIMIZERS[plain["optim"]["name"]]), plain["optim"])
    return cast(Recipe, OmegaConf.to_object(merged))


def _check(recipe: Recipe) -> None:
    """What types alone cannot say."""
    trainer, schedule = recipe.trainer, recipe.schedule
    for name in ("devices", "nodes", "max_steps", "val_every", "log_every", "accumulate"):
        if getattr(trainer, name) < 1:
            raise ConfigError(f"trainer.{name} should be at least 1 but is {getattr(trainer, name)}")
    if recipe.task.batch_size < 1:
        raise ConfigError(f"task.batch_size should be at least 1 but is {recipe.task.batch_size}")
    if not trainer.timeout > 0:
        raise ConfigError(f"trainer.timeout should be > 0 but is {trainer.timeout}")
    if trainer.workers < 0:
        raise ConfigError(f"trainer.workers should be at least 0 but is {trainer.workers}")
    if trainer.clip_norm is not None and not trainer.clip_norm > 0:
        raise ConfigError(f"trainer.clip_norm should be > 0, or null for no clipping, but is {trainer.clip_norm}")
    for name in ("warmup", "decay"):
        if not 0 <= getattr(schedule, name) <= 1:
            raise ConfigError(f"schedule.{name} is a fraction of the run, 0 to 1, but is {getattr(schedule, name)}")
    if schedule.warmup + schedule.decay > 1 + 1e-9:
        raise ConfigError(
            f"schedule.warmup + schedule.decay should be at most 1 but is {schedule.warmup + schedule.decay:g}"
        )
    parts = trainer.devices * trainer.nodes * trainer.accumulate
    if recipe.task.batch_size % parts:
        nodes = " x trainer.nodes" if trainer.nodes > 1 else ""
        raise ConfigError(
            f"task.batch_size should be a multiple of trainer.devices{nodes} x trainer.accumulate = {parts} "
            f"but is {recipe.task.batch_size}"
        )
    if trainer.rendezvous is not None and not re.fullmatch(r"[^\s:]+:\d+|\[[0-9a-fA-F:]+\]:\d+", trainer.rendezvous):
        raise ConfigError(f"trainer.rendezvous should be HOST:PORT but is '{trainer.rendezvous}'")
    _check_task(recipe.task)
    _check_optim(recipe.optim)
    if not -(2**63) <= recipe.seed < 2**63:
        raise ConfigError(f"seed should fit into 64 bits but is {recipe.seed}")
    if recipe.search.trials < 1:
        raise ConfigError(f"search.trials should be at least 1 but is {recipe.search.trials}")
    if not recipe.output_dir:
        raise ConfigError("output_dir is empty: name a directory")
    for key, value in _floats(to_plain(recipe)):
        if not math.isfinite(value) and key != "optim.order":
            raise ConfigError(f"{key} should be a finite number but is {value}")


def _check_task(task: TaskConf) -> None:
    """Keys that would be passed over, or turned round, without a word."""
    if task.root is not None and task.data != Source.files:
        raise ConfigError(f"task.root={task.root} is read with task.data=files alone, but task.data={task.data.name}")
    if task.target.metric in LOWER_IS_BETTER and task.target.higher_is_better:
        raise ConfigError(
            f"task.target.metric={task.target.metric}: less is better; add task.target.higher_is_better=false, and "
            "task.target.value, or null for none"
        )


def _check_optim(optim: OptimConf) -> None:
    """What optimizers of others refuse in words that name no key, or late; CASPR's kin answer for themselves."""
    for name in ("lr", "weight_decay"):
        if not getattr(optim, name) >= 0:
            raise ConfigError(f"optim.{name} should be >= 0 but is {getattr(optim, name)}")
    betas = getattr(optim, "betas", (0.0, 0.0))
    if len(betas) != 2:
        raise ConfigError(f"optim.betas should be two numbers, as in optim.betas=[0.9,0.95], but is {list(betas)}")
    if isinstance(optim, KroneckerConf):
        return
    for i, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ConfigError(f"optim.betas[{i}] should be in [0, 1) but is {beta}")
    if isinstance(optim, SGDConf) and not 0 < optim.momentum < 1:
        raise ConfigError(f"optim.momentum should be above 0 (it is Nesterov's) and below 1 but is {optim.momentum}")
    if isinstance(optim, MuonConf) and not 0 <= optim.momentum < 1:
        raise ConfigError(f"optim.momentum should be in [0, 1) but is {optim.momentum}")
    if isinstance(optim, MuonConf) and not 1 <= optim.ns_steps < 100:
        raise ConfigError(f"optim.ns_steps should be from 1 to 99 but is {optim.ns_steps}")
    if isinstance(optim, SoapConf) and optim.interval < 1:
        raise ConfigError(f"optim.interval should be at least 1 but is {optim.interval}")
    if isinstance(optim, AdamWConf) and not optim.eps >= 0:
        raise ConfigError(f"optim.eps should be >= 0 but is {optim.eps}")


def _floats(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _floats(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            yield prefix + key, value


def to_plain(recipe: Recipe | OptimConf | TaskConf) -> dict[str, Any]:
    """Builtin types alone, enums by name: what is written to ``config.yaml``."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(recipe), resolve=True, enum_to_str=True))


def save(recipe: Recipe) -> str:
    """The text of ``config.yaml``."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(recipe)))


def load(path: Path) -> Recipe:
    """Read a ``config.yaml`` back. Values only: nothing in it is ever imported or called."""
    return parse(path.read_text(encoding="utf8"))


def parse(text: str) -> Recipe:
    """The recipe in the text of a ``config.yaml``."""
    return _build(cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(text))))


def identity(recipe: Recipe) -> str:
    """Eight hex digits that name the recipe, whatever its seed and wherever its record is."""
    plain = to_plain(recipe)
    for key in NOT_IN_THE_NAME:
        *groups, name = key.split(".")
        del reduce(getitem, groups, plain)[name]
    for key, before in CAME_LATER.items():
        group, name = key.split(".")
        if plain[group].get(name) == before:
            del plain[group][name]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]


def options(conf: TaskConf | OptimConf) -> dict[str, Any]:
    """The fields of a config as keyword arguments: no name, enums as strings."""
    return {k: v.name if isinstance(v, Enum) else v for k, v in vars(conf).items() if k != "name"}
