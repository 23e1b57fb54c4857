"""One run from start to result, in this process (one rank)."""

import logging
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from torch.optim.optimizer import Optimizer

from caspr_cli.common import plugins
from caspr_cli.common.errors import nearest
from caspr_cli.optim.cost import blocks_of, products_dtype, step_flops
from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe, Strategy
from caspr_cli.runs import fingerprint, provenance
from caspr_cli.runs.record import PROVENANCE, Record, RecordDamagedError
from caspr_cli.tasks.base import Task
from caspr_cli.training.batch_norm import synchronize
from caspr_cli.training.begin import Begun, naming_the_key
from caspr_cli.training.blame import blaming
from caspr_cli.training.callbacks import Checkpoints, Curves, StopOnSignal, Stopped
from caspr_cli.training.checkpoints import Owner, Start, WholeFile, find
from caspr_cli.training.data import TaskData
from caspr_cli.training.module import TrainingModule
from caspr_cli.training.ranks import answering
from caspr_cli.training.recorder import Recorder
from caspr_cli.training.sharded import ShardedStrategy

# What Lightning would do by itself, and this package does.
OURS: dict[str, Any] = {
    "max_epochs": -1, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0, "use_distributed_sampler": False,
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


def fit(begun: Begun, record: Record, *, rank: int, world: int) -> dict[str, Any] | None:
    """Train, validate and test; continue from the record's last checkpoint if there is one.

    Return the content of ``result.json``, or None if a signal ended the run early (it is saved).
    """
    _silence()
    recipe, task, progress, described = begun.recipe, begun.task, begun.progress, begun.described
    owner = Owner.of(recipe, described)
    start = find(record, owner, recipe.trainer.max_steps)
    torch.manual_seed(recipe.seed)
    with blaming(recipe, plugins.TASKS):
        module = TrainingModule(task, task.model(), recipe)
        with naming_the_key(recipe):  # a throwaway one: options that do not fit are refused before anything is written
            optimizer = module.configure_optimizers()["optimizer"]
        _check_target(recipe, task)
        data = TaskData(task, recipe, start=start.step, rank=rank, world=world)
    writing = Recorder(record, recipe, start.step, start.lines) if rank == 0 else nullcontext()
    with answering(record, rank, world, recipe.trainer.timeout), writing as recorder:
        curves = Curves(recipe, recorder, progress)
        checkpoints = Checkpoints(record, curves, start, owner)
        trainer = _trainer(recipe, record, [curves, checkpoints, StopOnSignal(checkpoints)], world)
        if world > 1:
            module.model = synchronize(module.model, trainer.strategy.root_device)
        if recorder and progress:
            device = _device(trainer, optimizer, world)
            origin = provenance.completed(record.read(PROVENANCE), {"data": described, "device": device})
            record.write(PROVENANCE, origin)
            if begun.files is not None:
                fingerprint.keep(record, begun.files)
            recorder.pages()
            with blaming(recipe, plugins.TASKS):
                header = _header(module, optimizer, trainer, world, device.get("products"))
            for line in header:
                progress.say(line)
            if changed := provenance.changes(origin):
                progress.say(f"warning  this run began with {'; '.join(changed)}")
        try:
            with progress or nullcontext(), _naming_the_checkpoint(start, data):
                trainer.fit(module, data, ckpt_path=start.checkpoint, weights_only=True)
        except Stopped:
            return None
        if curves.final.get("step") != trainer.global_step:
            trainer.validate(module, data, verbose=False)
        trainer.test(module, data, verbose=False)
        if recorder is None:
            return None
        recorder.scalars(trainer.global_step, module.scores["test"])
        recorder.ended = "success"
        return _result(recipe, module, trainer, curves)


@contextmanager
def _naming_the_checkpoint(start: Start, data: TaskData) -> Iterator[None]:
    """Name a checkpoint whose checksums are right and whose content does not fit the run."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        of_shape = not isinstance(error, RuntimeError) or "state_dict" in str(error) or "size mismatch" in str(error)
        if start.checkpoint is None or data.begun or not of_shape:
            raise
        raise RecordDamagedError(start.checkpoint, "it does not fit this run's model or optimizer") from error


def _check_target(recipe: Recipe, task: Task) -> None:
    """Refuse a target whose metric is not computed in validation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing has been added to it yet
        names = [f"val/{name}" for name in task.metrics().compute()]
    if recipe.task.target.metric not in names:
        hint = nearest(recipe.task.target.metric, names, "task.target.metric=")
        raise ConfigError(f"task.target.metric should be one of {', '.join(names)}.{hint}")


def _trainer(recipe: Recipe, record: Record, callbacks: list[Any], world: int) -> Trainer:
    conf = recipe.trainer
    # Buffers (rotary tables, and running means, which are over all ranks already) are not sent at every step: in
    # validation ranks may have unequal numbers of batches, and would wait for each other for ever.
    strategy: Any = "auto"
    timeout = timedelta(seconds=conf.timeout)
    if conf.strategy == Strategy.fsdp:
        strategy = ShardedStrategy(world, 1, save_distributed_checkpoint=False, timeout=timeout)
    elif world > 1:
        strategy = DDPStrategy(broadcast_buffers=False, timeout=timeout)
    try:
        trainer = Trainer(
            accelerator=conf.accelerator.name,
            devices=conf.devices,
            num_nodes=conf.nodes,
            strategy=strategy,
            precision=conf.precision.name,  # type: ignore[arg-type]
            max_steps=conf.max_steps,
            accumulate_grad_batches=conf.accumulate,
            val_check_interval=conf.val_every * conf.accumulate,
            callbacks=callbacks,
            plugins=WholeFile(),
            default_root_dir=str(record.path),
            **OURS,
        )
    except MisconfigurationException as error:
        raise ConfigError(f"trainer.accelerator={conf.accelerator.name}: {error}") from error
    if trainer.precision != conf.precision.name:  # Lightning would take another without a word
        raise ConfigError(f"trainer.precision={conf.precision.name} is not for this device; {trainer.precision} is")
    return trainer


def _silence() -> None:
    """Silence Lightning's advice, which is for those who call it."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", message=r".*(isinstance\(treespec, LeafSpec\)|srun).*")


def _header(module: TrainingModule, optimizer: Any, trainer: Trainer, world: int, products: str | None) -> list[str]:
    recipe, (parameters, chosen) = module.recipe, _sizes(module)
    device = trainer.strategy.root_device.type
    threads = f", {torch.get_num_threads()} threads each" if device == "cpu" else ""
    lines = [
        f"model    {sum(parameters):,} parameters, {sum(chosen):,} of them in {len(chosen)} tensors to precondition",
        f"run      {recipe.trainer.max_steps} steps of {recipe.task.batch_size} samples on {world} {device}"
        f" process{'es' if world > 1 else ''}{threads}",
    ]
    if isinstance(optimizer, KroneckerOptimizer):
        flops = step_flops(optimizer, trainer.strategy.root_device)
        whole = module.task.train_flops(module.model) + sum(flops.values())
        blocks = sum(count for *_, count in blocks_of(optimizer))
        parts = ", ".join(f"{part} {100 * of / whole:.0f}" for part, of in flops.items())
        share = f"{100 * sum(flops.values()) / whole:.0f} % of a step ({parts})"
        low = f", products in {products}" if products else ""
        lines.append(f"optim    {blocks} blocks{low}; predicted from FLOPs: {share}")
    return lines


def _sizes(module: TrainingModule) -> tuple[list[int], list[int]]:
    """Return the numbers of elements of all tensors, and of those that are preconditioned."""
    plain = module.task.plain(module.model)
    named = [(name, p.numel()) for name, p in module.model.named_parameters()]
    return [n for _, n in named], [n for name, n in named if name not in plain]


def _device(trainer: Trainer, optimizer: Optimizer, world: int) -> dict[str, Any]:
    """Return what numbers depend on: the device, and the type of products that the optimizer chose for it."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    products = products_dtype(optimizer, device)
    chosen = {"products": str(products).removeprefix("torch.")} if products else {}
    return {"type": device.type, "name": name, "processes": world, "threads": torch.get_num_threads()} | chosen


def _result(recipe: Recipe, module: TrainingModule, trainer: Trainer, curves: Curves) -> dict[str, Any]:
    phases = module.timer.seconds
    parts = {name: phases.get(name, 0.0) for name in ("statistics", "roots", "apply", "communication")}
    parameters, chosen = _sizes(module)
    cuda = torch.cuda.is_available() and module.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "task": recipe.task.name,
        "optim": recipe.optim.name,
        "scale": recipe.scale,
        "seed": recipe.seed,
        "steps": trainer.global_step,
        "seconds": curves.clock.seconds,
        "final": curves.final,
        "best": curves.best,
        "test": module.scores["test"],
        "target": {"metric": recipe.task.target.metric, "value": recipe.task.target.value, **curves.target},
        "optimizer_seconds": parts | {"other": phases.get("step", 0.0) - sum(parts.values())},
        "parameters": sum(parameters),
        "preconditioned_parameters": sum(chosen),
        "optimizer_state_bytes": curves.state_bytes,  # of this rank
        "peak_memory_bytes": peak,
    }
