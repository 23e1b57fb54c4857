"""The recipe: every key that a run can be given, with its type, default and meaning.

Plain dataclasses; importing this module imports no torch. Hydra checks YAML and command line against them, and the
worker gets the frozen result as one :class:`Recipe`.
"""

import re
from dataclasses import dataclass, field, make_dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from caspr_cli.common.errors import UserError
from caspr_cli.optim import registry
from caspr_cli.optim.family import Entry, FullAdagradOptions, options_of
from caspr_cli.recipe.task import Source as Source
from caspr_cli.recipe.task import Target as Target
from caspr_cli.recipe.task import TaskConf as TaskConf

# ---- optimizers: their keys are declared in caspr_cli.optim ---------------------------------------------------------


@dataclass
class OptimConf:
    """The keys of every optimizer; each adds its own."""

    name: str = MISSING
    lr: float = 1e-3
    weight_decay: float = 0.0  # not applied to vectors and scalars


@dataclass
class KroneckerConf(OptimConf):
    """CASPR, Shampoo and full-matrix Adagrad: one engine."""


KINDS = r"(int|float|bool|str)( \| (int|float|str))?( \| None)?|tuple\[float, float\]"  # and Literal: names


def _enum(option: str, words: tuple[str, ...]) -> type[Enum]:
    """Return the enumeration of an option's words. All optimizers with this option share it."""
    name = f"{option.title().replace('_', '')}Choice"
    if name not in globals():  # where pickle looks for it
        globals()[name] = Enum(name, [(word, word) for word in words], module=__name__)
    found: type[Enum] = globals()[name]
    return found


def _optimizer(name: str, entry: Entry) -> type[OptimConf]:
    """Return the dataclass of an optimizer's keys. A choice of words is an enumeration in it, as OmegaConf wants it."""
    keys: list[tuple[str, Any, Any]] = [("name", str, field(default=name))]
    for each in options_of(entry.keys).values():
        kind: Any = each.kind
        default = entry.defaults.get(each.name, each.default)
        if words := tuple(word for word in each.choices if isinstance(word, str)):
            words_of = _enum(each.name, words)
            kind = words_of | None if None in each.choices else words_of
            default = words_of[default] if default is not None else None
        elif each.in_recipe and not re.fullmatch(KINDS, kind):
            raise UserError(f"optim={name}: the type of {each.name}, {kind}, is not one that a recipe can have")
        if each.in_recipe:
            keys.append((each.name, kind, field(default=default)))
    base = KroneckerConf if issubclass(entry.keys, FullAdagradOptions) else OptimConf
    made = make_dataclass(f"{name.title().replace('_', '')}Conf", keys, bases=(base,))
    made.__module__ = __name__
    globals()[made.__name__] = made
    return made


OPTIMIZERS: dict[str, type[OptimConf]] = {name: _optimizer(name, entry) for name, entry in registry.OPTIMIZERS.items()}
CasprConf, AdamWConf, SGDConf = (OPTIMIZERS[name] for name in ("caspr", "adamw", "sgd"))


# ---- the rest of a run -------------------------------------------------------------------------------------------


# Of the model; statistics and roots of the optimizer keep their own.
Precision = Enum("Precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"])
Accelerator = Enum("Accelerator", {"auto": "auto", "cpu": "cpu", "gpu": "gpu"})
Strategy = Enum("Strategy", {"ddp": "ddp", "fsdp": "fsdp"})
Decay = Enum("Decay", {"constant": "constant", "linear": "linear", "cosine": "cosine"})


class Resume(Enum):
    auto = "auto"  # skip what is done, continue what was cut off; a failed run stays failed
    retry = "retry"  # and run what failed again
    never = "never"  # delete the record and start anew


class Logger(Enum):
    csv = "csv"  # csv/metrics.csv and csv/hparams.yaml in the record
    wandb = "wandb"  # Weights & Biases, set by its own variables: WANDB_MODE=offline, WANDB_PROJECT
    mlflow = "mlflow"  # MLflow: MLFLOW_TRACKING_URI, or mlflow.db in output_dir


@dataclass
class ScheduleConf:
    """The learning rate over the run, as fractions of ``trainer.max_steps``."""

    name: Decay = Decay.cosine  # shape of the decay
    warmup: float = 0.05  # linear from 0
    decay: float = 0.95  # the last part of the run, in which the rate falls to zero


@dataclass
class TrainerConf:
    """How the run is carried out."""

    accelerator: Accelerator = Accelerator.auto
    devices: int = 1  # processes on this machine, one device each
    nodes: int = 1  # machines with so many devices each; the same command is started on each of them
    strategy: Strategy = Strategy.ddp  # of several processes: ddp, each has the model; fsdp, each has a part of it
    rendezvous: str | None = None  # where they meet: HOST:PORT of one of them; null: from SLURM's variables
    precision: Precision = Precision["32-true"]
    max_steps: int = 400  # optimizer steps
    val_every: int = 100  # steps between two validations; each also writes a checkpoint
    log_every: int = 10  # steps between two points of the training curves
    accumulate: int = 1  # forward-backward passes to one step; task.batch_size stays the whole batch
    clip_norm: float | None = 1.0  # largest norm of the whole gradient; null: no clipping
    compile: bool = False  # torch.compile the model
    timeout: float = 600.0  # seconds that a rank waits for another before the run counts as cut off
    keep_checkpoints: bool = True  # of a run that is done; what is cut off keeps its own in any case
    workers: int | None = None  # processes a rank that read samples ahead; null: some where files are decoded, else 0


@dataclass
class SearchConf:
    """A space of values (caspr_cli/recipe/search.py), from which ``trial`` takes a point."""

    name: str | None = None  # null: no search
    trials: int = 20  # that every optimizer is given; trial=best chooses among them
    space: dict[str, dict[str, list[Any]]] = field(default_factory=dict)  # key: {log: [low, high]}, ...
    rerank: int = 0  # so many of the best trials are run at two more seeds before trial=best chooses; 0, 1: none
    # so many rounds of two trials each follow. They are the best one so far with half and twice the value of one key,
    # or nearer where these were tried. Keys take turns, the learning rate first
    refine: int = 0


@dataclass
class Recipe:
    """One run, frozen."""

    task: TaskConf = MISSING
    optim: OptimConf = MISSING
    scale: str = "sample"
    debug: str = "none"
    trainer: TrainerConf = field(default_factory=TrainerConf)
    schedule: ScheduleConf = field(default_factory=ScheduleConf)
    search: SearchConf = field(default_factory=SearchConf)
    # of the search, from 0; best: the one that ended best in validation; top1, top2, ...: those that ended best at the
    # tuning seed; default: none, but the optimizer's own values
    trial: int | str | None = None
    # null, or so many steps: a shorter run, of the trial that is chosen for trainer.max_steps
    horizon: int | None = None
    seed: int = 0
    resume: Resume = Resume.auto
    output_dir: str = "outputs"
    logger: list[Logger] = field(default_factory=list)  # Lightning's, beside TensorBoard: csv, wandb, mlflow
