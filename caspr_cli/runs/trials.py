"""The trials of a search, and the best of them: from the records, by the rule with which ``caspr-report`` selects."""

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from caspr_cli.common.selection import AGAIN, BESIDE, TUNING_SEED, Choice, choose, finite
from caspr_cli.common.shape import lost
from caspr_cli.recipe import compose, search
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Recipe
from caspr_cli.recipe.search import Space
from caspr_cli.runs import horizon
from caspr_cli.runs.record import DONE, FAILED, Record, RecordDamagedError

BEST, TOP = "best", re.compile(r"top([1-9]\d{0,6})")  # words for trials that the records choose


class Tuning:
    """The trials of one row, at ``TUNING_SEED``, by index.

    The first ``search.trials`` are drawn. Those of ``search.refine`` follow in rounds of two, each with the best
    trial's values but for one key. Raises ConfigError if its trials cannot be run. ``config`` is as Hydra composes it
    from the overrides ``given``.
    """

    def __init__(self, config: DictConfig, given: Iterable[str]) -> None:
        self._config = cast(DictConfig, OmegaConf.merge(config, {"seed": TUNING_SEED}))
        self._given = list(given)
        self.first = compose.freeze(self._config, self._given, 0)
        self.trials = self.first.search.trials
        self.refined = refined(self.first)
        self._recipes: dict[int, Recipe] = {0: self.first}

    def __call__(self, index: int) -> Recipe:
        """Return a trial.

        Raises ConfigError if the recipe has no search, or the trials it depends on have not ended or cannot be read.
        """
        if index not in self._recipes:
            self._recipes[index] = compose.freeze(self.config(index), self._given, index)
        return self._recipes[index]

    def config(self, index: int) -> DictConfig:
        """Return the config of a trial, with the space from which it is drawn."""
        if index < self.trials:
            return self._config
        if index not in self.refined:
            more = f", and {len(self.refined)} more with search.refine" if self.refined else ""
            has = f"search={self.first.search.name} has {self.trials} trials (search.trials), from 0{more}"
            raise ConfigError(f"trial={index}: {has}")
        config = copy.deepcopy(self._config)
        config.search.space = self.beside(index)
        return config

    def beside(self, index: int) -> Space:
        """Return the one point of a trial of ``search.refine``: the best trial so far, with another value of one key.

        The keys take turns (:func:`search.turns`). Raises ConfigError if not all trials of the rounds before have ended
        or can be read.
        """
        number, place = divmod(index - self.refined.start, BESIDE)
        ended(self, range(self.refined.start, index - place))
        finals = gathered(self, index - place)
        best = self._best(finals) or self.first  # all failed: what is to be chosen says so
        tried = [self._values(self(k)) for k, found in enumerate(finals) if found]
        space, values = self.first.search.space, self._values(best)
        keys = search.turns(space)
        key = keys[number % len(keys)]
        new = [each for each in search.beside(key, space[key], values, tried) if compose.valid(best, {key: each})]
        return {name: {"choice": [value]} for name, value in (values | {key: new[place]}).items()}

    def _best(self, finals: Sequence[Mapping[int, float | None]]) -> Recipe | None:
        """Return the trial that ended best at ``TUNING_SEED``; None if all failed."""
        ends = [{seed: value for seed, value in found.items() if seed == TUNING_SEED} for found in finals]
        index = choose(ends, higher_is_better=self.first.task.target.higher_is_better).best
        return None if index is None else self(index)

    @staticmethod
    def _values(recipe: Recipe) -> dict[str, Any]:
        return search.drawn(compose.to_plain(recipe))


def resolve(config: DictConfig, given: Sequence[str], known: dict[tuple[str, ...], Tuning]) -> DictConfig:
    """Return the config of a job with its trial as a number, where the records say which, with its space and length.

    ``given`` are the overrides of the command line, ``known`` the searches of other jobs by these, without trial and
    seed. Raises ConfigError if there is no such trial, or the trials that decide have not ended or cannot be read.
    """
    if (steps := config.horizon) is not None:
        config = cast(DictConfig, OmegaConf.merge(config, {"horizon": None}))
        return horizon.shortened(resolve(config, given, known), steps)
    trial, own = config.trial, config.search
    word = isinstance(trial, str) and (trial == BEST or TOP.fullmatch(trial))
    later = isinstance(trial, int) and trial >= own.trials
    if own.name is None or not (word or later):
        return config
    row = tuple(sorted(each for each in given if each.partition("=")[0] not in ("trial", "seed", "horizon")))
    if row not in known:
        known[row] = Tuning(config, given)
    tuning = known[row]
    index = trial if later else best(tuning) if trial == BEST else top(tuning, int(trial.removeprefix("top")))
    return cast(DictConfig, OmegaConf.merge(tuning.config(index), {"seed": config.seed, "trial": index}))


