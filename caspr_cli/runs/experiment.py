"""A whole table by one command: every row is tuned with the same number of trials, then run at held-out seeds.

``conf/experiment/NAME.yaml`` holds the keys of the jobs. A list means several values; the rows of the table are all
combinations. An experiment is a few sweeps of ``caspr-train``, one after the other (:func:`sweeps`): the trials of a
search at one seed, the best trial with half and twice the value of each key, the best trials again at two more seeds,
and at held-out seeds the best trial and the untuned one. What is left to do follows from the command and the records
alone, so that an experiment goes on wherever it was stopped.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from caspr_cli.common.errors import nearest
from caspr_cli.common.exits import BAD_USAGE
from caspr_cli.common.format import count, duration
from caspr_cli.common.selection import AGAIN, BESIDE, TUNING_SEED
from caspr_cli.recipe import compose, words
from caspr_cli.recipe.composer import Composer
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe, Resume, Source
from caspr_cli.recipe.tables import in_words, written
from caspr_cli.runs.horizon import ROUNDS as HALVINGS
from caspr_cli.runs.horizon import next_length
from caspr_cli.runs.launch import Allocation, run
from caspr_cli.runs.record import DONE, FAILED, Record, RecordDamagedError, clear_left, own
from caspr_cli.runs.trials import BEST, Tuning, best, chosen, tops

DEFAULT_SCALE = "sample"
DEFAULTS: dict[str, Any] = {"trainer.keep_checkpoints": False, "search.refine": 6, "search.rerank": 3}
# Keys that the whole table shares: rows that differ in nothing else would be one and the same.
ONE = {*compose.NOT_IN_THE_NAME, "search", "debug", "scale"} - {"seed"}
STEPS = 30  # of a timing run: beyond the first refresh of the roots
PATIENCE = 120.0  # seconds that a timing run may take
OUT_OF_TIME = signal.SIGALRM  # by which a timing run asks itself to stop, and nobody else does
TIMING = "caspr-timing-"  # begins the name of the folder with its record


class StoppedError(Exception):
    """The user ended a timing run by a signal, and the whole experiment with it."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass(frozen=True)
class Experiment:
    """The jobs of one table."""

    name: str
    jobs: Mapping[str, str]  # overrides of `caspr-train`, without `trial`; a value may be several, as in `caspr,adamw`
    # label of the row that the others are compared with; without an optimizer, as `statistics=ema`, it is each
    # optimizer's own row with this setting
    baseline: str | None
    # whether the selected trial of each row is also run shorter: how soon does a whole run reach the target?
    horizon: bool = False

    @classmethod
    def read(cls, name: str, given: Iterable[str] = ()) -> Experiment:
        """Return an experiment by its name, changed by overrides of the command line.

        Raises ConfigError if there is none of that name, or none at that scale.
        """
        content = written(name)
        for word in given:
            parsed = words.parse(word)
            if parsed.is_sweep_override() and parsed.key_or_group in ONE:
                raise ConfigError(f"{word}: give one value, as all rows share it (quote a value that contains commas)")
        changes = dict(word.split("=", 1) for word in given)
        scales, scale = content["scale"], changes.pop("scale", DEFAULT_SCALE)
        if scale not in scales:
            raise ConfigError(f"scale={scale}: experiment={name} has {', '.join(scales)}.{nearest(scale, scales)}")
        whether = changes.pop("horizon", str(content["horizon"])).lower()
        if whether not in ("true", "false"):
            raise ConfigError(f"horizon should be true or false for a table but is '{whether}'")
        where = {"output_dir": f"outputs/experiments/{name}" + ("" if scale == DEFAULT_SCALE else f"_{scale}")}
        jobs = {"scale": scale} | DEFAULTS | content["jobs"] | scales[scale] | where
        if changes.get("task.data", Source.sample.name) != Source.sample.name:
            jobs.pop("task.target.value", None)  # of other data
        texts = {key: in_words(value) for key, value in jobs.items()} | changes
        return cls(name, texts, content["baseline"], whether == "true")

    @property
    def output_dir(self) -> str:
        """The directory, without the quotes that Hydra needs around blanks, commas and accents."""
        return str(words.parse(f"output_dir={self.jobs['output_dir']}").value())

    @property
    def searches(self) -> bool:
        """Whether rows are tuned first."""
        return self.jobs.get("search", "none") != "none"

    def shared(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.jobs.items() if key != "seed"]

    def tuning(self, trials: range) -> list[str]:
        """Return the overrides of the sweep that runs these trials."""
        return [*self.shared(), f"trial=range({trials.start},{trials.stop})", f"seed={TUNING_SEED}"]

    def again(self, number: int) -> list[str]:
        """Return the overrides of the sweep that runs so many of the best trials at other seeds."""
        return [*self.shared(), f"trial={','.join(tops(number))}", f"seed={','.join(map(str, AGAIN))}"]

    def seeds(self) -> list[str]:
        """Return the overrides of the sweep whose runs are reported."""
        which = [f"trial={BEST},{compose.UNTUNED}"] if self.searches else []
        return [*self.shared(), *which, f"seed={self.jobs.get('seed', '0')}"]

    def shorter(self, row: Row, steps: int) -> list[str]:
        """Return the overrides of the sweep that runs the selected trial of a row with fewer steps."""
        which = [f"trial={BEST}"] if self.searches else []
        return [*row.overrides, *which, f"seed={self.jobs.get('seed', '0')}", f"horizon={steps}"]


