"""Tables of records that were never run, with curves and trials: for tests of figures and pages."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from recorded import run

from caspr_cli.report.compare import tables
from caspr_cli.report.model import Run, Table

# Where each ends, how far seeds lie apart, and how many seconds a step takes, for validation losses from 7.6 down.
ENDS = {
    "shampoo": (3.980, 0.011, 0.42),
    "caspr": (3.992, 0.012, 0.47),
    "soap": (4.124, 0.014, 0.55),
    "muon": (4.140, 0.010, 0.36),
    "adamw": (4.456, 0.016, 0.31),
    "sgd": (6.92, 0.120, 0.29),
}
ACCURACY = {"task__target__metric": "val/accuracy", "task__target__higher_is_better": True}
RATES = [1e-3 * 2**k for k in range(6)]


def curve(end: float, *, start: float = 7.6, steps: int = 400, second: float | None = 0.4) -> list[tuple[Any, ...]]:
    """Eight validations that fall, or rise, from ``start`` to ``end``; seconds of a step None: it has no times."""
    noise = random.Random(f"{end} {steps}")
    return [
        (
            step,
            None if second is None else step * second * noise.uniform(0.97, 1.03),
            end + (start - end) * (math.exp(-5 * step / steps) - math.exp(-5)) + noise.gauss(0, 0.002) * (step < steps),
        )
        for step in range(steps // 8, steps + 1, steps // 8)
    ]


def ended(optim: str, seed: int, end: float, state: str = "done", second: float | None = 0.4, **keys: Any) -> Run:
    points = curve(end, start=0.2 if end < 1 else 7.6, second=second)
    keys = {"trainer__max_steps": 400, "optim__lr": RATES[0]} | keys
    return run(optim, seed, end, state, points if state == "done" else points[:3], **keys)


def tuned(optim: str, trials: Sequence[float | None], values: Sequence[float | None], **keys: Any) -> list[Run]:
    """A search over rates, of which the first is the best, and runs of that at held-out seeds; None: failed."""
    runs = [
        ended(optim, 0, value or 9.0, "failed" if value is None else "done", trial=k, optim__lr=RATES[k], **keys)
        for k, value in enumerate(trials)
    ]
    ends = enumerate(values, 1)
    return runs + [ended(optim, k, v or 9.0, "failed" if v is None else "done", trial=0, **keys) for k, v in ends]


@cache
def language() -> Table:
    """Six optimizers; one diverges, one has a failed seed, one a failed trial."""
    noise = random.Random(0)
    runs = []
    for optim, (end, sd, second) in ENDS.items():
        values: list[float | None] = [noise.gauss(end, sd) for _ in range(5)]
        trials: list[float | None] = [end, *(end + 0.1 + 0.9 * noise.random() ** 2 for _ in range(5))]
        if optim == "muon":
            values[2] = None
        if optim == "soap":
            trials[5] = None
        runs += tuned(optim, trials, values, second=second)
    (made,) = tables(runs)
    return made


@cache
def accuracy(task: str, best: float, target: float | None = None, without: str = "") -> Table:
    """A task where higher is better, with seeds that overlap."""
    noise = random.Random(task)
    runs = []
    for place, optim in enumerate(name for name in ENDS if name != without):
        end = best - 0.011 * place
        trials = [end, *(end - 0.01 - 0.2 * noise.random() ** 2 for _ in range(5))]
        values = [end + noise.gauss(0, 0.005) for _ in range(5)]
        runs += tuned(optim, trials, values, task__name=task, task__target__value=target, **ACCURACY)
    (made,) = tables(runs)
    return made


def study() -> list[Table]:
    """Five tasks: one has no target, one lacks an optimizer."""
    return [
        language(),
        accuracy("ud_pos", 0.912, target=0.88),
        accuracy("ogbg_molpcba", 0.243),
        accuracy("resnet", 0.932, target=0.90, without="soap"),
        accuracy("vit", 0.874, target=0.80),
    ]


@cache
def ablation() -> Table:
    """Fourteen variants of one optimizer, with long labels."""
    noise = random.Random(1)
    runs = [
        ended("caspr", k, noise.gauss(4.0 + 0.02 * place, 0.01), optim__variant=f"of-the-block-size-{place:02d}")
        for place in range(14)
        for k in range(1, 4)
    ]
    (made,) = tables(runs)
    return made


def bare() -> Table:
    """All that may be missing is missing: a row with no run, one that failed, one seed without times, no target."""
    runs = [
        ended("nadamw", 0, 4.4, second=None),
        ended("sgd", 0, 9.0, "failed"),
        replace(ended("muon", 0, 9.0, "new"), curve=()),
    ]
    (made,) = tables([replace(one, config=one.config | {"task.target.value": None}) for one in runs])
    return made
