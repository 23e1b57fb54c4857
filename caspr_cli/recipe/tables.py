"""The files of ``conf/experiment``, of which each describes a table: ours, and those of other packages."""

from pathlib import Path
from typing import Any

import yaml

from caspr_cli.common.errors import nearest
from caspr_cli.recipe.configs import files
from caspr_cli.recipe.errors import ConfigError

KEYS = {"like": str, "jobs": dict, "scale": dict, "baseline": str, "horizon": bool}  # and what each holds


def written(name: str, asking: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what the file of an experiment says: ``jobs``, ``scale``, ``baseline`` and ``horizon``.

    What it does not say is that of the experiment that it is ``like`` (none of ``asking``, which are like it), but for
    the baseline. Raises ConfigError if there is none of that name, or its file says something else.
    """
    known = files("experiment")
    if name not in known:
        choices = f"{nearest(name, known, 'experiment=')} (choices: {', '.join(known)})"
        raise ConfigError(f"experiment={name}: no such choice.{choices}")
    own = _checked(known[name])
    like = own.pop("like", None)
    if like in (name, *asking):
        raise ConfigError(f"{known[name]}: like: {like} leads back to {name}")
    alone = {"jobs": {}, "scale": own.get("scale", {"sample": {}}), "horizon": False}
    base = written(like, (name, *asking)) if like else alone
    scales = {scale: jobs | own.get("scale", {}).get(scale, {}) for scale, jobs in base["scale"].items()}
    return base | {"baseline": None} | own | {"jobs": base["jobs"] | own.get("jobs", {}), "scale": scales}


def _checked(file: Path) -> dict[str, Any]:
    """Return the content of a file of an experiment, in which each key holds what it should."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{file}: is not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: should have keys and values: {', '.join(KEYS)}")
    for key, value in content.items():
        if key not in KEYS:
            raise ConfigError(f"{file}: {key} is not a key of an experiment.{nearest(str(key), KEYS)}")
        if not isinstance(value, KEYS[key]) and (key, value) != ("baseline", None):  # null: compared with no row
            what = {str: "a word", dict: "a mapping", bool: "true or false"}[KEYS[key]]
            raise ConfigError(f"{file}: {key} should be {what} but is {value!r}")
    for scale, jobs in content.get("scale", {}).items():
        if not isinstance(jobs, dict):
            raise ConfigError(f"{file}: scale.{scale} should be a mapping, as in {{sample: {{}}}}, but is {jobs!r}")
    if "jobs" not in content and "like" not in content:
        raise ConfigError(f"{file}: should have jobs, as in jobs: {{task: c4_lm, optim: [caspr, adamw]}}")
    return content


def in_words(value: Any) -> str:
    """Return a value in Hydra's grammar: a list is several values, and a list in it is one value."""
    if isinstance(value, list):
        return ",".join(f"[{in_words(each)}]" if isinstance(each, list) else in_words(each) for each in value)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
