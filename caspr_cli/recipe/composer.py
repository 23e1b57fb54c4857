"""Compose configs by Hydra: once for each set of choices; values are then changed in a copy."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from caspr_cli.common import plugins
from caspr_cli.recipe import directory, settings, words
from caspr_cli.recipe.compose import register_schemas
from caspr_cli.recipe.configs import CONF
from caspr_cli.recipe.errors import ConfigError, explain
from caspr_cli.recipe.schema import Source

NAME = "caspr-train"
UNTUNED = "~tuned@_global_"  # leaves out what was found by tuning on the data of the scale


class Composed(NamedTuple):
    recipe: DictConfig  # typed
    hydra: DictConfig


LISTS = ("logger", "optim.betas")  # keys of which a value is a list: with commas alone it would be a sweep


class Composer:
    """Composes the configs of one command line: of its words, each ``key=value`` (or, with ``sweeps``, several values).

    Raises ConfigError if a word cannot be read, or sets a key of Hydra that is not allowed.

    Args:
        place: a directory with more config files.
        name: the config file to begin with.
    """

    def __init__(
        self, given: Sequence[str] = (), *, sweeps: bool = False, place: str | None = None, name: str = "train"
    ) -> None:
        if not re.fullmatch(r"\w[\w/-]*", name):
            raise ConfigError(f"-cn {name}: should be the name of a file in the directory of -cd")
        for word in given:
            key, _, given_value = word.lstrip("+").partition("=")
            if words.parse(word).is_choice_sweep() and key in LISTS and "[" not in given_value:
                raise ConfigError(f"{word}: a list stands in brackets: '{key}=[{given_value}]'")
            if words.parse(word).is_sweep_override() and not sweeps:
                raise ConfigError(f"{word} is a sweep: add -m to run one job for each value")
        self.words = [word for word in given if not words.is_hydras(words.parse(word))]
        self.settings = [word for word in given if word not in self.words]
        for parsed in map(words.parse, self.settings):
            settings.refuse(parsed.package or parsed.key_or_group)
            if parsed.is_sweep_override():
                raise ConfigError(f"{parsed.input_line}: jobs of one sweep cannot have different launchers")
        ours = place is None and not plugins.folders()
        self._name, self._checked = name, ours and not any("@" in word for word in given)
        self._composed: dict[tuple[str, ...], Composed] = {}
        register_schemas()
        directory.use(place)
        GlobalHydra.instance().clear()
        hydra.initialize_config_dir(str(CONF), job_name=NAME, version_base="1.3")
        self._hydra = GlobalHydra.instance().hydra
        loader = GlobalHydra.instance().config_loader()
        self._groups = set(loader.list_groups(""))
        for word in self.words:  # Hydra's own words for it name neither the key nor the choices
            parsed = words.parse(word)
            value, group = parsed.value(), parsed.key_or_group
            free = parsed.is_delete() or parsed.is_sweep_override() or isinstance(value, (str, dict))
            if group in self._groups and not free:
                known = ", ".join(loader.get_group_options(group))
                raise ConfigError(f"{word}: no such choice. (choices: {known})")

    def jobs(self) -> list[list[str]]:
        """Return the words of each job of the sweep."""
        first = words.split(self.words)[:1]
        params = {key: value for job in first for key, value in (self.hydra(job).sweeper.params or {}).items()}
        more = [f"{key}={value}" for key, value in params.items()]
        for word in more:
            if words.is_hydras(words.parse(word)):
                raise ConfigError(f"{word}: jobs of one sweep cannot have different launchers")
        return words.split([*more, *self.words])

    def config(self, given: Sequence[str]) -> DictConfig:
        """Return the config of one job, as Hydra composes it, without Hydra's own part."""
        with self._explained(given):
            base, values = self._base(given)
            config = copy.deepcopy(base.recipe)
            for word in values:
                _set(config, word)
        return config

    def check(self, jobs: Sequence[Sequence[str]]) -> None:
        """Raise the error that :meth:`config` raises for any of the jobs. Each value is tried once."""
        tried: dict[int, tuple[DictConfig, set[str]]] = {}
        for given in jobs:
            with self._explained(given):
                base, values = self._base(given)
                if id(base) not in tried:
                    tried[id(base)] = (copy.deepcopy(base.recipe), set())
                config, seen = tried[id(base)]
                for word in values:
                    if word.input_line not in seen:
                        seen.add(cast(str, word.input_line))
                        _set(config, word)

    @contextmanager
    def _explained(self, given: Sequence[str]) -> Iterator[None]:
        """Turn an error of OmegaConf into one that names the key and the choice of this job."""
        try:
            yield
        except OmegaConfBaseException as error:
            raise ConfigError(explain(error, partial(self.keys, given), given)) from error

    def hydra(self, given: Sequence[str]) -> DictConfig:
        return self._base(given)[0].hydra

    def launcher(self, given: Sequence[str], folder: str) -> dict[str, Any]:
        """Return the launcher's keys for a job, with all references resolved; it writes its files into ``folder``."""
        config = OmegaConf.create(OmegaConf.to_container(self.config(given), enum_to_str=True))
        own = OmegaConf.to_container(self.hydra(given).launcher)
        config.hydra = {"launcher": own, "sweep": {"dir": folder}, "job": {"name": NAME}}
        found = cast(dict[str, Any], OmegaConf.to_container(config.hydra.launcher, resolve=True))
        settings.check_values(found)
        return found

    def keys(self, given: Sequence[str] | None = None) -> DictConfig:
        """Return the config of those choices that exist, to find the key that was meant; ``given``: of one job.

        Of Hydra's own part it has the launcher.
        """
        chosen = [word for word in (self.words if given is None else given) if self._chooses(words.parse(word))]
        launcher = [word for word in self.settings if self._chooses(words.parse(word))]
        for known in (chosen, []):
            with suppress(Exception):
                recipe, own = copy.deepcopy(self._compose(known, launcher))
                with open_dict(recipe):
                    recipe.hydra = {"launcher": own.launcher}
                return recipe
        return OmegaConf.create()

    def _base(self, given: Sequence[str]) -> tuple[Composed, list[Override]]:
        """Return the config of the choices among the words, and the words that change a value in it."""
        return self._chosen([*self._untuned(given), *given])

    def _untuned(self, given: Sequence[str]) -> list[str]:
        """Return the words that leave out the target and the rates of the sample, where the data are the user's own."""
        own = [word for word in given if words.parse(word).key_or_group == "task.data"]
        if not own or words.parse(own[-1]).value() == Source.sample.name:
            return []
        usual = self._chosen([word for word in given if word not in own])[0].recipe.task.get("data")
        return [UNTUNED, "task.target.value=null"] if usual == Source.sample else []

    def _chosen(self, given: Sequence[str]) -> tuple[Composed, list[Override]]:
        parsed = [words.parse(word) for word in given]
        if not all(self._changes(p) or self._chooses(p) or p.input_line == UNTUNED for p in parsed):
            return self._compose(given), []  # such as +key=value, whose order counts: Hydra keeps it
        chosen = [word for word, p in zip(given, parsed, strict=True) if word == UNTUNED or self._chooses(p)]
        return self._compose(chosen), [word for word in parsed if self._changes(word)]

    def _changes(self, word: Override) -> bool:
        """Return whether a word gives a value to an existing key."""
        plain = word.type == OverrideType.CHANGE and word.package is None and "/" not in word.key_or_group
        return plain and word.key_or_group not in self._groups

    def _chooses(self, word: Override) -> bool:
        """Return whether a word chooses a file."""
        plain = word.type == OverrideType.CHANGE and word.package is None and isinstance(word.value(), str)
        return plain and (word.key_or_group in self._groups or "/" in word.key_or_group)

    def _compose(self, given: Sequence[str], settings_given: Sequence[str] | None = None) -> Composed:
        given = [*(self.settings if settings_given is None else settings_given), *given]
        if (key := tuple(given)) not in self._composed:
            directory.Files.loaded.clear()
            if GlobalHydra.instance().hydra is not self._hydra:  # another composer was used in between
                GlobalHydra.instance().clear()
                GlobalHydra.instance().initialize(cast(Any, self._hydra))
            try:
                config = hydra.compose(self._name, given, return_hydra_config=True)
            except RecursionError as error:
                names = ", ".join(dict.fromkeys(directory.Files.loaded))
                raise ConfigError(f"{names}: these files include each other in their defaults, without end") from error
            except (AttributeError, TypeError, KeyError, AssertionError) as error:  # Hydra cannot merge them
                raise ConfigError(f"{' '.join(given)}: cannot be composed ({str(error).splitlines()[0]})") from error
            plain = None if self._checked else hydra.compose(None, return_hydra_config=True).hydra
            settings.check(config.hydra, plain)
            own = config.hydra
            with open_dict(config):
                del config["hydra"]
            self._composed[key] = Composed(config, own)
        return self._composed[key]


def _set(config: DictConfig, word: Override) -> None:
    """Set a key as a word says. A range of ``search.space`` is new, or takes the place of the one of its key."""
    key, value = word.key_or_group, word.value()
    if key == "search.space" and isinstance(value, dict):
        OmegaConf.update(config, key, {**config.search.space, **value}, merge=False)
    else:
        OmegaConf.update(config, key, value, merge=True)
