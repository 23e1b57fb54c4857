"""Lightning's loggers, which a run writes to beside TensorBoard: CSV in the record, Weights & Biases, MLflow.

The last two are set by their own variables, as ``WANDB_MODE=offline``, ``WANDB_PROJECT`` and ``MLFLOW_TRACKING_URI``.
"""

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger
from lightning.pytorch.loggers import Logger as LightningLogger

from caspr_cli.common.errors import not_installed
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Logger, Recipe
from caspr_cli.runs.record import TRACKERS, Record
from caspr_cli.training import hparams


def begun(recipe: Recipe, record: Record, lines: Iterable[bytes]) -> list[LightningLogger]:
    """Return the loggers of a run, which hold its keys and what earlier attempts have logged.

    That are the ``lines`` of ``metrics.jsonl``, up to the checkpoint from which the run goes on. Raises ConfigError if
    a logger cannot be used.
    """
    made = []
    for kind in dict.fromkeys(recipe.logger):
        try:
            logger, continues = MAKERS[kind](recipe, record)
            logger.log_hyperparams(hparams.hyperparameters(recipe))
        except Exception as error:  # of a package that may raise anything
            missing = not_installed(error) if isinstance(error, ImportError) else None
            hint = ". Without an account: WANDB_MODE=offline" if kind == Logger.wandb and not missing else ""
            why = missing or str(error).partition("\n")[0].rstrip(".") or type(error).__name__
            raise ConfigError(f"logger=[{kind.name}]: {why}{hint}") from error
        for line in () if continues else lines:
            values = {tag: value for tag, value in json.loads(line).items() if value is not None}
            logger.log_metrics(values, values.pop("step"))
        made.append(logger)
    return made


def end(logger: LightningLogger, how: str | None) -> None:
    """Write how a run ended: ``success``, ``failed``, or None: it was cut off, and the same command goes on."""
    logger.save()
    if how:
        logger.finalize(how)
    if isinstance(logger, WandbLogger):
        logger.experiment.finish(exit_code=int(how != "success"))


def _csv(recipe: Recipe, record: Record) -> tuple[LightningLogger, bool]:
    """Return a logger into a folder of its own. It begins anew, so that a resume leaves no line twice."""
    shutil.rmtree(record.path / "csv", ignore_errors=True)
    return CSVLogger(record.path, name="", version="csv"), False


def _wandb(recipe: Recipe, record: Record) -> tuple[LightningLogger, bool]:
    """Return a logger into ``wandb/`` in the record, and to the server.

    Offline it begins anew, with all that was logged: wandb cannot go on with a file.
    """
    import wandb

    known = record.read(TRACKERS)
    name = uuid.uuid4().hex[:8]
    earlier = list(record.path.glob("wandb/offline-run-*"))
    logger = _ContinuedWandb(
        project=os.environ.get("WANDB_PROJECT", "caspr"),
        name=_name(recipe, record),
        group=f"{recipe.task.name}/{recipe.optim.name}/{record.path.parent.name}",
        id=known.get("wandb", name),
        save_dir=record.path,
        settings=wandb.Settings(silent=True, console="off"),
    )
    run = logger.experiment  # asks for the key of the user
    record.write(TRACKERS, {"wandb": name} | known)
    for folder in earlier if run.offline else ():
        shutil.rmtree(folder)
    if run.resumed:  # by the server, which may not know it: an earlier attempt was offline
        logger.last = _last_steps(wandb.Api().run(f"{run.entity}/{run.project}/{run.id}").scan_history())
    return logger, False


def _last_steps(history: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the last step of each metric in a history of W&B, in which Lightning has written the step beside them."""
    last: dict[str, int] = {}
    for line in history:
        step = line.get("trainer/global_step")
        if step is not None:
            last |= {tag: max(step, last.get(tag, -1)) for tag, value in line.items() if value is not None}
    return last


class _Continued:
    """A run that was killed has logged steps beyond the checkpoint from which it goes on: none is logged twice."""

    last: Mapping[str, int] = {}  # the last step of each metric that the server knows of the run

    def new(self, metrics: Mapping[str, float], step: int | None) -> dict[str, float]:
        return {tag: value for tag, value in metrics.items() if step is None or step > self.last.get(tag, -1)}


class _ContinuedWandb(_Continued, WandbLogger):
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if new := self.new(metrics, step):  # else a line with the step alone
            super().log_metrics(new, step)


class _ContinuedMLFlow(_Continued, MLFlowLogger):
    def find_last(self) -> None:
        """Ask the server for the last step of each metric."""
        client, run = self.experiment, self.run_id
        tags = client.get_run(run).data.metrics
        self.last = {tag: max(each.step for each in client.get_metric_history(run, tag)) for tag in tags}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(self.new(metrics, step), step)


def _mlflow(recipe: Recipe, record: Record) -> tuple[LightningLogger, bool]:
    """Return a logger to the server, or to ``mlflow.db``, which all runs below ``output_dir`` share."""
    from mlflow.exceptions import MlflowException

    known = record.read(TRACKERS)
    folder = Path(recipe.output_dir).absolute()
    where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder}/mlflow.db"
    with (folder / ".mlflow.lock").open("w") as lock:  # two jobs would both make the database, or the experiment
        fcntl.flock(lock, fcntl.LOCK_EX)
        settings: dict[str, Any] = {"tracking_uri": where, "artifact_location": str(folder / "mlruns")}
        if run := known.get("mlflow"):
            continued = _ContinuedMLFlow(recipe.task.name, run_id=run, **settings)
            with suppress(MlflowException):  # it was deleted there
                continued.experiment.update_run(run, "RUNNING")
                continued.find_last()
                return continued, True
        logger = MLFlowLogger(recipe.task.name, _name(recipe, record), **settings)
        record.write(TRACKERS, known | {"mlflow": logger.run_id})
    return logger, False


def _name(recipe: Recipe, record: Record) -> str:
    """Return what a run is called in lists, as ``caspr-lr0.006-4e9d1440/seed0``."""
    return f"{recipe.optim.name}-{record.path.parent.name}/{record.path.name}"


MAKERS = {Logger.csv: _csv, Logger.wandb: _wandb, Logger.mlflow: _mlflow}
