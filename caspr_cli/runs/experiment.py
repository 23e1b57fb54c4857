"""A whole table by one command: every row tuned with the same number of trials, then run at fresh seeds.

``conf/experiment/NAME.yaml`` says which keys the jobs have; a list is several values, and the rows of the table are all
combinations. It comes to two sweeps of ``caspr-train``: the trials of a search at one seed, and ``trial=best`` at the
others. No torch.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from caspr_cli.common.errors import nearest
from caspr_cli.recipe import compose, words
from caspr_cli.recipe.composer import Composer
from caspr_cli.recipe.configs import CONF, choices
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe, Resume
from caspr_cli.runs import trials
from caspr_cli.runs.launch import BAD_USAGE, Place, run
from caspr_cli.runs.record import DONE, FAILED, Record, RecordDamagedError, clear_left, own

DEFAULT_SCALE = "sample"
# Keys of the whole table: rows that differ in them alone would be one and the same.
ONE = {*compose.NOT_IN_THE_NAME, "search", "debug", "scale"} - {"seed"}
STEPS = 30  # of the run that is timed: beyond the first refresh of the roots
PATIENCE = 120.0  # seconds for it
TIMING = "caspr-timing-"  # folder of its record


class StoppedError(Exception):
    """The signal by which the user ended a timing; the whole experiment ends with it."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass(frozen=True)
class Experiment:
    """One table.

    Args:
        jobs: overrides of ``caspr-train``, without ``trial``; a value may be several, as in ``caspr,adamw``.
        baseline: label of the row that the others are compared with; settings alone, as ``statistics=ema``, mean each
            optimizer's own row with them.
    """

    name: str
    jobs: Mapping[str, str]
    baseline: str | None

    @classmethod
    def read(cls, name: str, given: Iterable[str] = ()) -> Experiment:
        """An experiment by its name, changed by overrides of the command line.

        Raises:
            ConfigError: there is none of that name, or none at that scale.
        """
        content = _content(name)
        for word in given:
            parsed = words.parse(word)
            if parsed.is_sweep_override() and parsed.key_or_group in ONE:
                raise ConfigError(f"{word}: a table has one (quote a value that has commas)")
        changes = dict(word.split("=", 1) for word in given)
        scales, scale = content["scale"], changes.pop("scale", DEFAULT_SCALE)
        if scale not in scales:
            raise ConfigError(f"scale={scale}: experiment={name} has {', '.join(scales)}.{nearest(scale, scales)}")
        where = {"output_dir": f"outputs/experiments/{name}" + ("" if scale == DEFAULT_SCALE else f"_{scale}")}
        jobs = {"scale": scale} | content["jobs"] | scales[scale] | where | {"trainer.keep_checkpoints": False}
        return cls(name, {key: _text(value) for key, value in jobs.items()} | changes, content["baseline"])

    @property
    def output_dir(self) -> str:
        """Without the quotes in which Hydra wants blanks, commas and accents."""
        return str(words.parse(f"output_dir={self.jobs['output_dir']}").value())

    @property
    def searches(self) -> bool:
        """Whether rows are tuned first."""
        return self.jobs.get("search", "none") != "none"

    def shared(self) -> list[str]:
        """The overrides of both sweeps."""
        return [f"{key}={value}" for key, value in self.jobs.items() if key != "seed"]

    def tuning(self, count: int) -> list[str]:
        """The overrides of the sweep that tunes with ``count`` trials."""
        return [*self.shared(), f"trial=range({count})", f"seed={trials.TUNING_SEED}"]

    def seeds(self) -> list[str]:
        """The overrides of the sweep whose runs are reported."""
        return [*self.shared(), *(["trial=best"] if self.searches else []), f"seed={self.jobs.get('seed', '0')}"]


def _content(name: str) -> dict[str, Any]:
    """Of its file; what it does not say is as in the experiment that it is ``like``."""
    known = choices("experiment")
    if name not in known:
        raise ConfigError(
            f"experiment={name}: no such choice.{nearest(name, known, 'experiment=')} (choices: {', '.join(known)})"
        )
    own: dict[str, Any] = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf8"))
    if "like" not in own:
        return {"baseline": None} | own
    base = _content(own["like"])
    scales = {scale: jobs | own.get("scale", {}).get(scale, {}) for scale, jobs in base["scale"].items()}
    return {"jobs": base["jobs"] | own["jobs"], "scale": scales, "baseline": own.get("baseline")}


def _text(value: Any) -> str:
    """As Hydra reads it: a list is several values, and one in it is a value that is a list."""
    if isinstance(value, list):
        return ",".join(f"[{_text(each)}]" if isinstance(each, list) else _text(each) for each in value)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


@dataclass(frozen=True)
class Row:
    """One row of the table: its recipes, of which some may be done.

    Args:
        label: its overrides that other rows do not have.
        tuning: the trials, at the seed that tunes; empty without a search.
        reported: the other seeds; of the selected trial, or of the first one as long as none can be selected.
    """

    label: str
    tuning: tuple[Recipe, ...]
    reported: tuple[Recipe, ...]
    selected: bool

    @property
    def left(self) -> int:
        """How many runs have not ended."""
        tuning = sum(not _ended(recipe) for recipe in self.tuning)
        return tuning + (sum(not _ended(recipe) for recipe in self.reported) if self.selected else len(self.reported))


def _ended(recipe: Recipe) -> bool:
    """And is left alone, as ``resume`` says. One whose record is damaged is tried, and refused, as a job of its own."""
    try:
        state = Record.of(recipe).status.get("state")
    except RecordDamagedError:
        return False
    return recipe.resume != Resume.never and (state == DONE or (state == FAILED and recipe.resume != Resume.retry))


