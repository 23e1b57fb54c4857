"""Make a :class:`Recipe` from Hydra's config, or from the file in a record. No torch."""

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from caspr_cli.common.errors import nearest
from caspr_cli.common.shape import leaves
from caspr_cli.optim.family import REMOVED, without_removed
from caspr_cli.recipe import search
from caspr_cli.recipe.checks import check
from caspr_cli.recipe.configs import choices
from caspr_cli.recipe.errors import ConfigError, as_range
from caspr_cli.recipe.schema import OPTIMIZERS, KroneckerConf, OptimConf, Recipe, TaskConf
from caspr_cli.tasks.registry import CONFS

# Keys that do not change the numbers of a run, or that are in the record's path already.
NOT_IN_THE_NAME = (
    "seed", "resume", "output_dir", "logger", "horizon", "search.trials", "search.rerank", "search.refine",
    "trainer.timeout", "trainer.rendezvous", "trainer.keep_checkpoints",
)  # fmt: skip
LONGEST_NAME = 60  # characters, of what is readable in it
UNTUNED = "default"  # value of ``trial`` for a run with the default settings instead of drawn ones
# Keys that are newer than some records, with the value that those have. This value is not in the name, so that they
# are found again.
CAME_LATER = {
    "optim.axes": "all", "optim.exponent": 0.5, "optim.nesterov": False, "optim.polar": False,
    "optim.adamw_lr_scale": 1.0, "optim.measured": 0.0, "optim.polar_steps": 5, "trainer.strategy": "ddp",
}  # fmt: skip


def register_schemas() -> None:
    """Make the dataclasses known to Hydra: the recipe, and the choices of ``task`` and ``optim``."""
    store = ConfigStore.instance()
    store.store(group="schema", name="recipe", node=Recipe, package="_global_")
    for task, task_conf in CONFS.items():
        store.store(group="task", name=task, node=task_conf)
        if "sample" not in choices(f"scale/{task}"):
            store.store(group=f"scale/{task}", name="sample", node={}, package="_global_")
    for optimizer, optim_conf in OPTIMIZERS.items():
        store.store(group="optim", name=optimizer, node=optim_conf)


def freeze(config: DictConfig, given: Iterable[str] = (), trial: int | None = None) -> Recipe:
    """Return the checked recipe. Raises ConfigError if a value is missing or out of range.

    Args:
        given: overrides of the command line; a search does not change the keys that they set.
        trial: replaces that of the config.
    """
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    plain.pop("hydra", None)
    changes = {} if trial is None else {"trial": trial}
    chosen = changes.get("trial", plain["trial"])
    changes |= _untuned(plain, given) if chosen == UNTUNED else _drawn(plain, chosen, given)
    search.put(plain, changes)
    recipe = _typed(config, changes) or _build(plain)
    now = to_plain(recipe)
    if dict(leaves(now)).keys() != dict(leaves(plain)).keys():
        recipe = _build(plain)  # whose error names the key that should not be there
    check(recipe, now)
    return recipe


def _typed(config: DictConfig, changes: Mapping[str, Any]) -> Recipe | None:
    """Return what :func:`_build` returns, in a fraction of the time; None if a part does not have its type yet."""
    types = tuple(OmegaConf.get_type(config, group) for group in (None, "task", "optim"))
    if types != (Recipe, CONFS.get(config.task.name), OPTIMIZERS.get(config.optim.name)) or "hydra" in config:
        return None
    config = copy.deepcopy(config) if changes else config
    for key, value in changes.items():
        OmegaConf.update(config, key, value, merge=False)
    return cast(Recipe, OmegaConf.to_object(config))


def _drawn(plain: Mapping[str, Any], trial: Any, given: Iterable[str]) -> dict[str, Any]:
    """Return the values of a trial by key, and the search space without the keys that are given."""
    name, space = plain["search"]["name"], plain["search"]["space"]
    if name is None:
        if trial is not None:
            known = ", ".join(word for word in choices("search") if word != "none")
            raise ConfigError(f"trial={trial} needs a search: add search=NAME (choices: {known})")
        return {}
    if trial is None:
        raise ConfigError(f"search={name}: add -m trial='range({plain['search']['trials']})', or one trial")
    if not isinstance(trial, int):
        known = f"an integer, best, top1, top2, ..., or {UNTUNED}"
        raise ConfigError(f"trial should be {known}, but is '{trial}'{as_range('trial', str(trial))}")
    space = {key: kinds for key, kinds in space.items() if not _lacks(plain, key)}
    values = search.draw(space, trial)  # from the whole space, so that a given key changes no other value
    if not (left := {key: space[key] for key in space.keys() - search.fixed(space, given)}):
        raise ConfigError(f"search={name} has nothing to draw: you set {', '.join(sorted(space))}; or use search=none")
    return {"search.space": left} | {key: values[key] for key in left}


def _lacks(plain: Mapping[str, Any], key: str) -> bool:
    """Return whether only other optimizers have a key, so that it is not drawn here. Raises ConfigError if none has."""
    group, _, rest = key.partition(".")
    if group != "optim" or search.has(plain, key):
        return False
    known = {name for optimizer in OPTIMIZERS.values() for name in vars(optimizer())}
    if (name := rest.partition(".")[0]) not in known:
        raise ConfigError(f"search.space: {key} is a key of no optimizer.{nearest(name, known)}")
    return True


