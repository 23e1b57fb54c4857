"""Tables and records as lines of a terminal."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from caspr_cli import __version__
from caspr_cli.common.format import count, duration, listed, wrapped
from caspr_cli.report import format, provenance, render, tuning
from caspr_cli.report.format import number
from caspr_cli.report.headline import clock, headline
from caspr_cli.report.model import Point, Run, Table
from caspr_cli.report.profile import LONGEST, NOT_ALGOPERF, Profile, as_sheet
from caspr_cli.report.render import Sheet, sheet
from caspr_cli.report.selection import IGNORED_GROUPS
from caspr_cli.report.settings import differing, joined

BARS = "▁▂▃▄▅▆▇█"
INDENT = "  "
NOT_LISTED = ("seed", "output_dir", "resume", "debug", "task.root", "trial")  # have columns, or interest nobody


def compared(
    made: Sequence[Table], runs: Sequence[Run], paths: Sequence[Path], width: int, *, bold: bool = False
) -> Iterator[str]:
    """Yield all tables, and how to read them; with ``bold`` the best of each column has the codes of a terminal."""
    where = listed(paths, 3)
    yield from wrapped(f"caspr-report {__version__}  {count(len(runs), 'record')} in {where}", width)
    yield from wrapped(f"in short {headline(made)}", width)
    if took := clock(made):
        yield from wrapped(f"clock    {took}", width)
    by_budget = list(map(tuning.by_budget, made))
    for each, budgets in zip(made, by_budget, strict=True):
        yield ""
        yield from table_lines(each, width, bold=bold)
        if budgets:
            yield from ["", "by number of trials", *render.lines(budgets, width)]
    yield ""
    yield from wrapped(f"legend   {format.LEGEND}", width)
    yield from wrapped(f"marks    {format.LEGEND_OF_MARKS}{f' {format.BOLD}' * bold}", width)
    if any(by_budget):
        yield from wrapped(f"trials   {tuning.BY_BUDGET}", width)


def trials(made: Sequence[Table], width: int) -> Iterator[str]:
    """Yield the range of good learning rates of each row, and all trials."""
    shown = [(each, every) for each in made if (every := tuning.trials(each))]
    if not shown:
        yield "trials   no row has more than one trial"
        return
    for each, every in shown:
        yield from textwrap.wrap(format.title(each), width, subsequent_indent=INDENT)
        if widths := tuning.widths(each):
            yield from [*render.lines(widths, width), ""]
        yield from [*render.lines(every, width), ""]
    yield from wrapped(f"rates    {tuning.WIDTHS}", width)
    yield from wrapped(f"trials   {tuning.TRIALS}", width)


def table_lines(made: Table, width: int, *, bold: bool = False) -> Iterator[str]:
    """Yield title, a line for each row with its settings and verdict below, and the warnings."""
    whole = format.sheet(made)
    yield from textwrap.wrap(whole.caption, width, subsequent_indent=INDENT)
    (heads, *lines), omitted = render.terminal(Sheet(whole.columns[:-2]), width, bold=bold)  # these stand below
    yield heads
    for row, line in zip(made.rows, lines, strict=True):
        yield line
        if said := "; ".join(filter(None, [format.selected(row), format.marked(row)])):
            yield from textwrap.wrap(said, width, initial_indent=INDENT, subsequent_indent=INDENT * 2)
    yield from render.no_room(omitted, width)
    for warning in made.warnings:
        yield from wrapped(f"warning  {warning}", width)


def profiled(found: Profile, width: int, *, bold: bool = False) -> Iterator[str]:
    notes = [line for text in found.left_out for line in wrapped(f"note     {text}", width)]
    if not found.tasks:
        yield from ["profile  no task has a target: there is nothing to compare", *notes]
        return
    what = f"median {found.unit} to target on {count(len(found.tasks), 'task')}"
    score = f"AlgoPerf's integral, the mean of ρ from 1 to {LONGEST:g}: 1 is the fastest everywhere; {NOT_ALGOPERF}"
    yield from wrapped(f"profile  {what}, as a multiple of the fastest of the task", width)
    yield from [*render.lines(as_sheet(found), width, bold=bold, more="a wider terminal"), ""]
    yield from wrapped(
        f"ρ(t)     share of tasks that are reached within t times the {found.unit} of the fastest", width
    )
    yield from wrapped(f"score    {score}", width)
    yield from notes


def listing(runs: Sequence[Run], width: int) -> Iterator[str]:
    """Yield one line a record, the newest last; the columns that its path says too are left out first."""
    heads = ["task", "optim", "settings that differ", "seed", "state", "step", "final", "time", "record"]
    runs = sorted(runs, key=lambda run: (str(run.status.get("updated", "")), run.path))
    different = _different_settings(runs)
    rows = []
    for run in runs:
        what = [str(run.config["task.name"]), str(run.config["optim.name"]), different[run.path] or "-", str(run.seed)]
        step = run.result.get("steps") or run.status.get("step") or (run.curve[-1].step if run.curve else "-")
        rows.append([*what, run.state, str(step), number(run.final), duration(_seconds(run)), run.path])
    spare = [2, 3, 5, 1, 0, 0, 0, 4, 0]
    yield from render.lines(sheet(heads, rows, left=heads, spare=spare), width, more="a wider terminal or a pipe")


def _seconds(run: Run) -> float | None:
    return run.result.get("seconds", run.curve[-1].seconds if run.curve else None)


def _different_settings(runs: Sequence[Run]) -> dict[str, str]:
    """Return by path the settings in which the records of one task and optimizer differ."""
    groups: dict[tuple[Any, Any], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.config["task.name"], run.config["optim.name"]), []).append(run)
    found: dict[str, str] = {}
    for own in groups.values():
        keys = [key for key in differing(r.config for r in own) if not key.startswith((*NOT_LISTED, *IGNORED_GROUPS))]
        found |= {run.path: joined({k: run.config[k] for k in keys if k in run.config}) for run in own}
    return found


def record_lines(run: Run, width: int = 110) -> Iterator[str]:
    config, result, status = run.config, run.result, run.status
    words = {"search": config.get("search.name"), "trial": config.get("trial")}
    trial = "".join(f" {key}={value}" for key, value in words.items() if value is not None)
    names = " ".join(f"{key}={config[f'{key}.name']}" for key in ("task", "optim"))
    yield f"run      {names} scale={config.get('scale')} seed={run.seed}{trial}"
    own = {key: value for key, value in config.items() if key.startswith("optim.") and key != "optim.name"}
    yield from wrapped(f"optim    {joined(own)}", width)
    step = result.get("steps", status.get("step"))
    after = "" if step is None else f" at step {step}"
    time = "" if _seconds(run) is None else f", {duration(_seconds(run))} of training"
    error = f": {str(status['error']).partition(chr(10))[0]}" if status.get("error") else ""
    yield f"state    {run.state}{after}{time}{error}"
    if result:
        yield f"result   {run.metric} {number(run.final)} at the end; test {number(run.test)}"
    target = result.get("target") or {}
    if target.get("value") is not None:
        reached = f"step {target['step']}, {duration(target.get('seconds'))}" if target.get("step") else "not reached"
        yield f"target   {target['value']:g}: {reached}"
    if bars := sparkline(run.curve):
        values = [point.value for point in run.curve if point.value is not None]
        validations = count(len(run.curve), "validation")
        yield f"curve    {bars}  {number(values[0])} to {number(values[-1])} in {validations}"
    origin = {"command": " ".join(provenance.command(run)), "data": provenance.data(run)}
    where = f"{provenance.hardware(run)}{provenance.products(run)}"
    origin |= {"machine": where, "code": provenance.code(run), "versions": provenance.versions(run)}
    for what, text in origin.items():
        if text:
            yield from wrapped(f"{what:<9}{text}", width)
    yield f"record   {run.path}"


def sparkline(curve: Sequence[Point]) -> str:
    """Return the validations, at most 40, as bars, low to high; one that is not finite is a cross."""
    shown = min(len(curve), 40)
    points = [curve[k * len(curve) // shown] for k in range(shown)]
    finite = [point.value for point in points if point.value is not None]
    if not finite:
        return ""
    unit = max(map(abs, finite)) or 1.0  # their difference can be more than a float holds
    low, span = min(finite) / unit, (max(finite) / unit - min(finite) / unit)
    top = len(BARS) - 1
    heights = [None if p.value is None else top * (p.value / unit - low) / (span or 1.0) for p in points]
    return "".join("×" if height is None else BARS[round(height)] for height in heights)
