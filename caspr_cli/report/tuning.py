"""The results of tuning as tables of text, heads first: ranges of good rates, budgets, all trials, final settings."""

from __future__ import annotations

from typing import Any

from caspr_cli.report import stats
from caspr_cli.report.format import interval, number
from caspr_cli.report.model import Row, Run, Table
from caspr_cli.report.render import Cells
from caspr_cli.report.selection import ALWAYS_TUNED, further, plain, planned
from caspr_cli.report.trials import Outcome, edges, outcomes, tried, varied, width

BUDGETS = (4, 16, 64)  # numbers of trials that every study should show, as far as it has them
WIDTHS = (
    "Learning rates within 1 % of the best value of a row's trials, interpolated; ≥: up to an end of what was tried."
)
BY_BUDGET = (
    "Expected best of so many trials, at the seed that selects, which flatters it; in brackets where 95 % of searches "
    "of that many trials would end, by drawing with replacement from those that were run. 0: the untuned row, with the "
    "95 % interval of its mean, at the reported seeds."
)
FURTHER = " Trials that were added as a best value lay at the edge are left out: where they lie depends on the others."
TRIALS = (
    "All trials, the best value first. Value: at the seed that selects, the mean where there are several; again: at "
    "further seeds, which decide among the best."
)
RAN_WITH = (
    "What the reported seeds ran with. -: the optimizer has no such key. Embeddings, output layers, norms and biases "
    "have the rate lr times adamw_lr_scale; a row with momentum uses it for its matrices, betas for what AdamW takes."
)
# The settings that methods share, and that a fair comparison has at the same value or tunes for all.
SHARED = (
    ALWAYS_TUNED, "optim.adamw_lr_scale", "optim.betas", "optim.momentum", "optim.nesterov", "optim.weight_decay",
    "schedule.warmup", "optim.interval", "optim.exponent", "optim.graft", "trainer.clip_norm", "trainer.max_steps",
)  # fmt: skip
ALWAYS_NESTEROV = ("muon", "normuon", "sgd", "nadamw", "caspr_author")  # they have no key for it


def beside(table: Table) -> list[tuple[str, Cells]]:
    """Return the short tables beside the results, each with its caption; those without a row are left out."""
    added = any(further(run) for row in table.rows for run in row.records)
    made = [(BY_BUDGET + FURTHER * added, by_budget(table)), (WIDTHS, widths(table)), (RAN_WITH, ran_with(table))]
    return [(caption, cells) for caption, cells in made if len(cells) > 1]


def widths(table: Table) -> Cells:
    """Return the range of good learning rates of each tuned row; the heads alone if no row is tuned."""
    found = [["row", "best lr", table.metric, "lr within 1 %", "factor"]]
    for row in tried(table):
        if wide := width(row, higher_is_better=table.higher_is_better):
            lr, value = wide.best
            span = f"{wide.low:.3g} to {wide.high:.3g}"
            found.append([row.label, plain(lr), number(value), span, wide.factor])
    return found


# ---- budgets -----------------------------------------------------------------------------------------------------


def by_budget(table: Table) -> Cells:
    """Return the expected best value of each row after 0, 1, 2, ... trials; the heads alone if no row is tuned."""
    rows = [row for row in tried(table) if row.best_of]
    totals = {len(row.best_of) for row in rows}
    budgets = sorted(totals | {k for k in BUDGETS if k < max(totals, default=0)})
    found = [["row", "0 trials", *(f"{k} trials" for k in budgets)]]
    for row in rows:
        untuned = untuned_of(row, table)
        none = f"{number(untuned.mean, untuned.sd)} ({interval(untuned)})" if untuned and untuned.n else "-"
        found.append([row.label, none, *(_expected(row, k, higher=table.higher_is_better) for k in budgets)])
    return found


def untuned_of(row: Row, table: Table) -> Row | None:
    """Return the row of the same optimizer with its own values: that with the same settings, or the only one."""
    rows = [other for other in table.rows if other.untuned and other.optim == row.optim]
    same = [other for other in rows if _without_trial(other) == _without_trial(row)]
    return (same or rows)[0] if len(same or rows) == 1 else None


def _without_trial(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.settings.items() if key != "trial"}


def _expected(row: Row, k: int, *, higher: bool) -> str:
    if k > len(row.best_of):
        return "-"
    low, high = stats.range_of_best(planned(row.trials, row.scores), k, higher_is_better=higher)
    return f"{number(row.best_of[k - 1])} ({number(low)} to {number(high)})"


# ---- trials ------------------------------------------------------------------------------------------------------


def trials(table: Table) -> Cells:
    """Return every trial of every tuned row, with its tuned keys; the heads alone if no row is tuned."""
    rows = [row for row in table.rows if len(row.trials) > 1]
    keys = list(dict.fromkeys(key for row in rows for key in varied(row)))
    found = [["row", "trial", table.metric, "again", *(key.removeprefix("optim.") for key in keys), "state"]]
    for row in rows:
        for one in outcomes(row, higher_is_better=table.higher_is_better):
            index = "-" if one.trial.index is None else str(one.trial.index)
            values = [plain(one.trial.values[key]) if key in one.trial.values else "-" for key in keys]
            again = ", ".join(map(number, one.again)) or "-"
            found.append([row.label, index, number(one.value), again, *values, _state(row, one)])
    return found


def _state(row: Row, one: Outcome) -> str:
    """Return the state of a trial; of the selected one also which of its values lie at the edge of what was tried."""
    if not one.best:
        return one.state
    at_edge = [f"{key.removeprefix('optim.')} {end}" for key, end, _ in edges(row)]
    return f"{one.state}, selected" + (f"; at the edge of what was tried: {', '.join(at_edge)}" if at_edge else "")


# ---- settings ----------------------------------------------------------------------------------------------------


def ran_with(table: Table) -> Cells:
    """Return the shared settings with which each row was run, after tuning; keys that no row has are left out."""
    configs = {row.label: _config(row) for row in table.rows if row.runs}
    keys = [key for key in SHARED if any(key in config for config in configs.values())]
    cells = [[label, *(_value(config, key) for key in keys)] for label, config in configs.items()]
    return [["row", *(key.rpartition(".")[2] for key in keys)], *cells]


def _config(row: Row) -> dict[str, Any]:
    run: Run = row.runs[0]
    fixed = {"optim.nesterov": True} if row.optim in ALWAYS_NESTEROV else {}
    return fixed | run.config


def _value(config: dict[str, Any], key: str) -> str:
    return plain(config[key]) if key in config else "-"