def _untuned(plain: Mapping[str, Any], given: Iterable[str]) -> dict[str, Any]:
    """Return the optimizer's own values by key, but for keys that are given; and no search."""
    own = {f"optim.{key}": value for key, value in to_plain(OPTIMIZERS[plain["optim"]["name"]]()).items()}
    return {"search.name": None, "search.space": {}} | {key: own[key] for key in own.keys() - search.fixed(own, given)}


def valid(recipe: Recipe, values: Mapping[str, Any]) -> bool:
    """Return whether a recipe could be run with these values of dotted keys."""
    plain = to_plain(recipe)
    try:
        search.put(plain, values)
        check(_build(plain), plain)
    except ConfigError:
        return False
    return True


def _build(plain: dict[str, Any]) -> Recipe:
    """Return a recipe from plain values; the names of ``task`` and ``optim`` choose their types."""
    # merged on its own: Recipe.task is declared as what all tasks share
    rest = {k: v for k, v in plain.items() if k not in ("task", "optim")}
    for group, known in (("task", CONFS), ("optim", OPTIMIZERS)):
        if plain[group]["name"] not in known:
            raise ConfigError(
                f"{group}={plain[group]['name']} is not known here: is the package installed that brings it, as the "
                f"record's provenance.json has it? (choices: {', '.join(known)})"
            )
    merged = OmegaConf.merge(OmegaConf.structured(Recipe), rest)
    merged.task = OmegaConf.merge(OmegaConf.structured(CONFS[plain["task"]["name"]]), plain["task"])
    merged.optim = OmegaConf.merge(OmegaConf.structured(OPTIMIZERS[plain["optim"]["name"]]), plain["optim"])
    return cast(Recipe, OmegaConf.to_object(merged))


def to_plain(recipe: Recipe | OptimConf | TaskConf) -> dict[str, Any]:
    """Return a recipe in builtin types, enums by name, as in ``config.yaml``."""
    return cast(dict[str, Any], _plain(recipe, ""))


def _plain(value: Any, kind: str) -> Any:
    """Return a value in builtin types; ``kind`` is the type of its field, as it is declared."""
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name), str(f.type)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each, "") for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each, kind.removeprefix("tuple[")) for each in value]
    return float(value) if kind.startswith("float") and isinstance(value, int) else value


def save(recipe: Recipe) -> str:
    """Return the text of ``config.yaml``."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(recipe)))


def load(path: Path) -> Recipe:
    """Return the recipe in a ``config.yaml``. It holds values only: nothing in it is imported or called."""
    return parse(path.read_text(encoding="utf8"))


def parse(text: str) -> Recipe:
    """Return the recipe in a text. Raises ConfigError if a removed option in it has another value than its default."""
    plain = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(text)))
    plain.get("search", {}).pop("extend", None)  # a removed key; what it chose is in the record's search.space
    try:
        optim = without_removed(plain["optim"])
    except ValueError as error:
        raise ConfigError(f"optim.{error}") from error
    conf = OPTIMIZERS.get(optim["name"])
    before = {key.removeprefix("optim."): value for key, value in CAME_LATER.items()}
    return _build(plain | {"optim": {key: value for key, value in before.items() if hasattr(conf, key)} | optim})


def identity(recipe: Recipe) -> str:
    """Return eight hex digits that name the recipe without its seed and its place."""
    plain = to_plain(recipe)
    for key in NOT_IN_THE_NAME:
        *groups, name = key.split(".")
        del reduce(getitem, groups, plain)[name]
    for key, before in CAME_LATER.items():
        group, name = key.split(".")
        if plain[group].get(name) == before:
            del plain[group][name]
    plain["trainer"]["workers"] = plain["trainer"]["workers"] or 0  # null came later, and changes no result
    if recipe.debug == "plan":  # trains nothing; ``trial=best`` and the like are those of the runs themselves
        plain["debug"] = "none"
    if isinstance(recipe.optim, KroneckerConf):  # records that were made with these keys are found again, too
        plain["optim"] |= REMOVED
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]


def readable(recipe: Recipe) -> str:
    """Return the values of the optimizer that are not its defaults, and the identity: ``lr0.006-no_polar-3f2a91c0``."""
    own, given = to_plain(OPTIMIZERS[recipe.optim.name]()), to_plain(recipe.optim)
    words = [_word(key, value) for key, value in given.items() if value != own[key]]
    text = re.sub(r"[^\w.+-]", "", "-".join(words))
    if len(text) > LONGEST_NAME:
        text = text[:LONGEST_NAME].rpartition("-")[0] + "-more"
    return f"{text}-{identity(recipe)}" if text else identity(recipe)


def _word(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return key if value else f"no_{key}"
    numbers = value if isinstance(value, list) else [value]
    return key + "_".join(f"{v:.3g}".replace("e-0", "e-") if isinstance(v, float) else str(v) for v in numbers)


def options(conf: OptimConf) -> dict[str, Any]:
    """Return the fields of a config as keyword arguments, without the name; enums are strings, lists tuples."""
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in vars(conf).items()}
    return {key: value.name if isinstance(value, Enum) else value for key, value in fields.items() if key != "name"}
