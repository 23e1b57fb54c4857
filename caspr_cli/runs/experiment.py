"""A whole table by one command: every row tuned with the same number of trials, then run at fresh seeds.

``conf/experiment/NAME.yaml`` says which keys the jobs have; a list is several values, and the rows of the table are all
combinations. It comes to two sweeps of ``caspr-train``: the trials of a search at one seed, and ``trial=best`` at the
others. No torch.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import hydra
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from caspr_cli.recipe import compose
from caspr_cli.recipe.configs import CONF, choices
from caspr_cli.recipe.errors import ConfigError, nearest
from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs import trials
from caspr_cli.runs.launch import Place, run
from caspr_cli.runs.record import DONE, FAILED, Record

DEFAULT_SCALE = "sample"
STEPS = 30  # of the run that is timed: beyond the first refresh of the roots
PATIENCE = 120.0  # seconds for it
START = 10.0  # seconds that imports, data and the last evaluation of a run take, about


class StoppedError(Exception):
    """The signal by which the user ended a timing; the whole experiment ends with it."""

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass(frozen=True)
class Experiment:
    """One table.

    Args:
        jobs: overrides of ``caspr-train``, without ``trial``; a value may be several, as in ``caspr,adamw``.
        baseline: label of the row that the others are compared with.
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
        changes = dict(word.split("=", 1) for word in given)
        scales, scale = content["scale"], changes.pop("scale", DEFAULT_SCALE)
        if scale not in scales:
            raise ConfigError(f"scale={scale}: experiment={name} has {', '.join(scales)}.{nearest(scale, scales)}")
        where = {"output_dir": f"outputs/experiments/{name}" + ("" if scale == DEFAULT_SCALE else f"_{scale}")}
        jobs = {"scale": scale} | content["jobs"] | scales[scale] | where | {"trainer.keep_checkpoints": False}
        return cls(name, {key: _text(value) for key, value in jobs.items()} | changes, content["baseline"])

    @property
    def output_dir(self) -> str:
        return self.jobs["output_dir"]

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
    """As Hydra reads it."""
    if isinstance(value, list):
        return ",".join(map(_text, value))
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
    return Record.of(recipe).status.get("state") in (DONE, FAILED)


def rows(experiment: Experiment) -> list[Row]:
    """Every row of the table.

    Raises:
        ConfigError: a recipe cannot be run.
    """
    combinations = _split(experiment.shared())
    common = set(combinations[0]).intersection(*combinations)
    seeds = [int(job[0].partition("=")[2]) for job in _split([f"seed={experiment.jobs.get('seed', '0')}"])]
    found = []
    for overrides in combinations:
        given = [word for word in overrides if not word.startswith("hydra")]
        label = " ".join(word for word in overrides if word not in common) or " ".join(given[:3])
        found.append(_row(label, given, seeds, experiment.searches))
    return found


def _split(overrides: list[str]) -> list[list[str]]:
    """All combinations, as a sweep would run them."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


def _row(label: str, given: list[str], seeds: list[int], searches: bool) -> Row:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", overrides=given)
    if not searches:
        recipe = compose.freeze(config, given)
        return Row(label, (), tuple(replace(recipe, seed=seed) for seed in seeds), selected=True)

    tuning = tuple(
        replace(compose.freeze(config, given, index), seed=trials.TUNING_SEED) for index in range(config.search.trials)
    )
    try:
        selected: int | None = trials.best(tuning.__getitem__)
    except ConfigError:  # not yet
        selected = None
    return Row(label, tuning, tuple(replace(tuning[selected or 0], seed=seed) for seed in seeds), selected is not None)


def seconds(row: Row, command: list[str]) -> float | None:
    """Of one run of a row, from start to end: as the runs of it that are done took, else from a short one.

    None where it cannot be run here, or is slow to start.

    Raises:
        StoppedError: by a signal.
    """
    recipes = (*row.tuning, *row.reported)
    took = sorted(found for recipe in recipes if (found := Record.of(recipe).result.get("seconds")))
    if took:
        return float(took[len(took) // 2]) + START
    recipe = recipes[0]
    steps = min(STEPS, recipe.trainer.max_steps)
    with tempfile.TemporaryDirectory(prefix="caspr-timing-") as folder:
        short = replace(recipe, output_dir=folder, trainer=replace(recipe.trainer, max_steps=steps, val_every=steps))
        began = time.monotonic()

        def asked() -> list[int]:
            return [signal.SIGTERM] if time.monotonic() - began > PATIENCE else []

        outcome = run(short, command, Place(quiet=True, asked=asked))
        result, whole = outcome.record.result, time.monotonic() - began
    if outcome.told and whole < PATIENCE:
        raise StoppedError(outcome.told)
    if outcome.exit_code or not result:
        return None
    return whole - float(result["seconds"]) + float(result["seconds"]) / steps * recipe.trainer.max_steps


def about(duration: float) -> str:
    """Seconds in words."""
    if duration < 90:
        return f"{duration:.0f} s"
    return f"{duration / 60:.0f} min" if duration < 5400 else f"{duration / 3600:.1f} h"


def plan(experiment: Experiment, table: list[Row], took: list[float | None]) -> list[str]:
    """What will be run, and for how long."""
    count, tuned = sum(row.left for row in table), len(table[0].tuning)
    whole = sum(len(row.tuning) + len(row.reported) for row in table)
    per_row = f"{tuned} trials at seed {trials.TUNING_SEED}, then " if tuned else ""
    seeds = f"{len(table[0].reported)} seed{'s' * (len(table[0].reported) > 1)}"
    lines = [
        f"table    {len(table)} row{'s' * (len(table) > 1)}, each {per_row}{seeds}: {whole} runs, {whole - count} done",
        f"records  {experiment.output_dir}",
    ]
    width = max(len(row.label) for row in table)
    for row, one in zip(table, took, strict=True):
        time_ = "cannot be timed here" if one is None else f"about {about(one)} a run, {about(one * row.left)} in all"
        lines.append(f"row      {row.label:<{width}}  {row.left} runs to do, {time_}")
    known = [one * row.left for row, one in zip(table, took, strict=True) if one is not None]
    missing = len(table) - len(known)
    lines.append(
        f"total    about {about(sum(known))}, one run after the other"
        + (f", and {missing} row{'s' * (missing > 1)} that cannot be timed here" if missing else "")
    )
    return lines
