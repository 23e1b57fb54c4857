"""Whether a row was tuned and run as the leaderboard asks: one line for each thing that is wrong."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from caspr_cli.common.format import count, listed
from caspr_cli.common.selection import AGAIN, TUNING_SEED, choose
from caspr_cli.common.shape import DONE
from caspr_cli.report import provenance
from caspr_cli.report.model import Row, Run, Table, Trial
from caspr_cli.report.selection import ABSENT
from caspr_cli.report.settings import expanded, frozen, plain, ranges

SEARCH = "joint"
LEAST_TRIALS = 8
LEAST_SEEDS = 3  # that are reported
RERANK = 3  # trials that are run again at the seeds AGAIN
CHOOSING = {TUNING_SEED, *AGAIN}
# What conf/search/joint.yaml varies, of optimizers that have it.
TUNED = (
    "optim.lr", "optim.adamw_lr_scale", "optim.betas.0", "optim.betas.1", "optim.momentum", "optim.weight_decay",
    "schedule.warmup",
)  # fmt: skip
TOLERANCE = 0.005  # relative: how far a run may end from where it is said to, on another machine
DEVIATIONS = 3  # or so many standard deviations of the row's seeds
CLOSE = 1e-9  # relative: a value of the curve that is rounded in the result

# Returns the values of trial k of a search space, {key: {kind: numbers}}.
Draw = Callable[[Mapping[str, Mapping[str, Any]], int], Mapping[str, Any]]


def problems(row: Row, draw: Draw | None = None) -> list[str]:
    """Return what is wrong with the records of a row, from these alone; ``draw`` also checks the values of trials."""
    if other := other_searches(row.records):
        return [other]
    found = [*_not_tuned(row), *(line for run in row.records for line in _torn(run))]
    found += [line for check in (_trials, _finalists, _seeds, _origin) for line in check(row)]
    return found + ([line for trial in row.trials for line in _undrawn(trial, draw)] if draw else [])


def other_searches(runs: Sequence[Run]) -> str:
    """Return a line if runs were tuned by another search than the leaderboard's; else an empty text."""
    tuned = [run for run in runs if run.config.get("trial") != "default"]
    names = sorted({plain(run.config.get("search.name")) for run in tuned} - {SEARCH})
    return f"tuned by search={listed(names)}; the leaderboard has search={SEARCH}" if names else ""


def _not_tuned(row: Row) -> Iterator[str]:
    """Yield the keys of the joint search that the optimizer has and its search leaves alone."""
    for run in row.records:
        if run.config.get("trial") != "default":
            space = ranges(run.config)
            whole = expanded(run.config, TUNED)
            if missing := [key for key in TUNED if key in whole and key not in space]:
                yield f"its search does not vary {listed(missing, 9)}"
            return


def against(row: Row, table: Table, board: Sequence[Table]) -> list[str]:
    """Return the differences of a row from the rows of the leaderboard with its task and scale."""
    same = [b for b in board if (b.task, b.scale, b.data) == (table.task, table.scale, table.data)]
    if not same:
        return []
    if table.data_hash not in (known := [str(b.data_hash) for b in same]):
        return [f"its data have hash {table.data_hash}, and those of the board {listed(known)}"]
    rows = [other for b in same if b.data_hash == table.data_hash for other in b.rows if not other.untuned]
    found, settings = [], rows[0].settings
    for key in sorted(row.settings.keys() | settings.keys()):
        ours, theirs = (each.get(key, ABSENT) for each in (row.settings, settings))
        if not key.startswith("optim.") and frozen(ours) != frozen(theirs):
            found.append(f"{key} is {plain(ours)}, and {plain(theirs)} on the board")
    trials = len(rows[0].trials)
    if len(row.trials) != trials:
        found.append(f"it has {count(len(row.trials), 'trial')}, and the rows of the board have {trials}")
    return found


def same_optimizer(row: Row, other: Row) -> bool:
    """Return whether rows are of one optimizer with the same options, but for the tuned ones and those one lacks."""
    shared = [key for key in row.settings.keys() & other.settings.keys() if key.startswith("optim.")]
    return all(frozen(row.settings[key]) == frozen(other.settings[key]) for key in shared)


def reproduced(row: Row, run: Run, value: float | None) -> str | None:
    """Return a line if a reported run ended elsewhere when it was run again; None if it is near enough."""
    if run.final is None or value is None:
        return None if run.final is value else f"seed {run.seed}: ended at {run.final}, and now at {value}"
    allowed = max(TOLERANCE * abs(run.final), DEVIATIONS * (row.validation.sd or 0.0))
    if abs(value - run.final) <= allowed:
        return None
    return f"seed {run.seed}: ended at {run.final:.6g}, and now at {value:.6g}; {allowed:.2g} is allowed"


