"""Tables as ``caspr-report`` has them, from no records at all: for tests of figures and pages."""

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean, median, stdev
from typing import Any
from zlib import crc32

from caspr_cli.report.model import Difference, Point, Row, Run, Table, Trial
from caspr_cli.report.stats import Comparison, best_of, interval

# Where each ends, how far seeds lie apart, and how many seconds a step takes, for validation losses from 7.6 down.
ENDS = {
    "shampoo": (3.980, 0.011, 0.42),
    "caspr": (3.992, 0.012, 0.47),
    "soap": (4.124, 0.014, 0.55),
    "muon": (4.140, 0.010, 0.36),
    "adamw": (4.456, 0.016, 0.31),
    "sgd": (6.92, 0.120, 0.29),
}
PACKAGES = {"torch": "2.14.1", "lightning": "2.6.6", "numpy": "2.4.6"}
VERDICT = (
    "no significant difference: -0.38 % (-0.94 to +0.18); n = 5 detects 0.56 %; "
    "if the true difference is the one observed, about 14 seeds would find it"
)


def run(
    optim: str,
    seed: int,
    end: float,
    *,
    task: str = "c4_lm",
    metric: str = "val/loss",
    start: float = 7.6,
    steps: int = 400,
    second: float | None = 0.4,
    state: str = "done",
    **config: Any,
) -> Run:
    """One whose curve falls, or rises, from ``start`` to ``end``; seconds of a step None: its curve has no times."""
    noise = random.Random(f"{optim} {seed} {config}")
    curve = tuple(
        Point(
            step,
            None if second is None else step * second * noise.uniform(0.97, 1.03),
            end + (start - end) * (math.exp(-5 * step / steps) - math.exp(-5)) + noise.gauss(0, 0.002) * (step < steps),
        )
        for step in range(steps // 8, steps + 1, steps // 8)
    )
    done = state == "done"
    return Run(
        path=f"outputs/{task}/{optim}/{crc32(f'{task} {optim}'.encode()):08x}/seed{seed}",
        config={"task.name": task, "optim.name": optim, "seed": seed, "task.target.metric": metric, "optim.lr": 3e-3}
        | {key.replace("__", "."): value for key, value in config.items()},
        status={"state": state, "error": None if done else "CUDA out of memory"},
        result={"final": {metric: end}, "test": {metric.replace("val/", "test/"): end * 1.02}} if done else {},
        provenance={
            "command": ["caspr-train", f"task={task}", f"optim={optim}", f"seed={seed}"],
            "caspr_cli": "0.1.0",
            "code": {
                "commit": "997f39e981361790dbb9716527b9b7152827a5f5",
                "diff": None,
                "diff_sha256": "e3b0c44298fc1c14",
            },
            "python": "3.11.7",
            "packages": PACKAGES,
            "machine": {"host": "vm", "system": "Linux-6.18", "processor": "AMD EPYC", "cores": 2},
            "data": {"name": "python-stdlib", "source": "sample", "hash": "c919348c4a87560d"},
            "device": {"type": "cpu", "name": "cpu", "processes": 1, "threads": 2},
        },
        curve=curve if done else curve[:3],
    )


def row(
    label: str,
    runs: Sequence[Run],
    *,
    task: str = "c4_lm",
    target: float | None = None,
    higher: bool = False,
    trials: Iterable[float | None] = (),
    **changes: Any,
) -> Row:
    """Its numbers are those of the runs; ``trials`` are the ends of all trials, None for one that failed."""
    finals = [r.final for r in runs if r.final is not None]
    low, high = interval(finals)
    lrs = [1e-3 * 2**k for k, _ in enumerate(trials)]
    made = tuple(Trial({"optim.lr": lr}, (), k) for k, lr in enumerate(lrs)) or (
        Trial({"optim.lr": 3e-3}, tuple(runs)),
    )
    times = [_reached(r, target, higher) for r in runs] if target is not None and runs else []
    middle = [median(t) if times else math.inf for t in zip(*times, strict=True)] if times else [math.inf] * 2
    values: dict[str, Any] = {
        "task": task,
        "optim": label.split()[0],
        "label": label,
        "trials": made,
        "selected": made[0] if finals else None,
        "runs": tuple(runs),
        "held_out": True,
        "n": len(finals),
        "mean": fmean(finals) if finals else None,
        "sd": stdev(finals) if len(finals) > 1 else None,
        "ci_low": low,
        "ci_high": high,
        "test_mean": fmean(finals) * 1.02 if finals else None,
        "test_sd": stdev(finals) if len(finals) > 1 else None,
        "steps_to_target": middle[0] if math.isfinite(middle[0]) else None,
        "seconds_to_target": middle[1] if math.isfinite(middle[1]) else None,
        "reached": None if target is None else sum(math.isfinite(t[0]) for t in times),
        "best_of": best_of(list(trials), higher_is_better=higher),
        "budget": dict(Counter("failed" if t is None else "done" for t in trials)) or {"done": 1},
        "test_n": len(finals),
    }
    return Row(**values | changes)


def _reached(run: Run, target: float, higher: bool) -> tuple[float, float]:
    for point in run.curve:
        if point.value is not None and (point.value >= target if higher else point.value <= target):
            return point.step, math.inf if point.seconds is None else point.seconds
    return math.inf, math.inf


def table(rows: Iterable[Row], *, baseline: str | None = "adamw", higher: bool = False, **changes: Any) -> Table:
    """The best mean first, each row with a difference to the baseline."""
    worst = -math.inf if higher else math.inf
    ranked = sorted(rows, key=lambda r: worst if r.mean is None else r.mean, reverse=higher)
    base = next((r for r in ranked if r.label == baseline), None)
    values: dict[str, Any] = {
        "task": ranked[0].task if ranked else "c4_lm",
        "scale": "sample",
        "data": "sample",
        "metric": "val/accuracy" if higher else "val/loss",
        "higher_is_better": higher,
        "target": None if higher else 4.5,
        "baseline": base.label if base else None,
        "rows": tuple(_against(r, base, higher) for r in ranked),
    }
    return Table(**values | changes)


def _against(one: Row, base: Row | None, higher: bool) -> Row:
    if base is None:
        return one
    if one is base:
        return replace(one, is_baseline=True)
    if one.mean is None or base.mean is None or one.n < 2:
        why = "not tested: +2.1 %; one seed on a side has no spread"
        return replace(one, difference=Difference(n=one.n, verdict=why, baseline=base.label))
    value = one.mean - base.mean
    significant = abs(value) > 3 * ((one.sd or 0) + (base.sd or 0))
    p = 0.0004 if significant else 0.21
    verdict = ("better" if (value > 0) == higher else "worse") if significant else VERDICT
    seen = {"paired": True, "n": one.n, "value": value, "low": value - 0.02, "high": value + 0.02}
    found = Difference(
        **seen, p_value=p, p_holm=min(4 * p, 1), verdict=verdict, baseline=base.label, tests=4, share_of=base.mean,
        test=Comparison(**seen), test_share_of=base.test_mean,
    )  # fmt: skip
    return replace(one, difference=found)


def language() -> Table:
    """Six optimizers; one diverges, one has a failed seed."""
    noise = random.Random(0)
    rows = []
    for optim, (end, sd, second) in ENDS.items():
        runs = [run(optim, k, noise.gauss(end, sd), second=second) for k in range(1, 6)]
        if optim == "muon":
            runs[2] = run(optim, 3, end, second=second, state="failed")
        trials = [end + 0.9 * noise.random() ** 2 for _ in range(5)] + [None if optim == "soap" else end + 0.4]
        rows.append(row(optim, runs, target=4.5, trials=trials))
    return table(rows, warnings=("muon: 4 of 5 seeds count: not seed 3 (failed: CUDA out of memory)",))


def accuracy(task: str, best: float, *, target: float | None = None, optims: Sequence[str] = tuple(ENDS)) -> Table:
    """A task where higher is better, with seeds that overlap."""
    noise = random.Random(task)
    rows = [
        row(
            optim,
            [
                run(optim, k, best - 0.011 * place + noise.gauss(0, 0.005), task=task, metric="val/accuracy", start=0.2)
                for k in range(1, 6)
            ],
            task=task,
            target=target,
            higher=True,
            trials=[best - 0.011 * place - 0.2 * noise.random() ** 2 for _ in range(6)],
        )
        for place, optim in enumerate(optims)
    ]
    return table(rows, higher=True, task=task, target=target)


def study() -> list[Table]:
    """Five tasks: one has no target, one lacks an optimizer."""
    return [
        language(),
        accuracy("ud_pos", 0.912, target=0.88),
        accuracy("ogbg_molpcba", 0.243),
        accuracy("resnet", 0.932, target=0.90, optims=("caspr", "shampoo", "muon", "adamw", "sgd")),
        accuracy("vit", 0.874, target=0.80),
    ]


def ablation() -> Table:
    """Fourteen variants of one optimizer, with long labels."""
    noise = random.Random(1)
    keys = ["eps=1e-4", "eps=1e-8", "order=1", "order=3", "graft=none", "graft=sgd", "interval=1", "interval=100",
            "damping=absolute", "merge=square", "block_size=256", "statistics=sum", "solver=newton"]  # fmt: skip
    labels = ["caspr", *(f"caspr {key}" for key in keys)]
    rows = [
        row(label, [run(label, k, noise.gauss(4.0 + 0.02 * place, 0.01)) for k in range(1, 4)])
        for place, label in enumerate(labels)
    ]
    return table(rows, baseline="caspr")


def bare() -> Table:
    """All that may be missing is missing: a row with no run, one that failed, one seed without times, no target."""
    rows = [
        row("adamw", [run("adamw", 0, 4.4, second=None)]),
        row("sgd", [run("sgd", 0, 9.0, state="failed")], trials=[None]),
        row("muon", []),
    ]
    return table(rows, target=None, baseline=None)
