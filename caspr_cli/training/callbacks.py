"""Callbacks of Lightning: curves, checkpoints, and an orderly end after a signal."""

import math
import os
import signal
from dataclasses import asdict
from types import FrameType
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from caspr_cli.common.alive import lives
from caspr_cli.common.selection import reaches
from caspr_cli.optim.cost import state_bytes
from caspr_cli.optim.device import Question, sent
from caspr_cli.optim.engine import KroneckerOptimizer
from caspr_cli.optim.probe import counters, diagnose
from caspr_cli.recipe.schema import Recipe, Strategy
from caspr_cli.runs.processes import LAUNCHER
from caspr_cli.runs.record import Record
from caspr_cli.training.checkpoints import OWNER, Owner, Start, link, put_in_place
from caspr_cli.training.module import TrainingModule
from caspr_cli.training.progress import Progress
from caspr_cli.training.recorder import Recorder
from caspr_cli.training.timing import Clock, PhaseTimer

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)  # clusters send the last
ASK_EVERY = 4  # steps on GPUs after which ranks ask each other whether to stop
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


class Curves(Callback):
    """Training and validation curves, the best value, and when the target was reached.

    ``recorder`` and ``progress`` are None on all ranks but the first.
    """

    def __init__(self, recipe: Recipe, recorder: Recorder | None, progress: Progress | None) -> None:
        self.recipe, self.recorder, self.progress = recipe, recorder, progress
        self.clock = Clock()  # training alone
        self.losses: list[torch.Tensor] = []  # of the steps since the last point of the curve
        self.units = 0
        self.mark = (0, 0.0)  # step and seconds of that point
        self.best: dict[str, Any] = {}
        self.target: dict[str, Any] = {"step": None, "seconds": None}
        self.final: dict[str, Any] = {}  # the latest validation
        self.lr = 0.0
        self._phases: dict[str, float] | None = None  # of an earlier process
        self._state_bytes, self._stepped = 0, None  # type: int, torch.optim.Optimizer | None

    @property
    def state_bytes(self) -> int:
        """Bytes of this rank's optimizer state after the last step; a loaded state is whole until the next."""
        return state_bytes(self._stepped.state) if self._stepped else self._state_bytes

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.clock.seconds,
            "losses": torch.stack(self.losses).cpu() if self.losses else torch.empty(0, dtype=torch.float64),
            "units": self.units,
            "mark": self.mark,
            "best": self.best,
            "target": self.target,
            "final": self.final,
            "phases": self._timer.seconds,
            "state_bytes": self.state_bytes,
            "lines": self.recorder.lines if self.recorder else 0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clock = Clock(state["seconds"])
        self.losses = list(state["losses"])
        self.units, self.mark = state["units"], tuple(state["mark"])
        self.best, self.target, self.final = state["best"], state["target"], state["final"]
        self._phases, self._state_bytes = state["phases"], state["state_bytes"]

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._timer = cast(TrainingModule, module).timer = PhaseTimer(module.device, self._phases)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        if isinstance(optimizer, KroneckerOptimizer):
            optimizer.phase = self._timer
            optimizer.timeout = self.recipe.trainer.timeout

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.clock.start()  # from its pause: validations and checkpoints are no training
        next_step = trainer.global_step + 1
        everywhere = self.recipe.trainer.strategy == Strategy.fsdp  # each rank has a part of what is measured
        wanted = everywhere or self.recorder is not None
        cast(TrainingModule, module).measure_update = wanted and next_step % self.recipe.trainer.log_every == 0
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]  # of this step; the scheduler moves on before its end

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = cast(TrainingModule, module)
        self.units += module.task.units(batch) * trainer.world_size
        if (batch_idx + 1) % self.recipe.trainer.accumulate:
            return
        self._stepped = trainer.optimizers[0]
        self.losses.append(module.last["loss"])
        if trainer.global_step % self.recipe.trainer.log_every == 0:
            self._point(trainer, module)

    def _point(self, trainer: Trainer, module: TrainingModule) -> None:
        """Write one point of the training curves; nothing else waits for the device."""
        losses = torch.stack([x.to(module.device) for x in self.losses])  # those of a checkpoint are on the CPU
        loss = float(trainer.strategy.reduce(losses.mean(), reduce_op="mean"))
        step, seconds = trainer.global_step, self.clock.seconds
        a_step = (seconds - self.mark[1]) / (step - self.mark[0])
        values = {
            "train/loss": loss,
            "lr": self.lr,
            "norm/gradient": float(module.last["grad_norm"]),
            "time/step_ms": 1000 * a_step,
            f"time/{module.task.unit}_per_second": self.units / (seconds - self.mark[1]),
        }
        if "update_norm" in module.last:
            values["norm/update"] = float(module.last["update_norm"])
            values["norm/update_over_weights"] = values["norm/update"] / float(module.last["weight_norm"])
        if self.recorder:
            self.recorder.scalars(step, values)
        if self.progress:
            self.progress.train(step, loss, values["lr"], a_step, self.units / (seconds - self.mark[1]))
        self.losses, self.units, self.mark = [], 0, (step, seconds)
        _refuse_nan("training loss", loss, step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.pause()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.pause()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        module = cast(TrainingModule, module)
        step, scores = trainer.global_step, module.scores["val"]
        _refuse_nan("validation loss", scores["val/loss"], step)
        self.final = {"step": step, **scores}
        metric = self.recipe.task.target.metric
        if metric in scores and (not self.best or self._better(scores[metric], self.best[metric])):
            self.best = self.final
        wanted, note = self.recipe.task.target.value, ""
        higher = self.recipe.task.target.higher_is_better
        reached = wanted is not None and reaches(scores[metric], wanted, higher_is_better=higher)
        if reached and self.target["step"] is None:
            self.target = {"step": step, "seconds": self.clock.seconds}
            note = f"  target {wanted:g} reached"
        values = scores | {"time/seconds": self.clock.seconds} | self._diagnostics(trainer)
        for name in ("rejected_roots", "skipped_gradients"):
            if count := values.get(f"optim/{name}"):
                note += f"  {name.replace('_', ' ')} so far: {count:g}"
        if self.recorder:
            self.recorder.scalars(step, values)
            self.recorder.flush()
        if self.progress:
            self.progress.validation(step, scores, note)

    def _better(self, a: float, b: float) -> bool:
        return a > b if self.recipe.task.target.higher_is_better else a < b

    def _diagnostics(self, trainer: Trainer) -> dict[str, float]:
        """Return the diagnostics of all blocks, on the first rank."""
        optimizer = trainer.optimizers[0] if trainer.optimizers else None
        if not isinstance(optimizer, KroneckerOptimizer) or (self.recorder is None and optimizer.ranks == 1):
            return {}
        found, counts = diagnose(optimizer), counters(optimizer)
        if optimizer.ranks > 1:
            if optimizer.repeats:
                found, counts = {}, counts | {"rejected_roots": 0}
            found, counts = _of_all_ranks(found, counts)
        if self.recorder is None:
            return {}
        if (spectrum := found.pop("spectrum", None)) is not None and len(spectrum):
            self.recorder.spectrum(trainer.global_step, spectrum)
        values: dict[str, float] = {}
        for name, x in found.items():
            cuts = torch.quantile(x, torch.tensor(list(QUANTILES.values()), dtype=x.dtype, device=x.device))
            values |= {f"optim/{name}/{q}": v for q, v in zip(QUANTILES, cuts.tolist(), strict=True)}
            values[f"optim/{name}/max"] = float(x.max())
        return values | {f"optim/{name}": float(count) for name, count in counts.items()}


def _of_all_ranks(found: dict[str, Tensor], counts: dict[str, int]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the diagnostics of all ranks together; each has those of the blocks that it owns."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ({name: x.cpu() for name, x in found.items()}, counts))
    parts: dict[str, list[Tensor]] = {}
    for theirs, _ in everyone:
        for name, x in theirs.items():
            parts.setdefault(name, []).append(x)
    counts = counts | {"rejected_roots": sum(theirs["rejected_roots"] for _, theirs in everyone)}
    return {name: torch.cat(x) for name, x in parts.items()}, counts


def _refuse_nan(name: str, loss: float, step: int) -> None:
    """End a run that has diverged, before it saves over its last good checkpoint."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the {name} is {loss} at step {step}: a lower optim.lr may help")


class Checkpoints(Callback):
    """``last.ckpt`` at each validation and after the last step, ``best.ckpt`` beside it, and the one before it.

    Comes after :class:`Curves` in the list of callbacks. ``owner`` is written into each.
    """

    def __init__(self, record: Record, curves: Curves, start: Start, owner: Owner) -> None:
        self.record, self.curves, self.owner = record, curves, owner
        # A last checkpoint that could not be used must not displace the one that this attempt goes on from.
        self._keep = start.checkpoint == record.last

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == trainer.max_steps and not validation_follows(trainer, batch_idx):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.save(trainer)
        elif trainer.is_global_zero and self.curves.best.get("step") == trainer.global_step:
            link(self.record.last, self.record.best)  # the validation after the last step, which is saved

    def save(self, trainer: Trainer) -> None:
        """Save a checkpoint; all ranks must call this."""
        temporary = self.record.checkpoints / ".writing.ckpt"
        self.record.checkpoints.mkdir(exist_ok=True)
        module = cast(TrainingModule, trainer.lightning_module)
        module.weights("eval")
        trainer.save_checkpoint(temporary)
        module.weights("train")
        if self.curves.recorder:
            self.curves.recorder.flush()  # a checkpoint stands for lines that are on the disk
            best = self.curves.best.get("step") == trainer.global_step
            put_in_place(temporary, self.record, best=best, keep=self._keep)
            self.record.update_status(step=trainer.global_step)
        self._keep = True

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Mark the checkpoint as one between two steps.

        Inside the callbacks in which a checkpoint is written Lightning counts the batch as begun but not completed,
        and on resuming would count it again: validations would come a batch late from there on.
        """
        checkpoint[OWNER] = asdict(self.owner) | {"step": trainer.global_step}
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts.update(dict.fromkeys(counts, counts["ready"]))


class Stopped(Exception):
    """The run was asked to stop early, and is saved. (With ``should_stop`` Lightning would validate once more.)"""


class StopOnSignal(Callback):
    """After SIGTERM or SIGINT, or without a launcher: finish the step, save, raise :class:`Stopped`."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        # Its launcher is this process's parent, or (several ranks) the parent of torch's launcher.
        self._parent, self._launcher = os.getppid(), int(os.environ.get(LAUNCHER, os.getpid()))
        self._stop_requested = False
        self._asked: Question | None = None  # whether any rank was, of GPUs that may not have come to it
        self._listen()

    def _listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._request_stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the launcher holds SIGUSR2 back until now

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        # Lightning has put its own handler in front, which broadcasts to the other ranks from inside the signal:
        # a collective in the middle of whatever collective the step is in. It is never called, so what Lightning asks
        # the ranks about it before each step, which waits for the device, has no use.
        self._listen()
        cast(Any, trainer.fit_loop.epoch_loop)._broadcast_sigterm_tensor = lambda: None

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_requested = True

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        early = trainer.global_step < trainer.max_steps
        # Where a validation comes next, it is part of the record that this checkpoint would stand for.
        if between_steps and early and not validation_follows(trainer, batch_idx):
            on_gpus = trainer.world_size > 1 and module.device.type == "cuda"
            if self._agreed_before(trainer.global_step, module.device) if on_gpus else self._agreed(trainer):
                self.checkpoints.save(trainer)
                raise Stopped

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop if asked to; :class:`Checkpoints` has saved before."""
        if trainer.state.fn == TrainerFn.FITTING and trainer.global_step < trainer.max_steps and self._agreed(trainer):
            raise Stopped

    def _agreed(self, trainer: Trainer) -> bool:
        """Return whether any rank was asked to stop: a signal may reach one a step earlier, and they stop together."""
        return bool(trainer.strategy.reduce_boolean_decision(self._should_stop(), all=False))

    def _agreed_before(self, step: int, device: torch.device) -> bool:
        """Return what ranks agreed on when they last asked, which is every few steps, so that none waits for its GPU:
        a step later the answer is there."""
        answer = self._asked is not None and bool(self._asked.answer()[0])
        self._asked = None
        if step % ASK_EVERY == 0:
            stop = sent(torch.tensor([int(self._should_stop())], device="cpu"), device)
            dist.all_reduce(stop, op=dist.ReduceOp.MAX)
            self._asked = Question(stop)
        return answer

    def _should_stop(self) -> bool:
        # A dead launcher that nobody has waited for still answers to its number, but is no parent any more.
        return self._stop_requested or os.getppid() != self._parent or not lives(self._launcher)


def validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether Lightning validates after this batch."""
    return (batch_idx + 1) % cast(int, trainer.val_check_batch) == 0