@dataclass(frozen=True)
class Row:
    """The runs of one row of the table, of which some may be done."""

    label: str  # its overrides that other rows do not have
    tuning: tuple[Recipe, ...] = ()  # the trials, at the tuning seed; empty without a search
    again: tuple[Recipe, ...] = ()  # the best trials at other seeds, as soon as all trials have ended
    # the held-out seeds of the selected trial, as soon as there is one; without a search, of the recipe
    reported: tuple[Recipe, ...] = ()
    untuned: tuple[Recipe, ...] = ()  # the same seeds of the optimizer's own values
    unknown: int = 0  # how many more runs there will be, of which the records do not say yet what they are
    search: Tuning | None = None  # draws the trials
    overrides: tuple[str, ...] = ()  # those of each of its jobs, without trial and seed

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        return self.tuning + self.again + self.reported + self.untuned

    @property
    def whole(self) -> int:
        """How many runs it has."""
        return len(self.recipes) + self.unknown

    @property
    def left(self) -> int:
        """How many runs are still to do."""
        return sum(not _ended(recipe) for recipe in self.recipes) + self.unknown


def _ended(recipe: Recipe) -> bool:
    """Return whether a run has ended and ``resume`` would not start it again.

    One whose record is damaged counts as to do: as a job of its own it will be refused.
    """
    try:
        state = Record.of(recipe).status.get("state")
    except RecordDamagedError:
        return False
    return recipe.resume != Resume.never and (state == DONE or (state == FAILED and recipe.resume != Resume.retry))


def rows(experiment: Experiment) -> list[Row]:
    """Return every row of the table. Raises ConfigError if a recipe cannot be run."""
    composer = Composer(experiment.shared(), sweeps=True)
    combinations = composer.jobs()
    if not combinations:
        raise ConfigError(f"experiment={experiment.name}: a key has no value, so that the table has no row")
    common = set(combinations[0]).intersection(*combinations)
    seeds = _seeds(experiment)
    found = []
    for overrides in combinations:
        own = [word for word in overrides if word not in common]
        label = " ".join(own or [word for word in overrides if word.startswith("optim=")] or overrides[:3])
        config, row = composer.config(overrides), Row(label, overrides=tuple(overrides))
        if experiment.searches:
            tuning = Tuning(config, overrides)
            row = replace(row, search=tuning, tuning=tuple(map(tuning, range(tuning.trials))))
            config.trial = compose.UNTUNED
        recipe = compose.freeze(config, overrides)
        runs = tuple(replace(recipe, seed=seed) for seed in seeds)
        found.append(replace(row, untuned=runs) if experiment.searches else replace(row, reported=runs))
    return [_completed(row, seeds) for row in found] if experiment.searches else found


