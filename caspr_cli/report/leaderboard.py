"""The leaderboard: rows that were tuned alike, from packs, as a page that tells how to enter one's own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from caspr_cli.common.format import listed
from caspr_cli.common.selection import TUNING_SEED
from caspr_cli.report import entry, format, stats
from caspr_cli.report.compare import tables
from caspr_cli.report.model import Row, Run, Table
from caspr_cli.report.profile import as_sheet, profile
from caspr_cli.report.render import markdown, markdown_text, sheet
from caspr_cli.report.settings import plain
from caspr_cli.report.trials import edges
from caspr_cli.report.tuning import untuned_of

BASELINE = "adamw"
TEMPLATE = Path(__file__).with_name("templates") / "leaderboard.md"
# How each bundled task is run as on the board, without the optimizer.
EXPERIMENTS = {
    "c4_lm": "experiment=c4_14m",
    "ogbg_molpcba": "experiment=molpcba",
    "ud_pos": "experiment=ud_pos",
    "resnet": "experiment=vision task=resnet",
    "vit": "experiment=vision task=vit trainer.max_steps=2000 trainer.val_every=200",
}
OVER_ALL = """\
The median over the reported seeds until the validation at which tuned `adamw` ends (the median of its seeds), as a
multiple of that of the fastest row of the task. It is read off curves whose rate falls to zero at the end of the whole
run, so that a run that is planned for fewer steps may be there sooner. *score*: AlgoPerf's integral of the profile from
1 to 4, which is 1 for a row that is the fastest everywhere; ρ(t): the share of tasks within t times the fastest.
Seconds are coarse: other programs ran beside."""
HEADS = ["", "optimizer", "n", "validation", "95 % interval", "test", "untuned", "trials", f"against {BASELINE}",
         "against the first", "records"]  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A row that is ranked: in the table of its own pack."""

    pack: str
    row: Row
    table: Table


@dataclass
class Board:
    places: list[Place] = field(default_factory=list)  # the rows that are ranked
    tables: list[Table] = field(default_factory=list)  # of their records, those of one task together
    refused: dict[str, list[str]] = field(default_factory=dict)  # by pack, why its rows, or some, are not ranked

    def against(self, row: Row, table: Table) -> list[str]:
        """Return why a row may not stand beside those that are ranked."""
        return entry.against(row, table, self.tables) + [
            f"{place.pack} has it already"
            for place in self.places
            if (place.table.task, place.table.scale, place.table.data) == (table.task, table.scale, table.data)
            and entry.same_optimizer(place.row, row)
        ]


def board(packs: Mapping[str, Sequence[Run]], draw: entry.Draw | None = None) -> Board:
    """Return which rows of packs, by name, are ranked: on each task the first one of each optimizer."""
    found = Board()
    for pack, runs in packs.items():
        if other := entry.other_searches(runs):
            found.refused[pack] = [other]
            continue
        for table, row in [(made, row) for made in tables(runs) for row in made.rows if not row.untuned]:
            if wrong := entry.problems(row, draw) + found.against(row, table):
                more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
                found.refused.setdefault(pack, []).append(f"{row.label} on {table.task}: {wrong[0]}{more}")
                continue
            found.places.append(Place(pack, row, table))
            if table.task not in {other.task for other in found.tables}:  # the first says what the others have to fit
                found.tables = _tables(found.places)
        found.tables = _tables(found.places)
    return found


def _tables(places: Sequence[Place]) -> list[Table]:
    """Return tables of the rows that are ranked, each beside its untuned one."""
    rows = [row for place in places for row in (place.row, untuned_of(place.row, place.table)) if row]
    return tables([run for row in rows for run in row.records]) if rows else []


# ---- the page ----------------------------------------------------------------------------------------------------


def page(packs: Mapping[str, Sequence[Run]], command: str, draw: entry.Draw | None = None) -> str:
    """Return the page: a table for each task, what is not ranked and why, and how to enter an optimizer."""
    found = board(packs, draw)
    sections = [part for table in found.tables for part in _section(table, found.places)]
    sections += _over_all(found)
    if empty := sorted(EXPERIMENTS.keys() - {table.task for table in found.tables}):
        first = f"`{_entry(empty[0])}` would be the first on {empty[0]}"
        sections.append(f"No row is ranked yet on {listed(empty)}: {first}.")
    rules = {
        "search": entry.SEARCH, "seed": TUNING_SEED, "rerank": entry.RERANK, "seeds": entry.LEAST_SEEDS,
        "deviations": entry.DEVIATIONS, "tolerance": f"{100 * entry.TOLERANCE:g} %",
    }  # fmt: skip
    return TEMPLATE.read_text(encoding="utf8").format(
        tables="\n\n".join(sections), refused=_refused(found.refused), command=command, **rules
    )


