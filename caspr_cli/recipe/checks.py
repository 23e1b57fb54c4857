"""Checks that types cannot make: numbers out of their range, and keys that do not fit each other."""

import math
import re
from collections.abc import Mapping
from typing import Any

from caspr_cli.common.shape import leaves
from caspr_cli.optim import family, registry
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import OPTIMIZERS, KroneckerConf, Recipe, Source, Strategy, TaskConf, TrainerConf

# The least and the most of each whole number. More than the most is a slip: memory does not suffice, or something
# overflows after hours. The keys of optimizers have their ranges in caspr_cli.optim.
LIMITS: dict[str, tuple[float, float]] = {
    "seed": (-(2**63), 2**63 - 1),
    "search.trials": (1, 2**20), "search.rerank": (0, 2**20), "search.refine": (0, 100),
    "trainer.devices": (1, 1024), "trainer.nodes": (1, 10**5), "trainer.max_steps": (1, 10**9),
    "trainer.val_every": (1, 10**9), "trainer.log_every": (1, 10**9), "trainer.accumulate": (1, 10**6),
    "trainer.workers": (0, 1024), "trainer.timeout": (0, 10**7),
    "task.batch_size": (1, 10**7), "task.vocab_size": (1, 10**7), "task.sequence": (1, 10**7),
    "task.layers": (1, 10**4), "task.width": (1, 10**6), "task.heads": (1, 10**5), "task.steps": (1, 10**4),
    "task.train_documents": (1, 10**12), "task.eval_documents": (1, 10**12), "task.max_length": (1, 10**6),
    "task.size": (1, 10**5), "task.depth": (1, 10**4), "task.stem": (1, 10**4), "task.patch": (1, 10**5),
    "task.mixup": (0, 10**6), "task.word_dropout": (0, 10**6),
}  # fmt: skip
SHARES = ("task.dropout", "task.label_smoothing")  # in [0, 1)
LOWER_IS_BETTER = ("val/loss", "val/perplexity", "val/bits_per_byte")
ROW_BY_ROW = ("adamw", "sgd")  # whose step of some rows needs no others


def check(recipe: Recipe, plain: Mapping[str, Any]) -> None:
    """Raise ConfigError, which names key and value, if a recipe (``plain``: in builtin types) cannot be run."""
    values = dict(leaves(plain))
    for key, (least, most) in LIMITS.items():
        if (value := values.get(key)) is not None and not least <= value <= most:
            bound = f"least {least:,}" if value < least else f"most {most:,}"
            raise ConfigError(f"{key} should be at {bound} but is {value}")
    for key in SHARES:
        if not 0 <= values.get(key, 0) < 1:
            raise ConfigError(f"{key} should be in [0, 1) but is {values[key]}")
    _check_optim(plain["optim"], recipe.trainer.strategy)
    _check_trainer(recipe.trainer, recipe.task.batch_size)
    schedule = recipe.schedule
    for key in ("schedule.warmup", "schedule.decay"):
        if not 0 <= values[key] <= 1:
            raise ConfigError(f"{key} is a fraction of the run, 0 to 1, but is {values[key]}")
    if schedule.warmup + schedule.decay > 1 + 1e-9:
        both = schedule.warmup + schedule.decay
        raise ConfigError(f"schedule.warmup + schedule.decay should be at most 1 but is {both:g}")
    _check_task(recipe.task)
    if not recipe.output_dir:
        raise ConfigError("output_dir is empty: name a directory")
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value) and key != "optim.order":
            raise ConfigError(f"{key} should be a finite number but is {value}")
        if isinstance(value, str) and ("\0" in value or value != value.encode(errors="replace").decode()):
            raise ConfigError(f"{key} should be text in UTF-8 but is {value!r}")


def _check_trainer(trainer: TrainerConf, batch: int) -> None:
    if not trainer.timeout > 0:
        raise ConfigError(f"trainer.timeout should be > 0 but is {trainer.timeout}")
    if trainer.clip_norm is not None and not trainer.clip_norm > 0:
        raise ConfigError(f"trainer.clip_norm should be > 0, or null for no clipping, but is {trainer.clip_norm}")
    parts = trainer.devices * trainer.nodes * trainer.accumulate
    if batch % parts:
        nodes = " x trainer.nodes" if trainer.nodes > 1 else ""
        factors = f"trainer.devices{nodes} x trainer.accumulate"
        raise ConfigError(f"task.batch_size should be a multiple of {factors} = {parts} but is {batch}")
    if trainer.strategy == Strategy.fsdp:
        if trainer.devices * trainer.nodes == 1:
            raise ConfigError("trainer.strategy=fsdp divides the model among processes: add trainer.devices=N")
        if trainer.compile:
            raise ConfigError("trainer.strategy=fsdp with trainer.compile=true is not supported: take one of them")
    if trainer.rendezvous is not None:
        place = re.fullmatch(r"(?:[^\s:\[\]]+|\[[0-9a-fA-F:]+\]):(\d{1,6})", trainer.rendezvous)
        if place is None:
            raise ConfigError(f"trainer.rendezvous should be HOST:PORT but is '{trainer.rendezvous}'")
        if not 1 <= int(place[1]) <= 65535:
            raise ConfigError(f"trainer.rendezvous={trainer.rendezvous}: a port is a number from 1 to 65535")


def _check_task(task: TaskConf) -> None:
    """Refuse keys that would be ignored, or would mean the opposite, without a message."""
    if task.root is not None and task.data != Source.files:
        raise ConfigError(f"task.root={task.root} needs task.data=files, but task.data={task.data.name}")
    if task.root == "":
        raise ConfigError("task.root is empty: name a directory")
    if task.target.metric in LOWER_IS_BETTER and task.target.higher_is_better:
        raise ConfigError(
            f"task.target.metric={task.target.metric}: less is better; add task.target.higher_is_better=false, and "
            "task.target.value, or null for none"
        )


def _check_optim(plain: Mapping[str, Any], strategy: Strategy) -> None:
    divisible = [n for n, conf in OPTIMIZERS.items() if issubclass(conf, KroneckerConf) or n in ROW_BY_ROW]
    if strategy == Strategy.fsdp and plain["name"] not in divisible:
        raise ConfigError(
            f"optim={plain['name']} needs whole matrices, of which trainer.strategy=fsdp has rows: take "
            f"trainer.strategy=ddp, or one of {', '.join(divisible)}"
        )
    keys = registry.OPTIMIZERS[plain["name"]].keys
    if found := family.wrong(keys, plain):
        raise ConfigError(f"optim.{found.key} {found.should} but is {found.value}")
    for key, option in family.options_of(keys).items():
        most = option.allowed.most if option.allowed else None
        if key in plain and most is not None and most < plain[key] < math.inf:
            raise ConfigError(f"optim.{key} should be at most {most:,} but is {plain[key]}")


def takes(name: str, key: str, value: Any) -> bool:
    """Return whether the optimizer of this name has such an option, and may have this value of it."""
    known = family.options_of(registry.OPTIMIZERS[name].keys).get(key)
    return known is not None and (known.allowed is None or known.allowed.holds(value))