def _completed(row: Row, seeds: Sequence[int]) -> Row:
    """Return a row of a search with all runs that the records say."""
    search, tuning, unknown = row.search, row.tuning, 0
    assert search is not None
    for index in search.refined:
        try:
            if unknown or (index in search.refined[::BESIDE] and not all(map(_ended, tuning))):
                raise ConfigError("not yet")
            tuning += (search(index),)
        except ConfigError:  # not yet
            unknown += 1
    again = min(search.first.search.rerank, len(tuning) + unknown)
    again = again if again > 1 else 0
    runs: tuple[Recipe, ...] = ()
    try:
        if unknown or not all(map(_ended, tuning)):
            raise ConfigError("not yet")
        finalists = chosen(search)[0].finalists
        again = len(finalists)
        runs = tuple(replace(search(index), seed=seed) for index in finalists for seed in AGAIN)
        selected = search(best(search))
        reported = tuple(replace(selected, seed=seed) for seed in seeds)
    except ConfigError:  # not yet
        unknown += again * len(AGAIN) - len(runs) + len(seeds)
        reported = ()
    return replace(row, tuning=tuning, again=runs, reported=reported, unknown=unknown)


def sweeps(experiment: Experiment, table: Sequence[Row]) -> Iterator[tuple[str, list[str]]]:
    """Yield for each sweep a line that says what it is, and its overrides. Each is known when those before have run."""
    if experiment.searches and (search := table[0].search):
        number = search.trials
        yield f"trials   {count(number, 'trial')} of each row", experiment.tuning(range(number))
        for start in search.refined[::BESIDE]:
            trials = range(start, start + BESIDE)
            what = "the best trial of each row so far, with two other values of a key"
            yield f"refine   {what}", experiment.tuning(trials)
        if (again := min(search.first.search.rerank, number + len(search.refined))) > 1:
            yield f"again    the best {again} trials of each row, at other seeds", experiment.again(again)
    yield "seeds    the runs that are reported", experiment.seeds()
    for row in rows(experiment) if experiment.horizon else ():
        tried: set[int] = set()  # a length of which a run was cut off is not tried again at once
        while (steps := next_length(row.reported)) is not None and steps not in tried:
            tried.add(steps)
            yield f"horizon  {row.label}: {count(steps, 'step')} in all", experiment.shorter(row, steps)


def _seeds(experiment: Experiment) -> list[int]:
    given = experiment.jobs.get("seed", "0")
    try:
        seeds = [int(job[0].partition("=")[2]) for job in words.split([f"seed={given}"])]
    except ValueError:
        known = "integers, as in seed=1,2,3 or seed='range(1,6)'"
        raise ConfigError(f"seed should be {known}, but is '{given}'") from None
    if not seeds:
        raise ConfigError(f"seed={given}: no seed, so that there is nothing to run")
    if experiment.searches and (choosing := {TUNING_SEED, *AGAIN}.intersection(seeds)):
        why = "chooses among the trials, and what chose is not to be reported"
        raise ConfigError(f"seed={given}: seed {min(choosing)} {why}")
    return seeds


