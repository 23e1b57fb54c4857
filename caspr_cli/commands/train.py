"""``caspr-train``: compose a recipe, run it, say what came of it. Never imports torch."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, fields
from typing import Any

import hydra
import hydra._internal.hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from caspr_cli import __version__
from caspr_cli.recipe import compose
from caspr_cli.recipe.errors import ConfigError, explain, nearest
from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs import summary
from caspr_cli.runs.launch import BAD_USAGE, INTERRUPTED, OK, SOME_FAILED, TERMINATED, Outcome, plan, preflight, run
from caspr_cli.runs.record import Record, RecordBusyError, RecordDamagedError

# Hydra's own flags; those with a value take the next word.
FLAGS = {"-m", "--multirun", "-r", "--run", "-c", "--cfg", "--resolve", "-p", "--package", "-i", "--info", "-cd",
         "--config-dir", "-cn", "--config-name", "-sc", "--shell-completion", "--version", "--hydra-help"}  # fmt: skip
WITH_VALUE = {"-c", "--cfg", "-p", "--package", "-cd", "--config-dir", "-cn", "--config-name", "-i", "--info", "-sc",
              "--shell-completion"}  # fmt: skip

HELP = """\
caspr-train {version}: train a task with an optimizer, and keep a record of it

  caspr-train task=c4_lm optim=caspr                       one run
  caspr-train -m optim=caspr,shampoo,adamw seed=0,1,2      a sweep: nine runs and a table
  caspr-train scale=paper task.data=files task.root=DIR    the paper's size, on your C4 shards

tasks
{tasks}
optimizers
{optimizers}
scales
{scales}
keys     any key of the recipe as key=value; all of them: caspr-train --cfg job
         trainer.max_steps trainer.devices trainer.precision optim.lr schedule.name seed resume output_dir
