"""Steps to the target by runs whose whole schedule is that long, beside those read off the curve of a longer run.

A curve that is planned for more steps has a high learning rate where a shorter run would end with a low one, so that it
reaches a target later, and not by the same factor for each optimizer.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from caspr_cli.common.selection import reaches
from caspr_cli.report.model import OwnSchedule, Row, Run
from caspr_cli.report.settings import frozen
from caspr_cli.report.stats import median

LENGTH = "trainer.max_steps"
HORIZON = "horizon"  # a key of runs that are only there for the length of a schedule


def own_schedule(row: Row, rows: Sequence[Row]) -> OwnSchedule | None:
    """Return the shortest length whose mean over the seeds of the row reaches the target; None if no run is shorter.

    ``rows``: of the table, and of runs with ``horizon``, which are in no table.
    """
    length, seeds = row.settings.get(LENGTH), {run.seed for run in row.runs}
    if row.target is None or row.selected is None or not isinstance(length, int):
        return None
    recipe, runs_of = _recipe(row, row.selected.values), dict[int, list[Run]]()
    for other in rows:
        steps = other.settings.get(LENGTH)
        for trial in other.trials:
            if isinstance(steps, int) and steps <= length and _recipe(other, trial.values) == recipe:
                runs_of[steps] = [run for run in trial.runs if run.seed in seeds and run.ended]
    whole = {steps: runs for steps, runs in sorted(runs_of.items()) if {run.seed for run in runs} == seeds}
    if min(whole, default=length) >= length:
        return None
    for steps, runs in whole.items():
        finals = [run.final for run in runs if run.final is not None]
        if len(finals) == len(runs) and reaches(fmean(finals), row.target, higher_is_better=row.higher_is_better):
            return OwnSchedule(steps, median([run.result.get("seconds") for run in runs]), tuple(whole))
    return OwnSchedule(None, None, tuple(whole))


def _recipe(row: Row, values: dict[str, Any]) -> str:
    """Return a text that is the same for runs that differ only in length and seed."""
    return frozen([row.optim, {key: value for key, value in row.settings.items() if key != LENGTH}, values])
