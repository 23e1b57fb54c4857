"""Jobs by Hydra's launchers, in other processes or on other machines.

Hydra would compose each job again there, and obey its own keys (change the directory, set variables, build loggers).
Instead it gets a loader that composes nothing, and settings without those keys.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

from hydra.conf import HydraConf, JobConf, RunDir, SweepDir
from hydra.core.config_loader import ConfigLoader
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from caspr_cli.recipe.composer import NAME
from caspr_cli.runs.sweep import Sweep

QUIET: dict[str, Any] = {"version": 1, "root": None}
LOUD: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler", "stream": "ext://sys.stderr"}},
    "root": {"level": "INFO", "handlers": ["console"]},
}


class Composed:
    """Stands in for Hydra's loader: it gives a job its words; the job reads its config in the sweep's folder."""

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        config = copy.deepcopy(master_config)
        config.hydra.overrides.task = list(sweep_overrides)
        return config


def launch(sweep: Sweep, jobs: Sequence[Sequence[str]], run: Callable[[DictConfig], None], *, verbose: bool) -> None:
    """Start the jobs and wait for them; raises what the launcher raises. ``verbose``: it says what it does.

    In the process of each job ``run`` is called; ``HydraConfig`` there has the job's number, from 0, and its words.
    """
    hydra = HydraConf(
        mode=RunMode.MULTIRUN,
        run=RunDir("."),
        sweep=SweepDir(str(sweep.folder.parent), "."),
        output_subdir=None,
        job=JobConf(name=NAME, chdir=False),
        hydra_logging=LOUD if verbose else QUIET,
        job_logging=QUIET,
        launcher=dict(sweep.settings),
    )
    config = OmegaConf.create({"hydra": OmegaConf.structured(hydra)})
    context = HydraContext(config_loader=cast(ConfigLoader, Composed()), callbacks=cast(Any, Callback()))
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=run, config=config)
    for returned in launcher.launch([list(job) for job in jobs], initial_job_idx=0):
        _ = returned.return_value  # raises what the job raised
