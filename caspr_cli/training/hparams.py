"""The HPARAMS page of TensorBoard: one row a run, the seeds of one recipe in one group.

``SummaryWriter.add_hparams`` opens a run of its own, logs the metrics again and knows no groups; TensorBoard's own
writer needs TensorFlow. The page reads three summaries, which are made here.
"""

import time
from collections.abc import Mapping
from typing import Any

from google.protobuf.struct_pb2 import ListValue, Value
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

from caspr_cli.common.shape import leaves
from caspr_cli.recipe.compose import NOT_IN_THE_NAME, UNTUNED, to_plain
from caspr_cli.recipe.schema import OPTIMIZERS, Recipe
from caspr_cli.tasks.registry import CONFS

# The page opens with its first five columns; those that "differ" come first.
COLUMNS = ("optim.name", "optim.lr", "scale", "task.batch_size", "trainer.max_steps")
# What the tasks are judged by.
NAMES = sorted({conf().target.metric.removeprefix("val/") for conf in CONFS.values()})
METRICS = [f"{split}/{name}" for split in ("val", "test") for name in NAMES]


def summaries(recipe: Recipe, identity: str) -> list[Summary]:
    """Return the columns of the page, and the start (with its group) and end of this run.

    Runs that share ``identity``, the hash of the recipe without its seed, are one group, which the page averages.
    """
    values, group = hyperparameters(recipe), f"{recipe.task.name}/{recipe.optim.name}/{identity}"
    start = plugin_data_pb2.SessionStartInfo(group_name=group, start_time_secs=time.time())
    for name, value in values.items():
        start.hparams[name].CopyFrom(_value(value))
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS)
    return [
        _summary(metadata.EXPERIMENT_TAG, plugin_data_pb2.HParamsPluginData(experiment=_experiment(values))),
        _summary(metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=start)),
        _summary(metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=end)),
    ]


def hyperparameters(recipe: Recipe) -> dict[str, bool | float | str]:
    """Return the recipe as flat names and plain values, without paths and keys that change no number."""
    left_out = {*NOT_IN_THE_NAME, "debug"} - {"seed"}
    plain = to_plain(recipe)
    del plain["search"]["space"]  # what was drawn from it stands at its own keys
    if plain["trial"] == UNTUNED:  # no number, as the column has it
        plain["trial"] = None
    return {k: v for k, v in _flatten(plain).items() if k not in left_out}


def _experiment(values: dict[str, bool | float | str]) -> api_pb2.Experiment:
    """Return the columns of all runs: TensorBoard takes them from whichever run it finds first."""
    others: dict[str, bool | float | str] = {"search.name": "", "trial": 0}  # null without a search
    for optimizer in OPTIMIZERS.values():
        others |= _flatten({"optim": to_plain(optimizer())})
    for task in CONFS.values():
        others |= _flatten({"task": to_plain(task())})
    experiment = api_pb2.Experiment()
    for name, value in (others | values).items():
        kinds = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
        kind = kinds.get(type(value), api_pb2.DATA_TYPE_FLOAT64)
        info = experiment.hparam_infos.add(name=name, type=kind, differs=name in COLUMNS)
        if isinstance(value, bool):  # a filter box for each of the two
            info.domain_discrete.CopyFrom(ListValue(values=[Value(bool_value=b) for b in (False, True)]))
    for tag in METRICS:
        experiment.metric_infos.add(name=api_pb2.MetricName(tag=tag))
    return experiment


def _summary(tag: str, data: plugin_data_pb2.HParamsPluginData) -> Summary:
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data))])


def _value(value: bool | float | str) -> Value:
    if isinstance(value, bool):
        return Value(bool_value=value)
    return Value(string_value=value) if isinstance(value, str) else Value(number_value=value)


def _flatten(node: Mapping[str, Any]) -> dict[str, bool | float | str]:
    found = {key: value for key, value in leaves(node) if value not in (None, {})}
    return {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in found.items()}
