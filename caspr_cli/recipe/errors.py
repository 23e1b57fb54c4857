"""Explain errors of Hydra and OmegaConf in one to three lines that name the key and the nearest valid choice."""

import re
from collections.abc import Callable, Sequence

from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caspr_cli.common.errors import UserError, nearest
from caspr_cli.recipe.configs import scales

# What keys are called elsewhere.
ELSEWHERE = {
    "optim.lr": "learning_rate rate", "optim.weight_decay": "wd decay", "optim.betas": "beta beta1 beta2",
    "trainer.max_steps": "epochs max_epochs steps num_steps iterations",
    "trainer.devices": "gpus num_gpus n_gpus nproc_per_node num_devices", "trainer.accelerator": "device gpu cpu",
    "trainer.workers": "num_workers", "trainer.nodes": "num_nodes",
    "trainer.clip_norm": "grad_clip clip gradient_clip_val max_grad_norm",
    "trainer.accumulate": "accumulate_grad_batches gradient_accumulation_steps", "task.batch_size": "batch bs",
    "task.root": "data_dir data_root path", "task.data": "dataset", "optim": "optimizer opt", "task": "model",
    "schedule.warmup": "warmup_steps num_warmup_steps", "schedule.name": "scheduler lr_scheduler",
    "seed": "seeds random_seed", "output_dir": "output out log_dir logdir save_dir",
}  # fmt: skip
# What keys may be whose values have several types.
SEVERAL_TYPES = {
    "trial": "an integer, best, top1, top2, ..., or default",
}


class ConfigError(UserError):
    """A recipe that cannot be run; the message is for the user."""


def explain(error: BaseException, keys: Callable[[], DictConfig], argv: Sequence[str]) -> str:
    """Return a message about the user's mistake in ``argv`` that caused an exception of Hydra or OmegaConf.

    ``keys`` returns the config of the choices alone, for suggestions.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = "\n".join(str(e) for e in chain)
    for e in chain:
        if isinstance(e, MissingConfigException) and e.options is not None:
            return _unknown_choice(e)
    if match := re.search(r"Could not override '([^']+)'\.?\s*\n?No match in the defaults list", text):
        return _unknown_key(match[1].split("@")[0], keys(), argv)
    file = re.search(r"In '(.*)': \w+ raised while composing config:\n(.*)", text)
    where = f"in {file[1]}.yaml: " if file else ""
    for e in chain:
        if isinstance(e, OmegaConfBaseException) and e.full_key:
            return where + _bad_value(e, keys, argv)
    return f"{where}{file[2]}" if file else next(iter(str(chain[0]).strip().splitlines()), type(error).__name__)


def _unknown_choice(e: MissingConfigException) -> str:
    group, _, name = (e.missing_cfg_file or "").rpartition("/")
    if group.startswith("scale/"):  # scale/<task>/<scale>
        task = group.split("/")[1]
        return f"scale={name} is not defined for task={task} (it has: {', '.join(scales(task))})"
    options = [o for o in e.options or [] if "/" not in o]
    listed = ", ".join(options)
    hint = nearest(name, options, f"{group}=")
    if not hint and group in ("task", "optim"):
        hint = f" (A package may bring it: caspr-train new {'task' if group == 'task' else 'optimizer'} NAME)"
    return f"{group}={name}: no such choice.{hint} (choices: {listed})"


def _unknown_key(key: str, keys: DictConfig, argv: Sequence[str]) -> str:
    *path, name = key.split(".")
    node: object = keys
    for part in path:
        node = node.get(part) if isinstance(node, DictConfig) else None
    names = [str(k) for k in node if k != "hydra"] if isinstance(node, DictConfig) else []
    where = ".".join(path)
    prefix = f"{where}." if where else ""
    owner = f"{where}={node.get('name')}" if where in ("optim", "task") and isinstance(node, DictConfig) else where
    what = f"{key} is not a key" + (f" of {owner}" if owner else "") + "."
    groups = {str(k): v for k, v in keys.items() if isinstance(v, DictConfig) and k != "hydra"}
    meant = [f"{k}.{name}" for k, v in groups.items() if name in v]
    if not (meant or nearest(name, names)):
        meant = [ours for ours, theirs in ELSEWHERE.items() if name in theirs.split() and _has(keys, ours)]
    if meant:
        return f"{what} Did you mean {' or '.join(meant)}?"
    if key == "plan":
        return f"{what} plan=true goes with experiment=NAME; debug=plan shows what one run does"
    of = f"{owner} " if "=" in owner else ""
    hint = f"caspr-train {of}--cfg job{f' --package {path[0]}' if path else ''}"
    if path[:1] == ["hydra"]:
        of = "".join(f"{word} " for word in argv if word.startswith("hydra/launcher="))
        hint = f"caspr-train {of}--cfg hydra --package hydra.launcher"
    return f"{what}{nearest(name, names, prefix)} (keys: {hint})"


def as_range(key: str, text: str) -> str:
    """Return how several whole numbers are written, if the text is meant as a range or a list of them."""
    found = re.fullmatch(r"(\d+)(?:-|:|\.{2,3})(\d+)", text)
    if found:
        return f": for {found[1]} to {found[2]} write -m {key}='range({found[1]},{int(found[2]) + 1})'"
    listed = re.fullmatch(r"\[([\d, -]+)\]", text)
    return f": for each of them write -m {key}={listed[1].replace(' ', '')}" if listed else ""


def _has(keys: DictConfig, key: str) -> bool:
    absent = object()
    return OmegaConf.select(keys, key, default=absent) is not absent


def _bad_value(e: OmegaConfBaseException, keys: Callable[[], DictConfig], argv: Sequence[str]) -> str:
    key, message = str(e.full_key), str(e.msg or e).splitlines()[0]
    if re.search(r"Key '.*' (is )?not in", message):
        added = (a[1:].split("=")[0] for a in argv if a.startswith("+"))
        return _unknown_key(next((a for a in added if a.split(".")[-1] == key), key), keys(), argv)
    if match := re.search(r"Value '(.*)' of type '.*' could not be converted to (\w+)", message):
        kind = {"Float": "a number", "Integer": "an integer", "Boolean": "true or false"}.get(match[2], match[2])
        return f"{key} should be {kind} but is '{match[1]}'{as_range(key, match[1])}"
    if key in SEVERAL_TYPES and (match := re.search(r"Value '(.*)' of type '.*' is incompatible", message)):
        return f"{key} should be {SEVERAL_TYPES[key]}, but is '{match[1]}'"
    if match := re.search(r"Value '(.*)' is not a valid bool", message):
        return f"{key} should be true or false but is '{match[1]}'"
    if match := re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", message):
        choices = match[2].split(", ")
        return f"{key} should be one of {match[2]} but is '{match[1]}'.{nearest(match[1], choices, f'{key}=')}"
    typed = next((a for a in argv if a.lstrip("+~").startswith(f"{key}=")), key)
    if "is not a ListConfig, list or tuple" in message:
        usual = OmegaConf.select(keys(), key, default=["A", "B"]) or [typed.partition("=")[2]]
        return f"{typed}: {key} should be a list in brackets, as in {key}=[{','.join(map(str, usual))}]"
    if "is not a subclass of" in message:
        hint = f" Did you mean {key}.name={typed.partition('=')[2]}?" if _has(keys(), f"{key}.name") else ""
        return f"{typed}: {key} has keys of its own.{hint} (keys: caspr-train --cfg job --package {key})"
    message = re.sub(r'^\w+ raised while resolving interpolation: "?(.*?)"?$', r"\1", message)
    return f"{typed}: {message[0].lower()}{message[1:]}"
