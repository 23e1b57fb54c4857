"""The learning rate as a pure function of the step."""

import math

from caspr_cli.recipe.schema import Decay, ScheduleConf


def factor(step: int, max_steps: int, conf: ScheduleConf) -> float:
    """Return the factor of the learning rate for the step after ``step`` steps.

    Linear from 0 over the first ``warmup`` of the run, then 1, then over the last ``decay`` of the run to 0: linearly
    or along half a cosine. ``warmup=.05 decay=.95`` is the usual cosine schedule, ``decay=.2`` with ``linear`` the
    trapezoid.
    """
    warmup = conf.warmup * max_steps
    if step + 1 < warmup:
        return (step + 1) / warmup
    start = (1 - conf.decay) * max_steps
    if conf.name == Decay.constant or step <= start:
        return 1.0
    done = min(1.0, (step - start) / (max_steps - start))
    return 1 - done if conf.name == Decay.linear else 0.5 * (1 + math.cos(math.pi * done))