def _name(run: Run) -> str:
    return f"trial {plain(run.config.get('trial'))}, seed {run.seed}"


def _torn(run: Run) -> Iterator[str]:
    """Yield what a record lacks, and what its files contradict each other in."""
    if not run.ended:
        yield f"{_name(run)}: is {run.state}, and should have ended"
    if run.state != DONE:
        return
    told = {"task": "task.name", "optim": "optim.name", "scale": "scale", "seed": "seed", "steps": "trainer.max_steps"}
    for key, name in told.items():
        if run.result.get(key) != run.config.get(name):
            yield f"{_name(run)}: {name} is {plain(run.config.get(name))}, and its result is of {run.result.get(key)}"
    last = run.curve[-1] if run.curve else None
    if last is None or last.step != run.config.get("trainer.max_steps"):
        yield f"{_name(run)}: its curve does not end at step {run.config.get('trainer.max_steps')}"
    elif not _equal(run.final, last.value):
        yield f"{_name(run)}: its result says {run.final} at the end, and its curve {last.value}"


def _equal(a: float | None, b: float | None) -> bool:
    return a == b or (a is not None and b is not None and abs(a - b) <= CLOSE * abs(b))


def _trials(row: Row) -> Iterator[str]:
    """Yield a line for trials that are missing, too few, or not of the search."""
    said = sorted({int(run.config.get("search.trials") or 0) for run in row.records})
    if len(said) > 1:
        yield f"its records say different budgets: search.trials is {listed(said)}"
    if said[-1] < LEAST_TRIALS:
        yield f"search.trials is {said[-1]}, and should be {LEAST_TRIALS} or more"
    there = {trial.index for trial in row.trials if TUNING_SEED in trial.ended}
    if missing := sorted(set(range(said[-1])) - there):
        yield f"of {said[-1]} trials {listed(missing, 6)} {_are(missing)} missing at seed {TUNING_SEED}"
    if by_hand := sum(trial.index is None for trial in row.trials):
        yield f"{count(by_hand, 'trial')} without an index: not of the search"


def _finalists(row: Row) -> Iterator[str]:
    """Yield which trials should have been run again, and were not."""
    ends = [trial.ended for trial in row.trials]
    first = [{seed: value for seed, value in found.items() if seed == TUNING_SEED} for found in ends]
    finalists = choose(first, higher_is_better=row.higher_is_better, rerank=RERANK).finalists
    if missing := [row.trials[k].index for k in finalists if not ends[k].keys() >= set(AGAIN)]:
        which = f"trial{'s' * (len(missing) > 1)} {listed(missing, 6)}, of the best {RERANK}"
        yield f"{which}, {_are(missing)} missing at seeds {listed(AGAIN, 6)}"


def _seeds(row: Row) -> Iterator[str]:
    """Yield a line if the reported seeds are too few, or may have chosen the trial."""
    for trial in row.trials:
        seeds = [run.seed for run in trial.runs if run.seed not in CHOOSING]
        if seeds and trial is not row.selected:
            which = f"seed{'s' * (len(seeds) > 1)} {listed(seeds, 6)}"
            yield f"trial {trial.index} was not selected, but run at {which}, too, which may have chosen"
    reported = row.selected.ended.keys() - CHOOSING if row.selected else set()
    if len(reported) < LEAST_SEEDS:
        chose = f"seeds {listed(sorted(CHOOSING), 6)} choose the trial"
        yield f"{count(len(reported), 'fresh seed')}, and should have {LEAST_SEEDS} or more ({chose})"


def _origin(row: Row) -> Iterator[str]:
    """Yield a line if the records have different code or packages, or do not name their data."""
    for what, of in (("code", provenance.code), ("versions", provenance.versions)):
        found = sorted({of(run) or "unknown" for run in row.records if run.state == DONE})
        if len(found) > 1:
            yield f"its records are of different {what}: {listed(found, 3)}"
        elif found and ("with changes" in found[0] or found == ["unknown"]):
            yield f"its {what} cannot be got again: {found[0]}"
    if missing := [run for run in row.records if run.state == DONE and not provenance.data_hash(run)]:
        yield f"{_name(missing[0])}: does not say the hash of its data"


def _undrawn(trial: Trial, draw: Draw) -> Iterator[str]:
    """Yield the values of a trial that its search does not draw; trials that were added later are not checked."""
    run = trial.runs[0]
    if trial.index is None or trial.index >= int(run.config.get("search.trials") or 0):
        return
    space = {key: {kind: numbers} for key, (kind, numbers) in ranges(run.config).items()}
    for key, value in draw(space, trial.index).items():
        if frozen(trial.values.get(key)) != frozen(value):
            yield f"trial {trial.index}: {key} is {plain(trial.values.get(key))}, and its search draws {plain(value)}"


def _are(values: Sequence[Any]) -> str:
    return "are" if len(values) > 1 else "is"
