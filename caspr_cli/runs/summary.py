"""The last lines of a run, from its record alone."""

from __future__ import annotations

import shlex
from typing import Any

from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs.launch import Outcome
from caspr_cli.runs.record import DONE, FAILED, PREEMPTED


def footer(outcome: Outcome) -> list[str]:
    """What came of it and where it is."""
    record, status = outcome.record, outcome.record.status
    state = status.get("state")
    if state == DONE:
        return [*_results(record.result, ran=outcome.ran), f"record   {record.path}"]
    if state == FAILED:
        again = "add resume=retry to run it again" if not outcome.ran else f"log      {record.log}"
        return [f"failed   {status.get('error')}", again, f"record   {record.path}"]
    if state == PREEMPTED:
        saved = f"saved at step {status.get('step')}" if record.last.exists() else "before the first checkpoint"
        why = status.get("error") or "stopped on a signal"
        return [f"cut off  {why}", f"         {saved}; the same command continues", f"record   {record.path}"]
    return [f"record   {record.path}"]


def _results(result: dict[str, Any], *, ran: bool) -> list[str]:
    first = "done     " if ran else "skipped  this run is done already (resume=never runs it anew): "
    metric = result["target"]["metric"]
    lines = [
        f"{first}{_time(result['seconds'])} of training, {result['steps']} steps",
        f"result   {metric} {_value(result['final'], metric)} at the end, best {_value(result['best'], metric)} "
        f"at step {result['best'].get('step')}; "
        + "  ".join(f"{name} {_value(result['test'], name)}" for name in result["test"]),
    ]
    target = result["target"]
    if target["value"] is not None:
        reached = "not reached" if target["step"] is None else f"reached at step {target['step']}"
        after = "" if target["step"] is None else f", after {_time(target['seconds'])}"
        lines.append(f"target   {metric} {target['value']:g}: {reached}{after}")
    total = sum(result["optimizer_seconds"].values())
    parts = ", ".join(f"{k} {100 * v / result['seconds']:.1f}" for k, v in result["optimizer_seconds"].items() if v)
    lines.append(
        f"optim    {100 * total / result['seconds']:.1f} % of the time ({parts}); "
        f"state {result['optimizer_state_bytes'] / 1e6:.1f} MB"
    )
    return lines


def next_commands(recipe: Recipe, command: list[str]) -> list[str]:
    """How to see the curves, and how to compare: the command as given, over optimizers and seeds."""
    kept = [word for word in command[1:] if word.partition("=")[0] not in ("optim", "seed", "resume")]
    return [
        f"next     tensorboard --logdir {recipe.output_dir}",
        f"         {shlex.join(['caspr-train', '-m', *kept, 'optim=caspr,shampoo,adamw', 'seed=0,1,2'])}",
    ]


def table(outcomes: list[tuple[str, Outcome]]) -> list[str]:
    """One line a job of a sweep."""
    lines = []
    words = [name.split() for name, _ in outcomes]
    common = set(words[0]).intersection(*words[1:])  # what every job had says nothing here
    names = [" ".join(w for w in job if w not in common) for job in words]
    width = max(3, *map(len, names))
    lines.append(f"{'job':<{width}}  result")
    for name, (_, outcome) in zip(names, outcomes, strict=True):
        status, result = outcome.record.status, outcome.record.result
        state = status.get("state", "?")
        if state == DONE:
            metric = result["target"]["metric"]
            test = metric.replace("val/", "test/")
            what = f"{metric} {_value(result['final'], metric)}  {test} {_value(result['test'], test)}  "
            what += _time(result["seconds"])
        else:
            what = str(status.get("error") or "")
        lines.append(f"{name:<{width}}  {state if outcome.ran else f'{state} before'}  {what}  {outcome.record.path}")
    return lines


def _value(scores: dict[str, Any], metric: str) -> str:
    value = scores.get(metric)  # null where it was no number: nothing to measure it on
    return "-" if value is None else f"{value:.4f}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