def rows(experiment: Experiment) -> list[Row]:
    """Every row of the table.

    Raises:
        ConfigError: a recipe cannot be run.
    """
    composer = Composer(experiment.shared(), sweeps=True)
    combinations = composer.jobs()
    if not combinations:
        raise ConfigError(f"experiment={experiment.name}: a key has no value, so that the table has no row")
    common = set(combinations[0]).intersection(*combinations)
    seeds = _seeds(experiment)
    found = []
    for overrides in combinations:
        label = " ".join(word for word in overrides if word not in common) or " ".join(overrides[:3])
        found.append(_row(label, composer.config(overrides), overrides, seeds, experiment.searches))
    return found


def _seeds(experiment: Experiment) -> list[int]:
    given = experiment.jobs.get("seed", "0")
    try:
        seeds = [int(job[0].partition("=")[2]) for job in words.split([f"seed={given}"])]
    except ValueError:
        raise ConfigError(f"seed should be integers, as in seed=1,2,3, but is '{given}'") from None
    if not seeds:
        raise ConfigError(f"seed={given}: no seed, so that there is nothing to run")
    if experiment.searches and trials.TUNING_SEED in seeds:
        raise ConfigError(
            f"seed={given}: seed {trials.TUNING_SEED} chooses among the trials, and what chose is not to be reported"
        )
    return seeds


def _row(label: str, config: DictConfig, given: list[str], seeds: list[int], searches: bool) -> Row:
    if not searches:
        recipe = compose.freeze(config, given)
        return Row(label, (), tuple(replace(recipe, seed=seed) for seed in seeds), selected=True)

    tuning = tuple(
        replace(compose.freeze(config, given, index), seed=trials.TUNING_SEED)
        for index in range(max(1, config.search.trials))  # at least one: freezing it refuses a wrong number
    )
    try:
        selected: int | None = trials.best(tuning.__getitem__)
    except (ConfigError, RecordDamagedError):  # not yet
        selected = None
    return Row(label, tuning, tuple(replace(tuning[selected or 0], seed=seed) for seed in seeds), selected is not None)


def seconds(row: Row, command: list[str]) -> float | str:
    """Of one run of a row, from start to end: as the runs of it that are done took, else from a short one.

    Why it cannot be said, where it cannot.

    Raises:
        ConfigError: the row cannot be run, as its data are missing.
        StoppedError: by a signal.
    """
    recipes = (*row.tuning, *row.reported)
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

        def asked() -> list[int]:
            return [signal.SIGTERM] if time.monotonic() - began > PATIENCE else []

        outcome = run(short, command, Place(quiet=True, asked=asked))
        result, whole = outcome.record.result, time.monotonic() - began
        error = str(outcome.record.status.get("error") or "").partition("; see ")[0]
    if outcome.told:
        if whole < PATIENCE:
            raise StoppedError(outcome.told)
        return f"{steps} steps take more than {about(PATIENCE)}"
    if outcome.exit_code == BAD_USAGE:
        raise ConfigError(error)
    if outcome.exit_code or not result:
        return error or f"exit code {outcome.exit_code}"
    return whole - float(result["seconds"]) + float(result["seconds"]) / steps * recipe.trainer.max_steps


def damaged(table: list[Row]) -> list[str]:
    """What is wrong with each record of the table that cannot be read, in one line."""
    found = []
    for recipe in (recipe for row in table for recipe in (*row.tuning, *row.reported)):
        try:
            _ = Record.of(recipe).status
        except RecordDamagedError as damage:
            found.append(f"damaged  {damage}")
    return list(dict.fromkeys(found))


def _lasted(record: Record) -> float | None:
    """Seconds from the start of a run that is done to its end; None for one in several attempts, with breaks."""
    try:
        status = record.status
    except RecordDamagedError:
        return None
    if status.get("state") != DONE or status.get("attempts") != 1:
        return None
    try:
        started, ended = (datetime.fromisoformat(status[key]) for key in ("started", "updated"))
        return (ended - started).total_seconds()
    except (KeyError, ValueError, TypeError):  # of a record that was not written here
        return None


def about(duration: float) -> str:
    """Seconds in words."""
    if duration < 90:
        return f"{duration:.0f} s"
    return f"{duration / 60:.0f} min" if duration < 5400 else f"{duration / 3600:.1f} h"


def plan(experiment: Experiment, table: list[Row], took: list[float | str]) -> list[str]:
    """What will be run, and for how long."""
    left = sum(row.left for row in table)
    whole = sum(len(row.tuning) + len(row.reported) for row in table)
    tuned = f"{_count(len(table[0].tuning), 'trial')} at seed {trials.TUNING_SEED}, then " if table[0].tuning else ""
    seeds = _count(len(table[0].reported), "seed")
    lines = [
        f"table    {_count(len(table), 'row')}, each {tuned}{seeds}: {_count(whole, 'run')}, {whole - left} done",
        f"records  {experiment.output_dir}",
    ]
    width = max(len(row.label) for row in table)
    for row, one in zip(table, took, strict=True):
        known = (
            f"about {about(one)} a run, {about(one * row.left)} in all" if isinstance(one, float) else f"time: {one}"
        )
        lines.append(f"row      {row.label:<{width}}  {_count(row.left, 'run')} to do, {known}")
    times = [one * row.left for row, one in zip(table, took, strict=True) if isinstance(one, float)]
    unknown = len(table) - len(times)
    total = f"about {about(sum(times))}, one run after the other" if times else "not known"
    lines.append(f"total    {total}" + (f"; without {_count(unknown, 'row')} not timed" if unknown and times else ""))
    return lines


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"