def best(trial: Callable[[int], Recipe]) -> int:
    """Return the trial with the best validation at its end.

    :func:`caspr_cli.common.selection.choose` has the rule: what is run at other seeds is what a report selects. Raises
    ConfigError if some have not ended or cannot be read, or all failed. ``trial``: the
    recipe of each, at ``TUNING_SEED``.
    """
    choice, finals = chosen(trial)
    first = trial(0)
    if left := [k for k in choice.finalists if not set(AGAIN) <= finals[k].keys()]:
        many = len(choice.finalists)
        raise ConfigError(
            f"search={first.search.name}: {len(left)} of the best {many} trials of "
            f"optim={first.optim.name} have not ended at other seeds (search.rerank): first run -m "
            f"trial={','.join(tops(many))} seed={','.join(map(str, AGAIN))}"
        )
    if choice.best is None or all(score is None for score in choice.scores.values()):
        every = f"all {len(finals)} trials of {first.optim.name}"
        raise ConfigError(f"search={first.search.name}: {every} failed")
    return choice.best


def top(trial: Callable[[int], Recipe], place: int) -> int:
    """Return the trial at a place, from 1, in the order before any trial is run again.

    Where fewer have a finite value, it is the last of these. Raises ConfigError if some trials have not ended, or all
    failed, or one cannot be read.
    """
    choice, _ = chosen(trial)
    finite = [k for k in choice.order if choice.scores[k] is not None]
    if not finite:
        raise ConfigError(f"trial=top{place} of search={trial(0).search.name}: all trials failed")
    return finite[min(place, len(finite)) - 1]


def refined(first: Recipe) -> range:
    """Return the indices of the trials of ``search.refine``: none where no key is drawn from a range of numbers."""
    own = first.search
    return range(own.trials, own.trials + BESIDE * own.refine * bool(search.turns(own.space)))


def tops(number: int) -> list[str]:
    return [f"top{place}" for place in range(1, number + 1)]


def chosen(trial: Callable[[int], Recipe]) -> tuple[Choice, list[Mapping[int, float | None]]]:
    """Return the choice among the trials of a row, and their metric at the end by seed: of each that has begun."""
    first, finals = trial(0), gathered(trial)
    own = first.search
    return choose(finals, higher_is_better=first.task.target.higher_is_better, rerank=own.rerank), finals


def gathered(trial: Callable[[int], Recipe], stop: int | None = None) -> list[Mapping[int, float | None]]:
    """Return the metric at the end of each trial before ``stop``, by seed; of a round that has not begun: empty.

    Raises ConfigError if some of the first trials, or of a round that has begun, have not ended or cannot be read.
    """
    first = trial(0)
    finals = ended(trial, range(first.search.trials))
    for start in refined(first)[::BESIDE]:
        indices = range(start, start + BESIDE)
        if start == stop or not any(Record.of(trial(index)).path.exists() for index in indices):
            break
        finals += ended(trial, indices)  # before the next round is known
    return finals


def ended(trial: Callable[[int], Recipe], indices: range) -> list[Mapping[int, float | None]]:
    """Return the metric at the end of these trials, by seed.

    Raises ConfigError if some have not ended at ``TUNING_SEED``, or cannot be read.
    """
    first = trial(0)
    finals = []
    for index in indices:
        try:
            finals.append(_finals(Record.of(trial(index)).path.parent, first.task.target.metric))
        except RecordDamagedError as error:
            again = f"run it anew with trial={index} seed={TUNING_SEED} resume=never"
            raise ConfigError(f"{error.file} is missing or damaged, and decides: {again}") from error
    if missing := [index for index, found in zip(indices, finals, strict=True) if TUNING_SEED not in found]:
        raise ConfigError(
            f"search={first.search.name}: {len(missing)} of {len(indices)} trials of optim={first.optim.name} "
            f"have not ended in {first.output_dir}: first run -m trial={','.join(map(str, missing))} seed={TUNING_SEED}"
        )
    return finals


def _finals(trial: Path, metric: str) -> Mapping[int, float | None]:
    """Return the metric at the end of each run of a trial that has ended, by seed; None: failed, or not finite."""
    found: dict[int, float | None] = {}
    for path in trial.glob("seed*"):
        record, seed = Record(path), path.name.removeprefix("seed")
        if not seed.isdecimal():
            continue
        try:
            status, result = record.status, record.result
            if lost(status, result):
                raise RecordDamagedError(path / "result.json")
            if record.config_is_lost:  # a report leaves it out
                raise RecordDamagedError(record.config)
        except RecordDamagedError:
            if int(seed) == TUNING_SEED:
                raise
            continue  # a report leaves it out, too
        if status.get("state") == DONE:
            found[int(seed)] = finite(result["final"].get(metric))
        elif status.get("state") == FAILED:
            found[int(seed)] = None
    return found
