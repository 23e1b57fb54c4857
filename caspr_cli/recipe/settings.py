"""The keys of Hydra that a user may set: where the jobs of a sweep run. Others below ``hydra`` are refused by name.

Hydra builds loggers, launchers, sweepers and callbacks from these keys, sets variables of workers and looks for configs
in packages, so that a config could run any code. This is therefore a list of what is allowed.
"""

from collections.abc import Mapping
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from caspr_cli.common.shape import leaves
from caspr_cli.recipe.errors import ConfigError

ALLOWED = ("launcher", "sweeper.params", "verbose")
# Keys that Hydra itself writes, and the launcher, which has a rule of its own below.
OWN = ("launcher.", "overrides.", "runtime.", "job.name", "job.config_name", "job.override_dirname")

# Keys of submitit. Not `setup` and `srun_args`, which are commands; not its folder, from which jobs are read back.
_QUEUE = {"timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb", "nodes", "name", "stderr_to_stdout"}
_SLURM = _QUEUE | {
    "partition", "qos", "comment", "constraint", "exclude", "gres", "cpus_per_gpu", "gpus_per_task", "mem_per_gpu",
    "mem_per_cpu", "account", "signal_delay_s", "max_num_timeout", "array_parallelism",
    *(f"additional_parameters.{key}" for key in (
        "mail-user", "mail-type", "reservation", "licenses", "nodelist", "exclusive", "nice", "dependency", "begin",
        "clusters", "hint", "priority", "gpu-bind", "switches", "contiguous",
    )),
}  # fmt: skip
# Keys of Ray. Not `runtime_env`, which installs packages and sets variables.
_RAY = {
    *(f"ray.init.{key}" for key in ("address", "num_cpus", "num_gpus", "include_dashboard", "object_store_memory",
                                    "namespace", "log_to_driver")),
    *(f"ray.remote.{key}" for key in ("num_cpus", "num_gpus", "memory", "accelerator_type", "max_calls")),
}  # fmt: skip
# The class of each launcher, the choice that has its defaults, and the keys that may differ from them. Not joblib's
# `pre_dispatch` and `backend`: the first is an expression, the second a class.
_PLUGINS = "hydra_plugins."
LAUNCHERS: dict[str, tuple[str, set[str]]] = {
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher": ("basic", set()),
    f"{_PLUGINS}hydra_joblib_launcher.joblib_launcher.JoblibLauncher": ("joblib", {"n_jobs"}),
    f"{_PLUGINS}hydra_submitit_launcher.submitit_launcher.LocalLauncher": ("submitit_local", _QUEUE),
    f"{_PLUGINS}hydra_submitit_launcher.submitit_launcher.SlurmLauncher": ("submitit_slurm", _SLURM),
    f"{_PLUGINS}hydra_ray_launcher.ray_launcher.RayLauncher": ("ray", _RAY),
}


def refuse(key: str, where: str = "") -> None:
    """Raise ConfigError, beginning with ``where``, unless the key, as ``hydra/launcher``, is on the list."""
    below = key.replace("/", ".").removeprefix("hydra").removeprefix(".")
    if not any(f"{below}.".startswith(f"{allowed}.") for allowed in ALLOWED):
        raise ConfigError(
            f"{where}{key} cannot be set: of Hydra's own keys only hydra/launcher, hydra.launcher.KEY, "
            "hydra.sweeper.params and hydra.verbose can"
        )


def check(given: DictConfig, plain: DictConfig | None) -> None:
    """Check Hydra's part of a composed config. Raises ConfigError, which names the key.

    ``plain`` is the same part without the user's words; None if only words could change it, and they were checked.
    """
    if plain is not None:
        usual = _leaves(plain)
        for key, value in _leaves(given).items():
            if not key.startswith(OWN) and (key not in usual or usual[key] != value):
                refuse(f"hydra.{key}")
    if not isinstance(given.verbose, bool):
        raise ConfigError(f"hydra.verbose should be true or false but is '{given.verbose}'")
    launcher = _leaves(given.launcher)
    target = launcher.pop("_target_", None)
    if target not in LAUNCHERS:
        raise ConfigError(f"hydra.launcher._target_={target} is not an allowed launcher")
    choice, keys = LAUNCHERS[target]
    usual = _leaves(OmegaConf.structured(ConfigStore.instance().load(f"hydra/launcher/{choice}.yaml").node))
    for key, value in launcher.items():
        if key not in keys and (key not in usual or usual[key] != value):
            known = ", ".join(sorted({name.partition(".")[0] for name in keys})) or "none"
            raise ConfigError(f"hydra.launcher.{key} cannot be set for this launcher (keys: {known})")


def check_values(launcher: Mapping[str, Any]) -> None:
    """Raise ConfigError for a resolved value of more than one line, which a scheduler would read as commands."""
    for key, value in leaves(launcher):
        if not str(value).isprintable():
            raise ConfigError(f"hydra.launcher.{key} should be one line of plain characters but is {value!r}")


def _leaves(node: DictConfig) -> dict[str, Any]:
    """Return the dotted keys of a config with what is written there, unresolved."""
    return dict(leaves(cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))))
