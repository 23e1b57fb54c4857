"""``caspr-train``: compose a recipe, run it, say what came of it. Never imports torch."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caspr_cli import __version__
from caspr_cli.common.errors import Parser, UserError, nearest
from caspr_cli.common.streams import cause, complain, console_script, say
from caspr_cli.recipe import compose
from caspr_cli.recipe.composer import Composer
from caspr_cli.recipe.errors import ConfigError, explain
from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs.experiment import Experiment, StoppedError, damaged, rows, seconds
from caspr_cli.runs.experiment import plan as plan_of
from caspr_cli.runs.launch import BAD_USAGE, INTERRUPTED, OK, RUN_FAILED, SOME_FAILED, TERMINATED
from caspr_cli.runs.record import FULL, RecordDamagedError
from caspr_cli.runs.session import Session
from caspr_cli.runs.sweep import EXTRAS, new_folder

# Those of Hydra's flags that there are; some take the next word.
FLAGS = {"-m", "--multirun", "-r", "--run", "-c", "--cfg", "--resolve", "-p", "--package", "-i", "--info", "-cd",
         "--config-dir", "-cn", "--config-name", "-sc", "--shell-completion", "--version"}  # fmt: skip
WITH_VALUE = {"-c", "--cfg", "-p", "--package", "-cd", "--config-dir", "-cn", "--config-name", "-i", "--info", "-sc",
              "--shell-completion"}  # fmt: skip
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")

SEVERITY = (OK, RUN_FAILED, SOME_FAILED, BAD_USAGE, TERMINATED, INTERRUPTED)  # rising

HELP = """\
caspr-train {version}: train a task with an optimizer, and keep a record of it

  caspr-train task=c4_lm optim=caspr                       one run
  caspr-train -m optim=caspr,shampoo,adamw seed=0,1,2      a sweep: nine runs and a table
  caspr-train -m search=lr trial='range(6)'                a search of six trials; then trial=best seed=1,2,3
  caspr-train experiment=c4_14m plan=true                  the plan of a whole table, tuned and seeded
  caspr-train scale=paper task.data=files task.root=DIR    the paper's size, on your C4 shards

tasks
{tasks}
optimizers
{optimizers}
scales
{scales}
tables   experiment={experiments}
keys     any key of the recipe as key=value; all of them: caspr-train --cfg job
         search ({searches}) trial trainer.max_steps optim.lr seed resume output_dir
