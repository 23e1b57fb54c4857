from __future__ import annotations

from caspr_cli.recipe.schema import TASKS
from caspr_cli.training.hparams import METRICS


def test_the_page_has_a_column_for_what_each_task_is_judged_by() -> None:
    for conf in TASKS.values():
        metric = conf().target.metric
        assert {metric, metric.replace("val/", "test/")} <= set(METRICS)
