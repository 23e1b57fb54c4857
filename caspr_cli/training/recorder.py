"""Numbers to disk: ``metrics.jsonl`` and TensorBoard events. Only rank 0 has a recorder that writes."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from tensorboard.compat.proto.event_pb2 import SessionLog
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from caspr_cli.common.files import write_whole
from caspr_cli.common.format import finite
from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs.record import Record, RecordDamagedError
from caspr_cli.training import hparams, trackers
from caspr_cli.training.layout import FIRST, compared, layout

EVENTS = "events.out.tfevents.*"
NUMBERED = "0000000000."  # before any time
BINS = 8  # of a histogram, a decade


class Recorder:
    """Writes one record's curves.

    The last checkpoint stands at ``step`` and after ``lines`` of ``metrics.jsonl``. What lies after it was written by
    an attempt that was cut off, and is dropped.
    """

    def __init__(self, record: Record, recipe: Recipe, step: int = 0, lines: int = 0) -> None:
        self._record, self._recipe, self.lines = record, recipe, lines
        self._compared = compared(recipe.task.target.metric)
        kept = record.metrics.read_bytes().splitlines(keepends=True)[:lines] if record.metrics.exists() else []
        if len(kept) < lines:
            raise RecordDamagedError(record.metrics)
        write_whole(record.metrics, b"".join(kept).decode())
        _number(record.path)
        self._step, self._shown = step, shown(record.path, step) if step else set()
        self._writer = SummaryWriter(str(record.path), purge_step=step + 1 if step else None)
        self._loggers = trackers.begun(recipe, record, kept)
        self.ended: str | None = None  # see trackers.end

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with self._record.metrics.open("a", encoding="utf8") as file:
            file.write(json.dumps(finite({"step": step, **values}, infinities=False)) + "\n")
        self.lines += 1
        for logger in self._loggers:
            logger.log_metrics(dict(values), step)
        scalars = dict(values) | {f"{FIRST}/{tag}": values[tag] for tag in self._compared if tag in values}
        for tag, value in scalars.items():
            if step != self._step or tag not in self._shown:
                self._writer.add_scalar(tag, value, step)

    def spectrum(self, step: int, logarithms: Tensor) -> None:
        """Write a histogram of eigenvalues (log10 of each over the largest of its block), in eighths of a decade."""
        values = logarithms[logarithms.isfinite()].double().cpu().numpy()  # a diagnostic ends no run
        edges = np.arange(np.floor(BINS * values.min(initial=0)) - 1, 1) / BINS
        self._writer.add_histogram("optim/spectrum", values, step, bins=edges)

    def pages(self) -> None:
        """Write this run's row of the HPARAMS page, and its part of the CUSTOM SCALARS page."""
        self._writer.add_custom_scalars(layout(self._recipe.task.target.metric))
        file_writer: Any = self._writer.file_writer
        for summary in hparams.summaries(self._recipe, self._record.path.parent.name):
            file_writer.add_summary(summary)

    def flush(self) -> None:
        """Force everything written so far onto the disk."""
        self._writer.flush()
        for logger in self._loggers:
            logger.save()
        for path in (self._record.metrics, max(self._record.path.glob(EVENTS))):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.ended = "failed" if kind else self.ended
        with suppress(*([Exception] if kind else [])):  # the run's own error is the one to be told
            self.close()

    def close(self) -> None:
        self._writer.close()
        for logger in self._loggers:
            trackers.end(logger, self.ended)


def shown(directory: Path, step: int) -> set[str]:
    """Return the tags that have a value at this step, which TensorBoard keeps when it purges later steps.

    A run that was killed after its test part has written that, at the step of its last checkpoint.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # slow, and seldom needed

    tags: set[str] = set()
    for path in sorted(directory.glob(EVENTS)):
        for event in EventFileLoader(str(path)).Load():
            if event.session_log.status == SessionLog.START and event.step <= step:
                tags.clear()  # a later attempt began before it
            if event.step == step:
                tags |= {value.tag for value in event.summary.value}
    return tags


def _number(directory: Path) -> None:
    """Rename earlier attempts' event files, in their order, so that they sort before all later files.

    TensorBoard reads the files in the order of their names, which begin with the time: of a clock that was set back
    it would take the later attempt for the earlier one.
    """
    for number, path in enumerate(sorted(directory.glob(EVENTS))):
        kind, _, rest = path.name.partition("tfevents.")
        if not rest.startswith(NUMBERED):
            path.rename(path.with_name(f"{kind}tfevents.{NUMBERED}{number:06d}.{rest}"))