flags    -m sweep (hydra/launcher=joblib, slurm, ray)   --cfg job   debug=fast 20 steps   debug=plan
tab      completion: eval "$(caspr-train -sc install=bash)"
exits    0 done   1 the run failed   2 bad usage   3 some jobs of a sweep failed   130, 143 interrupted
see      caspr-report --help   tensorboard --logdir outputs
"""


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

    return HELP.format(
        version=__version__,
        tasks=listing("task"),
        optimizers=listing("optim"),
        scales=listing("scale"),
        searches=", ".join(name for name in compose.choices("search") if name != "none"),
        experiments=wrapped(compose.choices("experiment")),
    )


def wrapped(names: Iterable[str]) -> str:
    """A list that goes on below its beginning."""
    return textwrap.fill(", ".join(names), 100, initial_indent=" " * 20, subsequent_indent=" " * 20).lstrip()


@console_script
def main() -> int:
    """Console script. Returns the exit code."""
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print(usage(), end="")
        return OK
    if "--version" in argv:
        print(f"caspr-train {__version__}")
        return OK
    try:
        named, argv = experiments(argv)
        if named:
            told = [Experiment.read(name, [word for word in argv if not word.startswith("plan=")]) for name in named]
            return one_after_the_other(partial(tables, each, argv) for each in told)
    except (HydraException, OmegaConfBaseException) as error:
        complain(not_installed(error) or explain(error, Composer(argv, sweeps=True).keys, argv))
        return BAD_USAGE
    except OSError as error:
        complain(cause(error))
        return TERMINATED if full(error) else BAD_USAGE
    except (ConfigError, RecordDamagedError) as error:
        complain(str(error))
        return BAD_USAGE
    except StoppedError as stopped:
        return TERMINATED if stopped.number == signal.SIGTERM else INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    return compose_and_run(argv)


def experiments(argv: list[str]) -> tuple[list[str], list[str]]:
    """The experiments that are named, and the other words."""
    named = [word for word in argv if word.startswith("experiment=")]
    rest = [word for word in argv if word not in named]
    for word in rest if named else ():
        key, _, value = word.partition("=")
        if word.startswith("-") or "=" not in word:
            raise ConfigError(f"{word}: with experiment=NAME give keys as key=value alone (it sweeps without -m)")
        if key == "trial":
            raise ConfigError(f"{word}: an experiment runs all of its trials; search.trials=N says how many")
        if key == "plan" and value not in ("true", "false"):
            raise ConfigError(f"plan should be true or false but is '{value}'")
        if key == "debug" and value == "plan":
            raise ConfigError("debug=plan is of one run; what an experiment will do says plan=true")
    return [name for word in named for name in word.partition("=")[2].split(",")], rest


def tables(told: Experiment, argv: list[str]) -> int:
    """Run one experiment: say what it will do and for how long, tune, run the seeds, report. Returns the exit code."""
    plans = [word for word in argv if word.startswith("plan=")]
    folder = Path(told.output_dir)  # refuses several, before anything is said
    command = ["caspr-train", f"experiment={told.name}", *(word for word in argv if word not in plans)]
    say(f"caspr-train {__version__}  experiment={told.name}: {compose.choices('experiment')[told.name]}")
    planned_only = plans[-1:] == ["plan=true"]
    table, took = rows(told), list[float | str]()
    if not planned_only:
        new_folder(folder, told.output_dir).rmdir()  # better to know now than after the timing
    for number, row in enumerate(table, 1):
        say(f"timing   row {number} of {len(table)}: {row.label}")
        try:
            took.append(seconds(row, command))
        except ConfigError as error:
            if not planned_only:
                raise ConfigError(f"{row.label}: {error}") from error
            took.append(str(error))
    for line in [*plan_of(told, table, took), *damaged(table)]:
        say(line)
    if planned_only:
        say(f"next     {shlex.join(command)}")
        return OK
    sweeps = [told.tuning(len(table[0].tuning))] * told.searches + [told.seeds()]
    code = one_after_the_other(partial(compose_and_run, ["-m", *sweep]) for sweep in sweeps)
    if code in (INTERRUPTED, TERMINATED):
        say(f"         {shlex.join(command)}    goes on")
    elif code != BAD_USAGE:
        report(told)
    return code


def report(told: Experiment) -> None:
    """Compare what there is of a table, on the terminal and as a page beside the records."""
    from caspr_cli.common.errors import UserError
    from caspr_cli.common.files import write_output
    from caspr_cli.report import records, terminal  # slow to import, and not needed before
    from caspr_cli.report.compare import tables
    from caspr_cli.report.page import compared

    folder = Path(told.output_dir)
    command, page = ["caspr-report", "compare", str(folder)], folder / "report.html"
    try:
        runs = records.find([folder]).runs
        try:
            made = tables(runs, baseline=told.baseline)
            command += ["--baseline", told.baseline] if told.baseline else []
        except UserError:  # the command line has left this row out
            made = tables(runs)
        say("")
        for line in terminal.compared(made, runs, [folder], shutil.get_terminal_size((120, 24)).columns):
            say(line)
        write_output(page, compared(made, shlex.join([*command, "--to", str(page)])))
        say(f"wrote    {page}")
    except UserError as error:
        complain(str(error))


def one_after_the_other(commands: Iterable[Callable[[], int]]) -> int:
    """Run them until one is interrupted or refused. Returns the exit code that says most."""
    codes = []
    for command in commands:
        codes.append(command())
        if codes[-1] not in (OK, SOME_FAILED):
            break
    return max(codes, key=SEVERITY.index)


def flags_of(argv: list[str]) -> argparse.Namespace:
    """The flags, and the other words.

    Raises:
        ConfigError: a flag that is none, or two that do not go together.
    """
    parser = Parser(add_help=False)
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--run", "-r", action="store_true")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--package", "-p")
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=INFO)
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    parser.add_argument("--config-name", "-cn", default="train")
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    parser.add_argument("words", nargs="*")
    found = parser.parse_args(arrange(argv))
    if found.multirun + found.run + bool(found.cfg) + bool(found.info) + found.shell_completion > 1:
        raise ConfigError("one of -m, -r, --cfg, --info and -sc at a time")
    if (found.resolve or found.package) and not found.cfg:
        raise ConfigError("--resolve and --package go with --cfg")
    if len(found.config_dir) > 1:
        raise ConfigError(f"-cd is given {len(found.config_dir)} times: one directory can be read")
    return found


def compose_and_run(argv: list[str]) -> int:
    """What a command line asks for: one run, a sweep, or a look at the config. Returns the exit code."""
    session, composer = Session(["caspr-train", *argv]), None
    try:
        flags = flags_of(argv)
        composer = Composer(flags.words, sweeps=flags.multirun, place=next(iter(flags.config_dir), None),
                            name=flags.config_name)  # fmt: skip
        if flags.cfg or flags.info or flags.shell_completion:
            show(composer, flags)
        elif flags.multirun:
            session.all(composer)
        elif composer.settings:
            raise ConfigError(f"{composer.settings[0]} says how the jobs of a sweep run: add -m")
        else:
            session.one(composer)
    except (HydraException, OmegaConfBaseException) as error:
        keys = composer.keys if composer else Composer().keys
        return session.end(not_installed(error) or explain(error, keys, argv))
    except OSError as error:
        code = session.end(cause(error))
        return TERMINATED if full(error) else code
    except (UserError, ValueError) as error:
        return session.end(str(error).splitlines()[0])
    except KeyboardInterrupt:
        if session.sweep is None:
            return INTERRUPTED
        session.sweep.request_stop(signal.SIGINT)
    except Exception as error:
        if session.here:
            raise
        chosen = session.sweep.launcher if session.sweep else ""
        return session.end(f"hydra/launcher={chosen}: {type(error).__name__}: {error}".splitlines()[0])
    return session.end()


def show(composer: Composer, flags: argparse.Namespace) -> None:
    """Print the config, what Hydra says of it, or what completes a word."""
    hydra, words = GlobalHydra.instance().hydra, composer.words
    assert hydra is not None
    if flags.shell_completion:
        if "searchpath" not in os.environ.get("COMP_LINE", ""):  # Hydra would import what stands there
            hydra.shell_completion(flags.config_name, words)
        return
    config, own = composer.config(words), composer.hydra(words)
    if flags.info:
        hydra.show_info(flags.info, flags.config_name, [*composer.settings, *words])
        return
    node: Any = config if flags.cfg == "job" else OmegaConf.create({"hydra": own})
    if flags.cfg == "all":
        node = OmegaConf.create({**config, "hydra": own})
    if package := flags.package:
        node = OmegaConf.select(node, package)
        if node is None:
            raise ConfigError(f"--package {package}: no such part.{nearest(package, map(str, config))}")
    if not OmegaConf.is_config(node):
        say(str(node))
        return
    if flags.resolve:
        OmegaConf.resolve(node)
    say((f"# @package {package}\n" if package else "") + OmegaConf.to_yaml(node).rstrip())


def full(error: OSError) -> bool:
    """Whether a disk has no room for a file: the same command goes on when it has. (Standard output has no name.)"""
    return error.errno in FULL and error.filename is not None


def not_installed(error: BaseException) -> str | None:
    """How to get the launcher that was chosen, if that is what is missing."""
    missing = error.missing_cfg_file if isinstance(error, MissingConfigException) else None
    name = (missing or "").removeprefix("hydra/launcher/")
    return (
        f"hydra/launcher={name} is not installed: pip install 'caspr-cli[{EXTRAS[name]}]'" if name in EXTRAS else None
    )


if __name__ == "__main__":
    sys.exit(main())
