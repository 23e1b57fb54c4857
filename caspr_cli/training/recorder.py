"""Numbers to disk: ``metrics.jsonl`` and TensorBoard events. Only rank 0 has a recorder that writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from caspr_cli.recipe.compose import to_plain
from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs.record import Record, write_whole


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

    def hyperparameters(self, recipe: Recipe, metrics: list[str]) -> None:
        """The HPARAMS page: one row a run, seeds of one recipe in one group.

        ``SummaryWriter.add_hparams`` would open a run of its own and log the metrics again; these are its three
        summaries in the run itself, with a group name, which TensorBoard averages over.
        """
        flat = _flatten({k: v for k, v in to_plain(recipe).items() if k not in ("output_dir", "resume")})
        summaries = hparams(flat, dict.fromkeys(metrics, 0.0))
        group = f"{recipe.task.name}/{recipe.optim.name}/{self._record.path.parent.name}"
        for summary in summaries:
            for value in summary.value:
                content = value.metadata.plugin_data
                if value.tag == "_hparams_/session_start_info":
                    content.content = _with_group(content.content, group)
            file_writer = self._writer._get_file_writer()
            assert file_writer is not None
            file_writer.add_summary(summary)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _with_group(content: bytes, group: str) -> bytes:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    data = HParamsPluginData.FromString(content)
    data.session_start_info.group_name = group
    serialized: bytes = data.SerializeToString()
    return serialized


def _flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def _step(line: str) -> int:
    """The step of a line; a line that was cut off by a kill counts as never written."""
    try:
        step: int = json.loads(line)["step"]
    except (ValueError, KeyError):
        return 1 << 62
    return step
