"""The LightningModule: a task, its model and an optimizer, and nothing that knows where numbers are written."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from caspr_cli.optim.finite import norms_of_rows
from caspr_cli.optim.fsdp import is_sharded, local
from caspr_cli.optim.registry import build
from caspr_cli.recipe.compose import options
from caspr_cli.recipe.schema import Decay, Recipe
from caspr_cli.tasks.base import Task
from caspr_cli.training.batch_norm import measured_anew, statistics
from caspr_cli.training.data import mix
from caspr_cli.training.schedule import factor
from caspr_cli.training.sharded import ShardedStrategy, divide
from caspr_cli.training.timing import PhaseTimer

STATISTICS = "training_statistics"  # in a checkpoint: those of batch norms, where the model has others to evaluate with
BATCHES = 20  # of training, that give the others


def clip(params: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scale gradients, as ``torch.nn.utils.clip_grad_norm_`` does, and return the norm that they had together.

    A tensor whose gradient is not finite does not count, so that it breaks no other: it is the optimizer's to leave it
    out. Nothing waits for the device.
    """
    grads = {p: G for p in params if (G := p.grad) is not None}
    if not grads:
        return torch.zeros(())
    norms = _norms(list(grads.values()))
    norm: Tensor = torch.linalg.vector_norm(torch.where(torch.isfinite(norms), norms, 0))
    if limit is not None:
        torch._foreach_mul_([local(G) for G in grads.values()], (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _norms(tensors: list[Tensor]) -> Tensor:
    """Return the norm of each tensor ``[n]``, of which ranks may have rows: a collective operation then."""
    whole = [t for t in tensors if not is_sharded(t)]
    norms = norms_of_rows({t: local(t) for t in tensors if is_sharded(t)})
    norms |= zip(whole, torch._foreach_norm(whole) if whole else (), strict=True)
    return torch.stack([norms[t] for t in tensors])


class TrainingModule(LightningModule):
    """Training, validation and test steps of a task.

    After each optimizer step, ``last`` holds tensors that cost nothing unless they are read: the loss of the step's
    batch, the norm of the gradient, and, where ``measure_update`` was set before it, the norm of the change.
    """

    def __init__(self, task: Task, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.task, self.model, self.recipe = task, model, recipe
        # In a dict, which is no part of the module: a module in bfloat16 would count in bfloat16.
        self.metrics = {"val": task.metrics(), "test": task.metrics()}
        if recipe.trainer.compile:
            model.compile()
        self.timer = PhaseTimer(torch.device("cpu"))
        # The running statistics of training, while those of averaged weights are in the model.
        self._statistics: dict[str, Tensor] = {}
        self.measure_update = False
        self.last: dict[str, Tensor] = {}
        self.scores: dict[str, dict[str, float]] = {}

    def configure_model(self) -> None:
        """Divide the parameters among ranks, where the strategy is one that does. (Lightning asks before each use.)"""
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy) and not any(map(is_sharded, self.model.parameters())):
            divide(self.model, strategy.device_mesh["data_parallel"])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        conf = self.recipe.optim
        settings = options(conf)
        if settings.get("ramp_steps") == 0:
            settings["ramp_steps"] = self.recipe.trainer.max_steps
        optimizer = build(conf.name, self.task.param_groups(self.model), settings)
        schedule = self.recipe.schedule
        if hasattr(optimizer, "eval"):  # an average of the weights replaces the decay
            schedule = replace(schedule, name=Decay.constant)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: factor(step, self.recipe.trainer.max_steps, schedule)
        )
        each_step: LRSchedulerConfigType = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": each_step}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # Dropout and the like are a function of (seed, step, part, rank): there is no random state to save.
        part = batch_idx % self.recipe.trainer.accumulate
        self._draw(mix(self.recipe.seed, self.global_step, part, self.global_rank))
        loss = self.task.loss(self.model, batch)
        share = loss.detach().double() / self.recipe.trainer.accumulate
        self.last["loss"] = share if part == 0 else self.last["loss"] + share
        return loss

    def _draw(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 2 ms to prepare devices that are not used
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        self.last["grad_norm"] = clip(self.model.parameters(), self.recipe.trainer.clip_norm)
        # The last thing before the optimizer's own work.
        self.timer.start("step")

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        before = [p.detach().clone() for p in self.model.parameters()] if self.measure_update else None
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.timer.stop("step")
        if before is not None:
            after = [p.detach() for p in self.model.parameters()]
            changes = [new - old for new, old in zip(after, before, strict=True)]
            self.last["update_norm"] = torch.linalg.vector_norm(_norms(changes))
            self.last["weight_norm"] = torch.linalg.vector_norm(_norms(after))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.task.evaluate(self.model, batch, self.metrics["val"])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.task.evaluate(self.model, batch, self.metrics["test"])

    def weights(self, mode: Literal["train", "eval"]) -> None:
        """Put the weights to train with, or those to evaluate and to save, into the model.

        They are two where the optimizer averages its weights, and then has methods of these names. Nothing happens
        where they are in the model already. Running statistics of batch norms are of the weights of training, so the
        first batches of the run give those of the averaged ones, as the authors of Schedule-Free recommend.
        """
        switches = [switch for optimizer in self.trainer.optimizers if (switch := getattr(optimizer, mode, None))]
        for switch in switches:
            switch()
        kept = statistics(self.model) if switches else {}
        if mode == "eval" and kept and not self._statistics:
            self._statistics = {name: value.clone() for name, value in kept.items()}
            self._measure_statistics()
        elif mode == "train" and self._statistics:
            for name, value in self._statistics.items():
                kept[name].copy_(value)
            self._statistics = {}

    def _measure_statistics(self) -> None:
        """Measure the running statistics with the weights that are in the model; all ranks must call this."""
        precision = self.trainer.precision_plugin
        with measured_anew(self.model), precision.forward_context():
            for i, batch in enumerate(self.trainer.datamodule.first_batches(BATCHES)):  # type: ignore[attr-defined]
                self._draw(mix(self.recipe.seed, i, self.global_rank))
                batch = self.trainer.strategy.batch_to_device(precision.convert_input(batch))
                self.task.loss(self.model, batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._statistics:
            checkpoint[STATISTICS] = self._statistics

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._statistics = checkpoint.get(STATISTICS, {})

    def on_train_start(self) -> None:
        self.weights("train")  # a checkpoint has those to evaluate

    on_validation_end = on_test_end = on_train_start

    def on_validation_start(self) -> None:
        self.weights("eval")
        for metric in self.metrics.values():
            metric.to(self.device)

    on_test_start = on_validation_start

    def on_validation_epoch_end(self) -> None:
        self._score("val")

    def on_test_epoch_end(self) -> None:
        self._score("test")

    def _score(self, split: str) -> None:
        """Compute the metric over all ranks, and reset it."""
        metric = self.metrics[split]
        self.scores[split] = {f"{split}/{name}": float(value) for name, value in metric.compute().items()}
        metric.reset()
