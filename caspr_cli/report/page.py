"""Reports and answers as one HTML file each: no scripts, nothing from elsewhere, light and dark, on any width."""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from statistics import fmean

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from caspr_cli.common.format import count, listed
from caspr_cli.report import answer, figures, format, profile, provenance, sensitivity, style, tuning
from caspr_cli.report.answer import Answer
from caspr_cli.report.formulas import typeset, typeset_figure
from caspr_cli.report.headline import clock, headline
from caspr_cli.report.model import Row, Run, Table
from caspr_cli.report.profile import names
from caspr_cli.report.render import Sheet, sheet
from caspr_cli.report.selection import with_common_labels
from caspr_cli.report.style import PALETTE, UNWRITABLE

BEST_OF = (
    "The expected best of so many trials, of those that were run, with the seeds that select: the last value is the "
    "winner's, which was lucky, so that held-out seeds end worse."
)


@cache
def _templates() -> Environment:
    made = Environment(
        loader=PackageLoader("caspr_cli.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: UNWRITABLE.sub("\ufffd", value) if type(value) is str else value,
    )  # fmt: skip
    made.globals.update(
        palette=PALETTE, inline=inline, typeset=typeset, typeset_figure=typeset_figure, format=format, lib=answer,
        profile=profile, tuning=tuning, str=str,
    )  # fmt: skip
    made.filters.update(sentence=format.sentence)
    return made


def inline(svg: str) -> Markup:
    """Return a figure in the colours of the page, which are variables, and as wide as its place."""
    head, rest = svg.split(">", 1)
    head = re.sub(r' (?:xmlns|width|height)="[^"]*"', "", head)
    return Markup(style.recoloured(f"{head}>{rest}", {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}))


def answers(made: Sequence[Answer], title: str) -> str:
    """Return answers of ``caspr-verify`` as one page: the questions first."""
    claims = [claim for one in made for claim in one.claims]
    failed = [text for text, held in claims if not held]
    total = count(len(claims), "statement")
    summary = f"{count(len(made), 'question')}; all {total} that should hold did."
    if failed:
        summary = f"{len(failed)} of {total} that should hold did not: {'; '.join(failed)}."
    return _templates().get_template("answers.html.j2").render(title=title, answers=made, summary=summary)


def compared(tables: Sequence[Table], command: str) -> str:
    """Return the comparison of ``command`` as one page."""
    tasks = listed(dict.fromkeys(table.task for table in tables))
    over_all = profile.profile(tables, "steps")
    several = len(over_all.tasks) > 1  # of one task a profile says what the table says
    across = with_common_labels(tables)
    styles = style.styles(row.label for table in (*tables, *across) for row in table.rows)
    by_label = [{row.label: row for row in table.rows} for table in across]
    means = [next(c for c in format.sheet(table).columns if c.head.startswith("mean")) for table in across]
    runs = [run for table in tables for row in table.rows for run in row.runs]
    sections = [
        {"name": name, "anchor": f"task-{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{k}", "table": table}
        | {"figures": _figures(table, styles)}
        for k, (name, table) in enumerate(zip(names(tables), tables, strict=True))
    ]
    return _templates().get_template("comparison.html.j2").render(
        title=f"Optimizers compared on {tasks}",
        command=command,
        headline=headline(tables),
        opening=[*opening(tables), *filter(None, [clock(tables)])],
        sections=sections,
        styles=styles,
        by_label=by_label,
        ranked=_by_place(by_label),
        profile_of=over_all if several else None,
        profile_svg=figures.profile(over_all, styles) if several else "",
        first_command=shlex.join(next(filter(None, map(provenance.command, runs)), [])),
        provenance=_provenance(tables),
        best=[{table.rows[k].label for k in mean.best} for table, mean in zip(across, means, strict=True)],
        in_per_cent=lambda table: any(row.difference and row.difference.share_of is not None for row in table.rows),
        marks=format.MARKS,
    )  # fmt: skip


def opening(tables: Sequence[Table]) -> list[str]:
    """Return what was compared, in three sentences."""
    labels = dict.fromkeys(row.label for table in with_common_labels(tables) for row in table.rows)
    every = [row for table in tables for row in table.rows]
    reported = [run for row in every for run in row.runs]
    trials = count(sum(len(row.trials) for row in every if not row.untuned), "trial")
    finite = sum(run.final is not None for run in reported)
    going = sum(not run.ended for row in every if row.selected for run in row.selected.runs)
    bases = dict.fromkeys(format.baseline(table) for table in tables if table.baseline)
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


def _figures(table: Table, styles: figures.Styles) -> list[tuple[str, str]]:
    counts: dict[int, list[str]] = {}
    for row in table.rows:
        if row.n:
            counts.setdefault(row.n, []).append(row.label)
    n = "; ".join(f"n = {n}{f': {listed(counts[n])}' * (len(counts) > 1)}" for n in sorted(counts, reverse=True))
    mean = f"Mean over training, with its 95 % interval (of two seeds both lines instead); {n}."
    drawn = [
        (figures.curves(table, "steps", styles), mean),
        (figures.curves(table, "seconds", styles), "The same by time: seconds are medians over seeds."),
        (figures.intervals(table, styles), f"Means with their 95 % intervals; small dots are single seeds; {n}."),
        (figures.best_of(table, styles), BEST_OF),
        (sensitivity.by_rate(table, styles), sensitivity.about_rates(table)),
        (sensitivity.by_others(table, styles), sensitivity.BY_OTHERS),
    ]
    return [(svg, caption) for svg, caption in drawn if svg]


def _provenance(tables: Sequence[Table]) -> Sheet:
    """Return hardware, versions, code and data of all runs that are reported or selected from."""
    by_table = [
        {run.path: run for row in table.rows for runs in (row.runs, *(t.runs for t in row.trials)) for run in runs}
        for table in tables
    ]
    every = [run for runs in by_table for run in runs.values()]
    asked = (provenance.hardware, provenance.machine, provenance.versions, provenance.code)
    rows = [(of.__name__, _counted(map(of, every))) for of in asked]
    for name, runs in zip(names(tables), by_table, strict=True):
        rows.append((f"data of {name}", _counted(map(provenance.data, runs.values()))))
    known = [(what, value) for what, value in rows if value]
    return sheet(["what", "value"], known, f"As {count(len(every), 'record')} say.")


def _counted(values: Iterable[str]) -> str:
    """Return the values, the most frequent first; with numbers of runs where there are several."""
    counts = Counter(value for value in values if value)
    if len(counts) < 2:
        return "".join(counts)
    return "; ".join(f"{value} ({count(n, 'run')})" for value, n in counts.most_common())
