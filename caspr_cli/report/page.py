"""Reports and answers as one HTML file each: no scripts, nothing from elsewhere, light and dark, on any width."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from caspr_cli.common.format import count, listed
from caspr_cli.report import answer, figures, format, profile, style
from caspr_cli.report.answer import Answer
from caspr_cli.report.format import NOT_SIGNIFICANT, NOT_TESTED
from caspr_cli.report.model import Row, Run, Table
from caspr_cli.report.profile import Profile, names
from caspr_cli.report.selection import labels_across
from caspr_cli.report.style import PALETTE, UNWRITABLE, Style

# A verdict has a mark, too: its colour alone would not reach everyone.
MARKS = {"better": "▲", "worse": "▼", NOT_SIGNIFICANT: "≈", NOT_TESTED: "○", "baseline": "●"}
Styles = Mapping[str, Style]


@cache
def _templates() -> Environment:
    made = Environment(
        loader=PackageLoader("caspr_cli.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: UNWRITABLE.sub("\ufffd", value) if type(value) is str else value,
    )
    made.globals.update(palette=PALETTE, inline=inline, format=format, lib=answer, profile=profile)
    made.filters.update(sentence=format.sentence)
    return made


def inline(svg: str) -> Markup:
    """Return a figure in the colours of the page, which are variables, and as wide as its place."""
    variables = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}

    def coloured(attribute: re.Match[str]) -> str:
        return re.sub(r"#[0-9a-f]{6}", lambda m: variables.get(m[0], m[0]), attribute[0])

    head, rest = svg.split(">", 1)
    head = re.sub(r' (?:xmlns|width|height)="[^"]*"', "", head)
    return Markup(re.sub(r'style="[^"]*"', coloured, f"{head}>{rest}"))


# ---- answers -----------------------------------------------------------------------------------------------------


def answers(made: Sequence[Answer], title: str) -> str:
    """Return answers of ``caspr-verify`` as one page: the questions first."""
    return _templates().get_template("answers.html.j2").render(title=title, answers=made, summary=_all_claims(made))


def _all_claims(made: Sequence[Answer]) -> str:
    broken = [text for one in made for text, held in one.claims if not held]
    total = count(sum(len(one.claims) for one in made), "statement")
    if broken:
        return f"{len(broken)} of {total} that should hold did not: {'; '.join(broken)}."
    return f"{count(len(made), 'question')}; all {total} that should hold did."


# ---- comparisons -------------------------------------------------------------------------------------------------


def compared(tables: Sequence[Table], command: str) -> str:
    """Return the page of some tables, with their performance profile."""
    tasks = listed(list(dict.fromkeys(table.task for table in tables)))
    return page(tables, profile.profile(tables, "steps"), f"Optimizers compared on {tasks}", command)


def page(tables: Sequence[Table], found: Profile | None, title: str, command: str) -> str:
    """Return the whole file.

    Args:
        found: the profile of these tables; left out if it is None or of fewer than two tasks.
        command: what made the page, as one would type it.
    """
    across = labels_across([table.rows for table in tables])
    own = [row.label for table in tables for row in table.rows]
    styles = style.styles([*own, *(label for labels in across for label in labels)])
    by_label = [dict(zip(labels, table.rows, strict=True)) for labels, table in zip(across, tables, strict=True)]
    runs = [run for table in tables for row in table.rows for run in row.runs]
    sections = [
        {"name": name, "anchor": f"task-{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{k}", "table": table}
        | {"figures": [(svg, caption) for caption, draw in _figures(table, styles) if (svg := draw())]}
        for k, (name, table) in enumerate(zip(names(tables), tables, strict=True))
    ]
    return _templates().get_template("comparison.html.j2").render(
        title=title,
        command=command,
        opening=opening(tables),
        sections=sections,
        styles=styles,
        by_label=by_label,
        ranked=_by_place(by_label),
        profile_of=found if found and len(found.tasks) > 1 else None,  # of one task it says what the table says
        profile_svg=figures.profile(found, styles) if found else "",
        first_command=next(filter(None, map(_command, runs)), ""),
        provenance=_provenance(tables),
        kind=kind,
        in_per_cent=lambda table: any(row.difference and row.difference.share_of is not None for row in table.rows),
        marks=MARKS,
        trial=_trial,
        seeds_of=_reported_seeds,
        records_of=_records,
    )  # fmt: skip


def opening(tables: Sequence[Table]) -> list[str]:
    """Return what was compared, in three sentences."""
    labels = list(dict.fromkeys(label for own in labels_across([table.rows for table in tables]) for label in own))
    every = [row for table in tables for row in table.rows]
    reported = [run for row in every for run in row.runs]
    trials = count(sum(len(row.trials) for row in every), "trial")
    finite = sum(run.final is not None for run in reported)
    going = sum(not run.ended for row in every if row.selected for run in row.selected.runs)
    bases = list(dict.fromkeys(format.baseline(table) for table in tables if table.baseline))
    rows = listed(labels)
    if len(rows) > 200:
        rows = f"variants of {listed(sorted({row.optim for row in every}))}"
    how = "all ended" if finite == len(reported) else f"{finite} of them ended"
    more = f", and {going} more of the selected settings {'is' if going == 1 else 'are'} not finished" if going else ""
    return [
        f"{count(len(labels), 'row')} compared on {count(len(tables), 'task')} ({listed(names(tables))}): {rows}.",
        f"{count(len(reported), 'reported run')}{_seeds(reported)}; {how} with a finite value{more}. "
        f"Settings were selected from {trials} in all.",
        f"Against {listed(bases)}: verdicts are tests of the difference to it."
        if bases
        else "There is no baseline, so no row is tested against another.",
    ]


def _seeds(runs: Sequence[Run]) -> str:
    seeds = sorted({run.seed for run in runs})
    if not seeds:
        return ""
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f" with seeds {seeds[0]} to {seeds[-1]}"
    return f" with seed{'s' * (len(seeds) > 1)} {listed([str(seed) for seed in seeds])}"


def _by_place(tables: Sequence[Mapping[str, Row]]) -> list[str]:
    """Return all labels, by their mean place in the tables that have them."""
    places: dict[str, list[float]] = {}
    for rows in tables:
        for k, label in enumerate(rows):
            places.setdefault(label, []).append(k / max(len(rows) - 1, 1))
    return sorted(places, key=lambda label: fmean(places[label]))


def kind(row: Row) -> str:
    """Return the verdict as one of the keys of ``MARKS``; empty without one."""
    if row.difference:
        return row.difference.verdict.partition(":")[0]
    return "baseline" if row.is_baseline else ""


def _figures(table: Table, styles: Styles) -> list[tuple[str, Callable[[], str]]]:
    counts: dict[int, list[str]] = {}
    for row in table.rows:
        if row.n:
            counts.setdefault(row.n, []).append(row.label)
    several = "; ".join(f"n = {n}: {listed(labels)}" for n, labels in sorted(counts.items(), reverse=True))
    n = several if len(counts) > 1 else "".join(f"n = {n}" for n in counts)
    return [
        (f"Mean over training, with its 95 % interval; {n}.", lambda: figures.curves(table, "steps", styles)),
        ("The same by time: seconds are medians over seeds.", lambda: figures.curves(table, "seconds", styles)),
        (
            f"Means with their 95 % intervals; small dots are single seeds; {n}.",
            lambda: figures.intervals(table, styles),
        ),
        (
            "The expected best of so many trials, of those that were run, with the seeds that select: the last value "
            "is the winner's, which was lucky, so that held-out seeds end worse.",
            lambda: figures.best_of(table, styles),
        ),
    ]


# ---- settings and provenance -------------------------------------------------------------------------------------


def _trial(row: Row) -> str:
    index = row.selected.index if row.selected else None
    return format.budget(row) if index is None else f"number {index}, of {format.budget(row)}"


def _reported_seeds(row: Row) -> str:
    seeds = ", ".join(f"{run.seed}{'' if run.final is not None else f' ({run.state})'}" for run in row.runs)
    return f"{seeds or '-'}{', held out' if row.held_out and row.runs else ''}"


def _records(row: Row) -> str:
    """Return the directories of the seeds."""
    return ", ".join(dict.fromkeys(run.path.rpartition("/")[0] or run.path for run in row.runs)) or "-"


def _command(run: Run) -> str:
    return shlex.join(str(word) for word in run.provenance.get("command") or ())


def _provenance(tables: Sequence[Table]) -> dict[str, Any]:
    """Return hardware, versions, code and data of all runs that are reported or selected from."""
    by_table = [
        {run.path: run for row in table.rows for runs in (row.runs, *(t.runs for t in row.trials)) for run in runs}
        for table in tables
    ]
    every = [run for runs in by_table for run in runs.values()]
    asked = {"hardware": _machine, "system": _system, "versions": _versions, "code": _code}
    rows = {what: _counted(map(of, every)) for what, of in asked.items()}
    rows |= {
        f"data of {name}": _counted(map(_data, runs.values()))
        for name, runs in zip(names(tables), by_table, strict=True)
    }
    return {"records": count(len(every), "record"), "rows": {what: value for what, value in rows.items() if value}}


def _counted(values: Iterable[str]) -> str:
    """Return the values, the most frequent first; with numbers of runs where there are several."""
    counts = Counter(value for value in values if value)
    if len(counts) < 2:
        return "".join(counts)
    return "; ".join(f"{value} ({count(n, 'run')})" for value, n in counts.most_common())


def _machine(run: Run) -> str:
    machine, device = run.provenance.get("machine") or {}, run.provenance.get("device") or {}
    if not machine and not device:
        return ""
    gpu = f"{device.get('name')}, " if device.get("type") not in (None, "cpu") else ""
    processes = int(device.get("processes") or 1)
    ranks = f"{processes} processes of " if processes > 1 else ""
    threads = f", {ranks}{count(int(device['threads']), 'thread')}" if device.get("threads") else ""
    return f"{gpu}{machine.get('processor') or 'unknown processor'}, {machine.get('cores') or '?'} cores{threads}"


def _system(run: Run) -> str:
    return (run.provenance.get("machine") or {}).get("system") or ""


def _versions(run: Run) -> str:
    known = {"python": run.provenance.get("python"), **(run.provenance.get("packages") or {})}
    return ", ".join(f"{name} {version}" for name, version in known.items() if version)


def _code(run: Run) -> str:
    code, version = run.provenance.get("code") or {}, run.provenance.get("caspr_cli")
    commit = f"commit {str(code['commit'])[:12]}" if code.get("commit") else ""
    changed = f"with changes, diff {code['diff_sha256']}" if code.get("diff") else ""
    return ", ".join(filter(None, [f"caspr-cli {version}" if version else "", commit, changed]))


def _data(run: Run) -> str:
    data = run.provenance.get("data") or {}
    named = {"": data.get("name"), "source ": data.get("source"), "hash ": data.get("hash")}
    return ", ".join(f"{text}{value}" for text, value in named.items() if value)
