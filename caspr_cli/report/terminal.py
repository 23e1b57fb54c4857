"""Tables and records as lines of a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from caspr_cli import __version__
from caspr_cli.report import words
from caspr_cli.report.formats import Column, columns, selected, title, verdict
from caspr_cli.report.model import Point, Row, Run, Table
from caspr_cli.report.rows import IGNORED_GROUPS, differing, setting

BARS = "▁▂▃▄▅▆▇█"
INDENT = "  "
TOLD = ("seed", "output_dir", "resume", "debug", "task.root", "trial")  # in columns of their own, or of no interest
LEGEND = [
    "mean     of validation at the end, ± standard deviation, over n seeds; 95 % interval of the mean (Student's t); "
    f"{words.BOUNDED}; rows with failed seeds stand behind the others",
    "verdict  paired t-test where all seeds of one side are common, else Welch's; at 5 % after Holm's correction for "
    f"the rows of a table; {words.DIFFERENCES}; {words.POWERED}; {words.NOT_CORRECTED}",
    f"caution  {words.ABOUT_SETTINGS}",
]


def compared(made: Sequence[Table], runs: Sequence[Run], paths: Sequence[Path], width: int) -> Iterator[str]:
    """All tables, and how to read them."""
    where = words.listed([str(path) for path in paths], 3)
    yield f"caspr-report {__version__}  {words.count(len(runs), 'record')} in {where}"
    for table in made:
        yield ""
        yield from table_lines(table, width)
    yield ""
    for line in LEGEND:
        yield from wrapped(line, width)


def table_lines(table: Table, width: int) -> Iterator[str]:
    """Title, a line for each row, its settings and verdict below, and what to know before believing it."""
    yield from textwrap.wrap(title(table), width, subsequent_indent=INDENT)
    shown, gone = fitting(columns(table), table.rows, width)
    heads, *lines = aligned([[c.head for c in shown], *([c.cell(row) for c in shown] for row in table.rows)])
    yield heads
    for row, line in zip(table.rows, lines, strict=True):
        yield line
        if said := "; ".join(filter(None, [selected(row), verdict(row)])):
            yield from textwrap.wrap(said, width, initial_indent=INDENT, subsequent_indent=INDENT * 2)
    if gone:
        yield from textwrap.wrap(f"(no room for: {', '.join(gone)}; a wider terminal, --json or --to has all)", width)
    for warning in table.warnings:
        yield from wrapped(f"warning  {warning}", width)


def wrapped(text: str, width: int) -> list[str]:
    """A line that begins with a word in a column of its own."""
    return textwrap.wrap(text, width, subsequent_indent=" " * 9, break_on_hyphens=False, break_long_words=False)


def fitting(found: Sequence[Column], rows: Sequence[Row], width: int) -> tuple[list[Column], list[str]]:
    """The columns for which there is room, and the heads of the others."""
    shown = list(found)
    while sum(max(len(c.head), *(len(c.cell(row)) for row in rows)) + 2 for c in shown) - 2 > width:
        least = max(shown, key=lambda column: column.spare)
        if not least.spare:
            break
        shown.remove(least)
    return shown, [column.head for column in found if column not in shown]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns, all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))])
        for first, *others in lines
    ]


def listing(runs: Sequence[Run]) -> list[str]:
    """One line a record, the newest last."""
    heads = ["task", "optim", "settings that differ", "seed", "state", "step", "final", "time", "record"]
    runs = sorted(runs, key=lambda run: (str(run.status.get("updated", "")), run.path))
    shown = _telling(runs)
    lines = [heads, *(_line(run, shown[run.path]) for run in runs)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def _line(run: Run, settings: str) -> list[str]:
    step = run.result.get("steps", run.status.get("step", run.curve[-1].step if run.curve else None))
    return [
        str(run.config["task.name"]),
        str(run.config["optim.name"]),
        settings or "-",
        str(run.seed),
        run.state,
        "-" if step is None else str(step),
        words.number(run.final),
        words.duration(_seconds(run)),
        run.path,
    ]


def _seconds(run: Run) -> float | None:
    last = run.curve[-1].seconds if run.curve else None
    return run.result.get("seconds", last)


def _telling(runs: Sequence[Run]) -> dict[str, str]:
    """By path: the settings in which the records of one task and optimizer differ."""
    found = {}
    for group in {(run.config["task.name"], run.config["optim.name"]) for run in runs}:
        own = [run for run in runs if (run.config["task.name"], run.config["optim.name"]) == group]
        keys = [key for key in differing([run.config for run in own]) if not key.startswith((*TOLD, *IGNORED_GROUPS))]
        for run in own:
            found[run.path] = " ".join(setting(key, run.config[key]) for key in keys if key in run.config)
    return found


def record_lines(run: Run) -> Iterator[str]:
    """One record in words."""
    config, result = run.config, run.result
    trial = "" if config.get("trial") is None else f" search={config.get('search.name')} trial={config['trial']}"
    yield (
        f"run      task={config['task.name']} optim={config['optim.name']} scale={config.get('scale')} "
        f"seed={run.seed}{trial}"
    )
    others = [setting(key, config[key]) for key in config if key.startswith("optim.") and key != "optim.name"]
    yield from wrapped(f"optim    {' '.join(others)}", 110)
    step = result.get("steps", run.status.get("step"))
    error = f": {str(run.status['error']).partition(chr(10))[0]}" if run.status.get("error") else ""
    after = "" if step is None else f" at step {step}"
    time = "" if _seconds(run) is None else f", {words.duration(_seconds(run))} of training"
    yield f"state    {run.state}{after}{time}{error}"
    if result:
        yield f"result   {run.metric} {words.number(run.final)} at the end; test {words.number(run.test)}"
    yield from _target(run)
    if bars := sparkline(run.curve):
        values = [point.value for point in run.curve if point.value is not None]
        ends = f"{words.number(values[0])} to {words.number(values[-1])}"
        yield f"curve    {bars}  {ends} in {words.count(len(run.curve), 'validation')}"
    yield from _origin(run)
    yield f"record   {run.path}"


def _target(run: Run) -> Iterator[str]:
    target = run.result.get("target") or {}
    if target.get("value") is not None:
        when = (
            f"step {target['step']}, {words.duration(target.get('seconds'))}" if target.get("step") else "not reached"
        )
        yield f"target   {target['value']:g}: {when}"


def _origin(run: Run) -> Iterator[str]:
    origin = run.provenance
    code, data, device = (origin.get(key) or {} for key in ("code", "data", "device"))
    if command := origin.get("command"):
        yield f"command  {' '.join(map(str, command))}"
    if data:
        yield f"data     {data.get('name')} ({data.get('source')}), hash {data.get('hash')}"
    machine = (origin.get("machine") or {}).get("processor") or "-"
    if origin:
        processes, threads = (int(device.get(key) or 1) for key in ("processes", "threads"))
        width = f"{words.count(processes, 'process', 'es')}, {words.count(threads, 'thread')}"
        yield f"machine  {machine}; {device.get('name') or 'cpu'}, {width}"
        packages = origin.get("packages") or {}
        yield (
            f"code     caspr-cli {origin.get('caspr_cli')}, commit {str(code.get('commit') or '-')[:10]}, "
            f"torch {packages.get('torch')}, Python {origin.get('python')}"
        )


def sparkline(curve: Sequence[Point], most: int = 40) -> str:
    """The validations as bars, low to high; one that is not finite is a cross."""
    points = [curve[k * len(curve) // most] for k in range(most)] if len(curve) > most else list(curve)
    finite = [point.value for point in points if point.value is not None]
    if not finite:
        return ""
    unit = max(map(abs, finite)) or 1.0  # their difference can be more than a float holds
    low, span = min(finite) / unit, (max(finite) / unit - min(finite) / unit)
    top = len(BARS) - 1
    return "".join(
        "×" if p.value is None else BARS[round(top * (p.value / unit - low) / span)] if span else BARS[0]
        for p in points
    )
