"""Numbers to disk: ``metrics.jsonl`` and TensorBoard events. Only rank 0 has a recorder that writes."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs.record import Record, RecordDamagedError, finite, write_whole
from caspr_cli.training import hparams


class Recorder:
    """Writes one record's curves.

    Args:
        step, lines: where the last checkpoint stands, in steps and in lines of ``metrics.jsonl``. What lies after it
            was written by an attempt that was cut off, and is dropped.
    """

    def __init__(self, record: Record, step: int = 0, lines: int = 0) -> None:
        self._record, self.lines = record, lines
        kept = []
        if lines:
            kept = record.metrics.read_text(encoding="utf8").splitlines()[:lines] if record.metrics.exists() else []
            if len(kept) < lines:
                raise RecordDamagedError(record.metrics)
        write_whole(record.metrics, "".join(line + "\n" for line in kept))
        self._writer = SummaryWriter(str(record.path), purge_step=step + 1 if step else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with self._record.metrics.open("a", encoding="utf8") as file:
            file.write(json.dumps(finite({"step": step, **values})) + "\n")
        self.lines += 1
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def hyperparameters(self, recipe: Recipe) -> None:
        """This run's row of the HPARAMS page."""
        file_writer = self._writer._get_file_writer()
        assert file_writer is not None
        for summary in hparams.summaries(recipe, self._record.path.parent.name):
            file_writer.add_summary(summary)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