def seconds(row: Row, command: list[str]) -> float | str:
    """Return the seconds of one run of a row (of its done runs, or estimated from a short one), or why it has none.

    Raises ConfigError if the row cannot be run, as its data are missing, and StoppedError if the user stopped it.
    """
    recipes = row.recipes
    if row.left and (root := recipes[0].task.root) is not None and not os.path.exists(root):
        raise ConfigError(f"task.root: no such directory: {root}")
    if took := sorted(found for recipe in recipes if (found := _lasted(Record.of(recipe))) is not None):
        return took[len(took) // 2]
    recipe = recipes[0]
    steps = min(STEPS, recipe.trainer.max_steps)
    clear_left(Path(tempfile.gettempdir()), f"{TIMING}*")
    with tempfile.TemporaryDirectory(prefix=TIMING) as folder:
        own(Path(folder))
        short = replace(recipe, output_dir=folder, trainer=replace(recipe.trainer, max_steps=steps, val_every=steps))
        began = time.monotonic()

        def stop_requests() -> list[int]:
            return [OUT_OF_TIME] if time.monotonic() - began > PATIENCE else []

        outcome = run(short, command, Allocation(quiet=True, stop_requests=stop_requests))
        result, whole = outcome.record.result, time.monotonic() - began
        error = str(outcome.record.status.get("error") or "").partition("; see ")[0]
    if outcome.signal == OUT_OF_TIME:
        return f"a run of {count(steps, 'step')} takes more than {duration(PATIENCE)}"
    if outcome.signal:
        raise StoppedError(outcome.signal)
    if outcome.exit_code == BAD_USAGE:
        raise ConfigError(error)
    if outcome.exit_code or not result:
        return error or f"exit code {outcome.exit_code}"
    return whole - float(result["seconds"]) + float(result["seconds"]) / steps * recipe.trainer.max_steps


def damaged(table: list[Row]) -> list[str]:
    """Return a line for each record of the table that cannot be read."""
    found: dict[str, None] = {}
    for recipe in (recipe for row in table for recipe in row.recipes):
        try:
            _ = Record.of(recipe).status
        except RecordDamagedError as damage:
            found[f"damaged  {damage}"] = None
    return list(found)


def _lasted(record: Record) -> float | None:
    """Return the seconds of a run that was done in one attempt; None for any other run."""
    with suppress(RecordDamagedError, KeyError, ValueError, TypeError):  # the last: another program wrote the record
        status = record.status
        if status.get("state") == DONE and status.get("attempts") == 1:
            started, ended = (datetime.fromisoformat(status[key]) for key in ("started", "updated"))
            return (ended - started).total_seconds()
    return None


def plan(experiment: Experiment, table: list[Row], took: list[float | str]) -> list[str]:
    """Return the lines that say what will be run and for how long."""
    left = sum(row.left for row in table)
    whole = sum(row.whole for row in table)
    seeds = count(len(_seeds(experiment)), "seed")
    parts, more = [seeds], list[str]()
    if search := table[0].search:
        again = min(search.first.search.rerank, len(table[0].tuning))
        parts = [
            f"{count(len(table[0].tuning), 'trial')} at seed {TUNING_SEED}",
            *([f"the best {again} again at seeds {' and '.join(map(str, AGAIN))}"] if again > 1 else []),
            f"{seeds} of the best and untuned",
        ]
        if later := len(set(search.refined) - {recipe.trial for recipe in table[0].tuning}):
            more = [f"refine   {count(later, 'trial')} a row: the best one so far, with other values of one key"]
    if experiment.horizon:
        more.append(f"horizon  up to {HALVINGS} x {seeds} a row, shorter, if the target is reached")
    each = f"{count(len(table), 'row')}, each {', then '.join(parts)}"
    first = f"table    {each}: {count(whole, 'run')}, {whole - left} done"
    lines = [first, *more, f"records  {experiment.output_dir}"]
    width, times = max(len(row.label) for row in table), []
    for row, one in zip(table, took, strict=True):
        known = f"time: {one}"
        if isinstance(one, float):
            times.append(one * row.left)
            known = f"about {duration(one)} a run, {duration(times[-1])} in all"
        lines.append(f"row      {row.label:<{width}}  {count(row.left, 'run')} to do, {known}")
    unknown = len(table) - len(times)
    total = f"about {duration(sum(times))}, one run after the other" if times else "not known"
    lines.append(f"total    {total}" + (f"; without {count(unknown, 'row')} not timed" if unknown and times else ""))
    return lines
