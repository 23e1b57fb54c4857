"""The results of tuning as sheets: ranges of good rates, budgets, all trials, final settings."""

from typing import Any

from caspr_cli.report import stats
from caspr_cli.report.format import interval, number
from caspr_cli.report.model import Row, Table
from caspr_cli.report.render import Sheet, sheet
from caspr_cli.report.selection import ALWAYS_TUNED
from caspr_cli.report.settings import plain, short
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
FURTHER = " Later trials (search.extend, search.refine) are left out: where they lie depends on the first ones."
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


def beside(table: Table) -> list[Sheet]:
    """Return the short sheets beside the results; those without a row are left out."""
    return list(filter(None, [by_budget(table), widths(table), ran_with(table)]))


def widths(table: Table) -> Sheet:
    """Return the range of good learning rates of each tuned row."""
    found = [(row, wide) for row in tried(table) if (wide := width(row))]
    rows = [
        [row.label, plain(wide.best[0]), number(wide.best[1]), f"{wide.low:.3g} to {wide.high:.3g}", wide.factor]
        for row, wide in found
    ]
    return sheet(["row", "best lr", table.metric, "lr within 1 %", "factor"], rows, WIDTHS)


def by_budget(table: Table) -> Sheet:
    """Return the expected best value of each tuned row after 0, 1, 2, ... trials."""
    rows = [row for row in tried(table) if row.best_of]
    totals = {len(row.best_of) for row in rows}
    budgets = sorted(totals | {k for k in BUDGETS if k < max(totals, default=0)})
    found = []
    for row in rows:
        untuned = untuned_of(row, table)
        value = untuned.validation if untuned and untuned.n else None
        none = f"{number(value.mean, value.sd)} ({interval(value)})" if value else "-"
        found.append([row.label, none, *(_expected(row, k) for k in budgets)])
    added = any(run.further for row in table.rows for run in row.records)
    return sheet(["row", "0 trials", *(f"{k} trials" for k in budgets)], found, BY_BUDGET + FURTHER * added)


def untuned_of(row: Row, table: Table) -> Row | None:
    """Return the row of the same optimizer with its own values: that with the same settings, or the only one."""

    def own(one: Row) -> dict[str, Any]:
        return {key: value for key, value in one.settings.items() if key != "trial"}

    rows = [other for other in table.rows if other.untuned and other.optim == row.optim]
    same = [other for other in rows if own(other) == own(row)]
    return (same or rows)[0] if len(same or rows) == 1 else None


def _expected(row: Row, k: int) -> str:
    if k > len(row.best_of):
        return "-"
    low, high = stats.range_of_best(row.planned, k, higher_is_better=row.higher_is_better)
    return f"{number(row.best_of[k - 1])} ({number(low)} to {number(high)})"


def trials(table: Table) -> Sheet:
    """Return every trial of every tuned row, with its tuned keys."""
    rows = [row for row in table.rows if len(row.trials) > 1]
    keys = list(dict.fromkeys(key for row in rows for key in varied(row)))
    found = []
    for row, one in ((own, one) for own in rows for one in outcomes(own)):
        index = "-" if one.trial.index is None else str(one.trial.index)
        values = [plain(one.trial.values[key]) if key in one.trial.values else "-" for key in keys]
        again = ", ".join(map(number, one.again)) or "-"
        found.append([row.label, index, number(one.value), again, *values, _state(row, one)])
    heads = ["row", "trial", table.metric, "again", *map(short, keys), "state"]
    spare = [0, 0, 0, 1, *range(2, len(keys) + 2), 0]  # where there is no room keys go first
    return sheet(heads, found, TRIALS, left=["state"], spare=spare)


def _state(row: Row, one: Outcome) -> str:
    """Return the state of a trial; of the selected one also which of its values lie at the edge of what was tried."""
    if not one.best:
        return one.state
    at_edge = [f"{short(key)} {end}" for key, end, _ in edges(row)]
    return f"{one.state}, selected" + (f"; at the edge of what was tried: {', '.join(at_edge)}" if at_edge else "")


def ran_with(table: Table) -> Sheet:
    """Return the shared settings with which each row was run, after tuning; keys that no row has are left out.

    Logs of other programs may have none of them: there is nothing to show then.
    """
    fixed = {name: {"optim.nesterov": True} for name in ALWAYS_NESTEROV}
    configs = {row.label: fixed.get(row.optim, {}) | row.runs[0].config for row in table.rows if row.runs}
    keys = [key for key in SHARED if any(key in config for config in configs.values())]
    shown = configs if keys else {}
    rows = [[label, *(plain(own[key]) if key in own else "-" for key in keys)] for label, own in shown.items()]
    return sheet(["row", *(key.rpartition(".")[2] for key in keys)], rows, RAN_WITH)