def _section(table: Table, places: Sequence[Place]) -> Iterator[str]:
    rows = [row for row in table.rows if not row.untuned]
    packs = {run.path: place.pack for place in places for run in place.row.records}
    yield f"## {markdown_text(format.title(table))}"
    lines = []
    for number, (row, first) in enumerate(zip(rows, _against_first(table, rows), strict=True), 1):
        untuned = untuned_of(row, table)
        lines.append([
            str(number), row.label, str(row.n), format.mean_sd(row.validation), format.interval(row.validation),
            format.mean_sd(row.test), format.number(untuned.mean, untuned.validation.sd) if untuned else "-",
            str(len(row.trials)), _against_baseline(row), first, packs[row.records[0].path],
        ])  # fmt: skip
    yield markdown(sheet(HEADS, lines))
    differ = [line for line in table.warnings if line.startswith("different ")]  # code and hardware of several packs
    if notes := [*differ, *(line for row in rows for line in _edges(row))]:
        yield "\n".join(f"- {markdown_text(line)}" for line in notes)
    seeds = ",".join(str(run.seed) for run in rows[0].runs)
    planned = rows[0].records[0].config["search.trials"]
    refined = max(run.config.get("search.refine") or 0 for run in rows[0].records)
    budget = f"search.trials={planned} search.refine={refined}"
    yield f"Run your own like these{_of(table.task)}:\n\n    {_entry(table.task)} {budget} seed={seeds}"


def _over_all(found: Board) -> Iterator[str]:
    """Yield how soon each row is where the baseline ends, over all tasks, in steps and in seconds."""
    ends = {
        table.task: end
        for table in found.tables
        for row in table.rows
        if row.label == BASELINE and (end := stats.median(list(row.values.values()))) is not None
    }
    if len(ends) < 2:
        return
    made = tables([run for place in found.places for run in place.row.records], wanted=ends)
    yield "## Over all tasks: how soon each row is where AdamW ends"
    yield OVER_ALL
    for unit in ("steps", "seconds"):
        yield f"In {unit}:"
        yield markdown(as_sheet(profile(made, unit)))


def _of(task: str) -> str:
    return "" if task in EXPERIMENTS else f", with an experiment in your package that has task={task} and search=joint"


def _entry(task: str) -> str:
    return f"caspr-train {EXPERIMENTS.get(task, f'experiment={task}')} optim=my_opt"


def _against_first(table: Table, rows: Sequence[Row]) -> list[str]:
    """Return the verdict of each row against the first one.

    Which row is the first was not known before, so that p-values are corrected for all pairs of rows.
    """
    pairs = list(combinations(rows, 2))
    found = [stats.compare(other.values, one.values) for one, other in pairs]
    failed = [one.failed or other.failed for one, other in pairs]
    corrected = stats.holm([None if lucky else each.p_value for each, lucky in zip(found, failed, strict=True)])
    said = ["-"]
    for each, p in list(zip(found, corrected, strict=True))[: len(rows) - 1]:  # combinations() begins with the first
        kind = format.verdict(each, p, len(pairs), higher_is_better=table.higher_is_better).partition(":")[0]
        said.append(_verdict(kind, each, p))
    return said


def _against_baseline(row: Row) -> str:
    each = row.difference
    return _verdict(row.kind, each, each.p_holm) if each else row.kind or "-"


def _verdict(kind: str, each: stats.Comparison, p: float | None) -> str:
    return f"{kind}, {format.change(each)}" + (f", {format.p(p, corrected=True)}" if p is not None else "")


def _edges(row: Row) -> Iterator[str]:
    for key, end, seen in edges(row):
        best = seen[0] if end == "smallest" else seen[-1]
        yield f"{row.label}: its {key.removeprefix('optim.')}, {plain(best)}, is the {end} of {len(seen)} tried"


def _refused(refused: Mapping[str, Sequence[str]]) -> str:
    """Return a list of the packs that have rows that are not ranked, with the reasons."""
    by_reason: dict[tuple[str, ...], list[str]] = {}
    for pack, lines in refused.items():
        by_reason.setdefault(tuple(lines), []).append(f"`{pack}`")
    said = [f"- {listed(packs, 20)}: {markdown_text('; '.join(lines))}" for lines, packs in by_reason.items()]
    return "\n".join(said) or "Nothing."
