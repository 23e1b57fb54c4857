"""Numbers to disk: ``metrics.jsonl`` and TensorBoard events. Only rank 0 has a recorder that writes."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs.record import Record, write_whole
from caspr_cli.training import hparams


class Recorder:
    """Writes one record's curves.

    Args:
        start: steps already in the record; what lies after them was written by an attempt that was cut off beyond
            its last checkpoint, and is dropped.
    """

    def __init__(self, record: Record, start: int) -> None:
        self._record = record
        kept = []
        if record.metrics.exists():
            lines = record.metrics.read_text(encoding="utf8").splitlines()
            kept = [line for line in lines if _step(line) <= start] if start else []
        write_whole(record.metrics, "".join(line + "\n" for line in kept))
        self._writer = SummaryWriter(str(record.path), purge_step=start + 1 if start else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with self._record.metrics.open("a", encoding="utf8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
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


def _step(line: str) -> int:
    """The step of a line; a line that was cut off by a kill counts as never written."""
    try:
        step: int = json.loads(line)["step"]
    except (ValueError, KeyError):
        return 1 << 62
    return step
