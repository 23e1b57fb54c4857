"""What the runner costs: steps a second under it, against a bare PyTorch loop over the same model, data and optimizer.

    python tests/benchmarks/throughput.py [optim=adamw ...]

The two take turns in one process; the ratio is the median over turns. Not a test: timings are no verdict.
"""

import contextlib
import io
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

from caspr_cli import tasks
from caspr_cli.optim.registry import build
from caspr_cli.recipe import compose
from caspr_cli.recipe.composer import Composer
from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs.record import Record
from caspr_cli.training.begin import begin
from caspr_cli.training.data import TaskData
from caspr_cli.training.fit import fit
from caspr_cli.training.schedule import factor

TURNS, STEPS = 5, 40


def bare(recipe: Recipe) -> float:
    """Return the seconds of a loop as anyone would write it."""
    task = tasks.load(recipe.task, recipe.seed)
    task.prepare()
    torch.manual_seed(recipe.seed)
    model = task.model()
    optimizer = build(recipe.optim.name, task.param_groups(model), compose.options(recipe.optim))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: factor(s, STEPS, recipe.schedule))
    batches = TaskData(task, recipe, start=0, rank=0, world=1).train_dataloader()
    start = time.perf_counter()
    for batch in islice(batches, STEPS):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.trainer.clip_norm)
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


def through_the_runner(recipe: Recipe) -> float:
    """Return the seconds of training of a whole run, with curves, without validation and checkpoints."""
    quiet = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as directory,
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
    ):
        record = Record(Path(directory))
        result = fit(begin(recipe, record, rank=0), record, rank=0, world=1)
    assert result is not None
    return float(result["seconds"])


def main() -> None:
    steps = [f"trainer.max_steps={STEPS}", f"trainer.val_every={STEPS}", "trainer.accelerator=cpu"]
    words = [*steps, *sys.argv[1:]]
    recipe = compose.freeze(Composer(words).config(words))
    ratios = []
    for turn in range(TURNS + 1):
        # who goes first alternates: the machine's speed drifts
        if turn % 2:
            b, a = through_the_runner(recipe), bare(recipe)
        else:
            a, b = bare(recipe), through_the_runner(recipe)
        name = f"turn {turn}" if turn else "warm-up"
        print(f"{name}  bare {1000 * a / STEPS:.1f} ms a step  runner {1000 * b / STEPS:.1f}", flush=True)
        if turn:
            ratios.append(a / b)
    print(f"throughput of the runner over the bare loop: {statistics.median(ratios):.3f} (median of {TURNS} turns)")


if __name__ == "__main__":
    main()