flags    -m sweep   --cfg job print the recipe   debug=fast 20 steps   debug=plan what is done to each tensor
tab      completion: eval "$(caspr-train -sc install=bash)"
exits    0 done   1 the run failed   2 bad usage   3 some jobs of a sweep failed   130, 143 interrupted
see      tensorboard --logdir outputs
"""


@dataclass
class Session:
    """What the jobs of one command line came to."""

    command: list[str]
    outcomes: list[tuple[str, Outcome]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    plans: list[int] = field(default_factory=list)  # exit codes of debug=plan

    def job(self, config: DictConfig) -> None:
        """Called by Hydra for each job. Never raises: one job's end is no other's."""
        sweep = HydraConfig.get().mode == hydra.types.RunMode.MULTIRUN
        name = HydraConfig.get().job.override_dirname.replace(",", " ") if sweep else ""
        ended = [outcome.exit_code for _, outcome in self.outcomes[-1:]] + self.plans[-1:]
        if any(code in (INTERRUPTED, TERMINATED) for code in ended):
            return  # the sweep was told to stop
        try:
            recipe = compose.freeze(config)
            if sweep:
                say(f"\njob {len(self.outcomes) + len(self.plans) + len(self.refused) + 1}: {name}")
            if recipe.debug == "plan":
                self.plans.append(self.plan(recipe))
                return
            outcome = self.run(recipe, list(HydraConfig.get().overrides.task))
            self.outcomes.append((name, outcome))
            if outcome.exit_code == OK and not sweep:
                for line in summary.next_commands(recipe, self.command):
                    say(line)
        except (ConfigError, RecordBusyError, RecordDamagedError) as error:
            self.refuse(name, str(error))
        except OmegaConfBaseException as error:
            self.refuse(name, explain(error, keys_of(self.command), self.command))
        except OSError as error:
            self.refuse(name, f"output_dir={config.output_dir}: cannot write there: {error}")

    def refuse(self, name: str, why: str) -> None:
        self.refused.append(f"{name}: {why}")
        complain(why)

    def run(self, recipe: Recipe, overrides: list[str]) -> Outcome:
        record = Record.of(recipe)
        todo = {"new": "new", "continue": "continues", "skip": "done", "failed": "failed before"}[plan(recipe, record)]
        say(f"caspr-train {__version__}  task={recipe.task.name} optim={recipe.optim.name} "
            f"scale={recipe.scale} seed={recipe.seed}")  # fmt: skip
        if given := [o for o in overrides if o.partition("=")[0] not in ("task", "optim", "scale", "seed")]:
            say(f"given    {' '.join(given)}")
        say(f"record   {record.path} ({todo})")
        if todo in ("new", "continues"):
            say("start    importing torch and Lightning takes some seconds")
        outcome = run(recipe, self.command)
        for line in summary.footer(outcome):
            say(line)
        return outcome

    @staticmethod
    def plan(recipe: Recipe) -> int:
        say(f"caspr-train {__version__}  task={recipe.task.name} optim={recipe.optim.name} scale={recipe.scale}  "
            "(debug=plan: nothing is trained)")  # fmt: skip
        return preflight(recipe)

    def exit_code(self) -> int:
        codes = [outcome.exit_code for _, outcome in self.outcomes] + self.plans + [BAD_USAGE] * len(self.refused)
        if len(codes) == 1:
            return codes[0]
        say("")
        for line in summary.table(self.outcomes) if self.outcomes else []:
            say(line)
        for line in self.refused:
            say(f"refused  {line}")
        stopped = [c for c in codes if c in (INTERRUPTED, TERMINATED)]
        if stopped:
            return stopped[0]
        return SOME_FAILED if any(codes) else OK


class NoCallbacks(Callbacks):
    """Hydra builds callbacks, launchers and sweepers from ``_target_``: a config would run code of its choosing."""

    def __init__(self, config: DictConfig | None = None, **other: Any) -> None:
        if config is not None:
            if config.hydra.callbacks:
                raise ConfigError("hydra.callbacks would run code that a config chooses: not allowed")
            for part in ("launcher", "sweeper"):
                target = config.hydra[part]._target_
                if not target.startswith(("hydra._internal.", "hydra_plugins.")):
                    raise ConfigError(f"hydra.{part}._target_={target} is none of Hydra's own: not allowed")
        super().__init__()


def say(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:  # the reader is gone, the run is not
        sys.stdout = open(os.devnull, "w", encoding="utf8")  # noqa: SIM115


def complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def arrange(argv: list[str]) -> list[str]:
    """Flags first: argparse refuses overrides on both sides of a flag.

    Raises:
        ConfigError: an unknown flag.
    """
    flags, overrides, words = [], [], iter(argv)
    for word in words:
        if word.startswith("-"):
            if word.split("=")[0] not in FLAGS:
                key = word.lstrip("-").split("=")[0]
                if key.partition(".")[0] in {f.name for f in fields(Recipe)} or key in ("lr", "steps", "epochs"):
                    raise ConfigError(
                        f"{word} is not a flag: keys are written key=value, as in optim=caspr optim.lr=1e-3"
                    )
                raise ConfigError(f"{word} is not a flag.{nearest(word, FLAGS)} (caspr-train --help)")
            flags.append(word)
            if word in WITH_VALUE:
                value = next(words, None)
                flags += [] if value is None else [value]
        else:
            group = word.lstrip("+~").partition("=")[0]
            if group in ("task.name", "optim.name"):
                raise ConfigError(f"{word}: choose with {group.removesuffix('.name')}={word.partition('=')[2]}")
            overrides.append(word)
    return flags + overrides


def usage() -> str:
    def listing(group: str) -> str:
        return "\n".join(f"  {name:<14} {about}" for name, about in compose.choices(group).items())

    return HELP.format(version=__version__, tasks=listing("task"), optimizers=listing("optim"), scales=listing("scale"))


def main() -> int:
    """Console script. Returns the exit code."""
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print(usage(), end="")
        return OK
    if "--version" in argv:
        print(f"caspr-train {__version__}")
        return OK
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here instead of being printed
    hydra._internal.hydra.Callbacks = NoCallbacks  # type: ignore[attr-defined]
    compose.register_schemas()
    session = Session(["caspr-train", *argv])
    decorated: Any = hydra.main(version_base="1.3", config_path=str(compose.CONF), config_name="train")
    try:
        sys.argv[1:] = arrange(argv)
        decorated(session.job)()
    except (HydraException, OmegaConfBaseException) as error:
        complain(explain(error, keys_of(argv), argv))
        return BAD_USAGE
    except (ConfigError, ValueError, OSError) as error:
        complain(str(error).splitlines()[0])
        return BAD_USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    return session.exit_code() if session.outcomes or session.plans or session.refused else OK


def keys_of(argv: list[str]) -> DictConfig:
    """The recipe of the choices in ``argv`` without its values, to find the key that was meant."""
    known = {f"{group}={choice}" for group in ("task", "optim") for choice in compose.choices(group)}
    chosen = [a for a in argv if a in known]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(compose.CONF), version_base="1.3"):
        try:
            return hydra.compose("train", overrides=chosen)
        except HydraException:
            return hydra.compose("train")


if __name__ == "__main__":
    sys.exit(main())
