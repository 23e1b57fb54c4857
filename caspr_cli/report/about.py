"""The end of a page: how to read it, which settings were chosen, and where the numbers come from."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from caspr_cli.report import formats, words
from caspr_cli.report.html import Cells, el, table
from caspr_cli.report.model import Row, Run, Table
from caspr_cli.report.profile import names

READING = {
    "Mean ± sd, n": "Over the reported seeds that ended with a finite value: n of them. The standard deviation is of "
    "single runs (n − 1 in the denominator), not of the mean. Rows with failed seeds stand behind the others, as their "
    "mean is of the runs that were lucky.",
    "95 % interval": "Of the mean, by Student's t with n − 1 degrees of freedom. With few seeds it is wide: at n = 3, "
    "2.5 standard deviations to each side. A run alone has none, nor have equal values. "
    f"{words.sentence(words.BOUNDED)}.",
    "Verdicts": "A paired t-test where all seeds of a row or of the baseline are common to both, as these share data "
    "order and initial weights; otherwise Welch's. Two-sided at 5 % after Holm's correction for the other rows of the "
    f"table. {words.sentence(words.DIFFERENCES)}. {words.sentence(words.NOT_CORRECTED)}. Where a larger share of seeds "
    "failed on one side, or seeds chose the trial on one side alone, nothing can be told: these are the luckier ones.",
    "What they are about": f"{words.sentence(words.ABOUT_SETTINGS)}. Tuned again, equally good "
    "optimizers may come to settings that differ, and the test finds that difference.",
    "Cannot tell": "The seeds that there are do not separate the two. It does not say that they are equal: it says "
    "what difference they would separate, and, from five seeds on, how many would find the one observed with 80 % "
    "power, if that is the true one.",
    "Test": "The differences in test are of the same seeds. They choose nothing, and no verdict is about them.",
    "Selection": "Each row is tuned: of its trials, the one with the best validation at the end is reported, at fresh "
    "seeds that selected nothing where there are two of these; otherwise a warning says so. Test values are of the "
    "same runs, and choose nothing.",
    "To target": "The first validation that reaches the target; the median over seeds, where one that does not reach "
    "it counts as never. In brackets, how many did. Times are only comparable on the same hardware.",
    "Best of k trials": "The expected best validation if only k of the trials had been made, drawn without "
    "replacement: how much a row owes to its tuning. A failed trial counts as the worst. The values are of the seeds "
    "that choose, so that the end is the winner's, and lucky: the same settings do worse at fresh seeds.",
}


def reading() -> Element:
    """What the numbers are, and what they do not say."""
    parts = [part for what, text in READING.items() for part in (el("dt", what), el("dd", text))]
    return el("section", el("h2", "How to read this"), el("dl", *parts), id="reading")


def settings(tables: Sequence[Table]) -> Element:
    """The chosen trial of each row, and the seeds that are reported."""
    heads = ["row", "task", "selected", "trial", "reported seeds", "records"]
    rows: list[Cells] = [
        [row.label, name, formats.selected(row) or "-", _trial(row), _seeds(row), el("code", _where(row))]
        for name, made in zip(names(tables), tables, strict=True)
        for row in made.rows
    ]
    first = next((run for made in tables for row in made.rows for run in row.runs if _command(run)), None)
    return el(
        "section",
        el("h2", "Settings"),
        table("The selected trial of each row; config.yaml of a record has every key.", heads, rows, numbers=False),
        el("p", "The first of the reported runs was made by") if first else None,
        el("pre", el("code", _command(first))) if first else None,
        id="settings",
    )


def _command(run: Run) -> str:
    return shlex.join(str(word) for word in run.provenance.get("command") or ())


def _trial(row: Row) -> str:
    index = row.selected.index if row.selected else None
    return words.budget(row) if index is None else f"number {index}, of {words.budget(row)}"


def _seeds(row: Row) -> str:
    seeds = ", ".join(f"{run.seed}{'' if run.final is not None else f' ({run.state})'}" for run in row.runs)
    return f"{seeds or '-'}{', fresh' if row.fresh and row.runs else ''}"


def _where(row: Row) -> str:
    """The directories that hold the seeds."""
    return ", ".join(dict.fromkeys(run.path.rpartition("/")[0] or run.path for run in row.runs)) or "-"


def provenance(tables: Sequence[Table], command: str) -> Element:
    """Hardware, versions, code and data of all runs that are reported or chosen from."""
    runs = [run for made in tables for row in made.rows for run in _all(row)]
    rows: list[Cells] = [[what, _counted(of(run) for run in runs)] for what, of in ASKED.items()]
    for name, made in zip(names(tables), tables, strict=True):
        rows.append([f"data of {name}", _counted(_data(run) for row in made.rows for run in _all(row))])
    known = [row for row in rows if row[1]]
    return el(
        "section",
        el("h2", "Provenance"),
        table(f"As {words.count(len(runs), 'record')} say.", ["what", "value"], known, numbers=False)
        if known
        else None,
        el("p", "This page was made by"),
        el("pre", el("code", command)),
        id="provenance",
    )


def _all(row: Row) -> list[Run]:
    runs = [*row.runs, *(run for trial in row.trials for run in trial.runs)]
    return list({run.path: run for run in runs}.values())


def _counted(values: Iterable[str | None]) -> str:
    """The values, the most frequent first; with numbers of runs where there are several."""
    counts = Counter(value for value in values if value)
    if len(counts) < 2:
        return "".join(counts)
    return "; ".join(f"{value} ({words.count(n, 'run')})" for value, n in counts.most_common())


def _machine(run: Run) -> str | None:
    machine, device = run.provenance.get("machine") or {}, run.provenance.get("device") or {}
    if not machine and not device:
        return None
    gpu = f"{device.get('name')}, " if device.get("type") not in (None, "cpu") else ""
    processes = int(device.get("processes") or 1)
    ranks = f"{processes} processes of " if processes > 1 else ""
    threads = f", {ranks}{words.count(int(device['threads']), 'thread')}" if device.get("threads") else ""
    return f"{gpu}{machine.get('processor') or 'unknown processor'}, {machine.get('cores') or '?'} cores{threads}"


def _versions(run: Run) -> str | None:
    packages: dict[str, Any] = run.provenance.get("packages") or {}
    known = {"python": run.provenance.get("python"), **packages}
    return ", ".join(f"{name} {version}" for name, version in known.items() if version) or None


def _code(run: Run) -> str | None:
    code = run.provenance.get("code") or {}
    version = run.provenance.get("caspr_cli")
    commit = f"commit {str(code['commit'])[:12]}" if code.get("commit") else ""
    changed = f"with changes, diff {code['diff_sha256']}" if code.get("diff") else ""
    return ", ".join(filter(None, [f"caspr-cli {version}" if version else "", commit, changed])) or None


def _data(run: Run) -> str | None:
    data = run.provenance.get("data") or {}
    parts = [str(data.get("name") or ""), f"source {data['source']}" if data.get("source") else ""]
    return ", ".join(filter(None, [*parts, f"hash {data['hash']}" if data.get("hash") else ""])) or None


ASKED: dict[str, Callable[[Run], str | None]] = {
    "hardware": _machine,
    "system": lambda run: (run.provenance.get("machine") or {}).get("system"),
    "versions": _versions,
    "code": _code,
}
