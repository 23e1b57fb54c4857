"""``caspr-train``: compose a recipe, run it, and report the result. Never imports torch."""

import argparse
import os
import re
import shlex
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
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caspr_cli import __version__
from caspr_cli.commands import new, topics
from caspr_cli.common import plugins
from caspr_cli.common.errors import WIDEST, Parser, UserError, nearest
from caspr_cli.common.exits import BAD_USAGE, INTERRUPTED, OK, RUN_FAILED, SOME_FAILED, TERMINATED
from caspr_cli.common.format import terminal_width, wrapped
from caspr_cli.common.streams import TerminatedError, cause, complain, console_script, say, terminable
from caspr_cli.optim.registry import OPTIMIZERS
from caspr_cli.recipe.composer import Composer
from caspr_cli.recipe.configs import choices, described
from caspr_cli.recipe.errors import ConfigError, explain
from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs import provenance
from caspr_cli.runs.experiment import Experiment, StoppedError, damaged, rows, seconds, sweeps
from caspr_cli.runs.experiment import plan as plan_of
from caspr_cli.runs.record import FULL, RecordDamagedError
from caspr_cli.runs.session import Session
from caspr_cli.runs.sweep import EXTRAS, new_folder
from caspr_cli.tasks.registry import TASKS

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")

MISTAKES = (HydraException, OmegaConfBaseException, OSError, UserError)  # of the user, or of the machine
TOP_KEYS = {f.name for f in fields(Recipe)}
SEVERITY = (OK, RUN_FAILED, SOME_FAILED, BAD_USAGE, TERMINATED, INTERRUPTED)  # rising

HELP = """\
caspr-train {version}: train a task with an optimizer, and keep a record of it

  caspr-train task=c4_lm optim=caspr                     one run
  caspr-train -m optim=caspr,shampoo,adamw seed=0,1,2    a sweep, and a table
  caspr-train -m search=lr trial='range(6)'              six trials of a search
  caspr-train search=lr trial=best seed=1 optim=caspr    the best of them again
  caspr-train experiment=c4_14m plan=true                the plan of a table
  caspr-train scale=paper task.data=files task.root=DIR  the paper's size

tasks
{tasks}
optimizers
{optimizers}
scales
{scales}
{experiments}
keys     any key of the recipe as key=value; all of them: caspr-train --cfg job
{searches}
flags    -m sweep (hydra/launcher=joblib, slurm, ray)   --cfg job
         debug=fast 20 steps   debug=plan trains nothing
own      caspr-train new task NAME, new optimizer NAME
tab      eval "$(caspr-train -sc install=bash)"
exits    0 done   1 the run failed   2 bad usage   3 some jobs of a sweep failed
         130, 143 interrupted
see      caspr-train help {topics}
         caspr-report --help
"""


def usage() -> str:
    kinds = {  # each choice with its line and, if it is not ours, its package
        "task": {name: (each.about, plugins.package(plugins.TASKS, name)) for name, each in TASKS.items()},
        "optim": {name: (each.about, plugins.package(plugins.OPTIMIZERS, name)) for name, each in OPTIMIZERS.items()},
        **{group: described(group) for group in ("scale", "search", "experiment")},
    }

    def ours(kind: str) -> dict[str, str]:
        return {name: about for name, (about, package) in kinds[kind].items() if package is None}

    def listing(kind: str) -> str:
        return "\n".join(hanging(f"  {name:<14} {about}", 17) for name, about in ours(kind).items())

    searches = ", ".join(name for name in ours("search") if name != "none")
    text = HELP.format(
        version=__version__,
        tasks=listing("task"),
        optimizers=listing("optim"),
        scales=listing("scale"),
        searches=hanging(f"         search ({searches}) trial trainer.max_steps optim.lr seed resume output_dir", 9),
        experiments=hanging(f"tables   experiment={', '.join(ours('experiment'))}", 9),
        topics=" | ".join(topics.titles()),
    )
    others: dict[str, str] = {}
    for kind, found in kinds.items():
        for name, (about, package) in found.items():
            if package is not None:
                line = f"  {kind + '=' + name:<24} {about}".rstrip()
                others[package] = f"{others.get(package, f'of {package}')}\n{line}"
    return text + "".join(f"{lines}\n" for lines in others.values())


def hanging(text: str, indent: int) -> str:
    """Return a text in lines as wide as the terminal, at most ``WIDEST``, of which all but the first are indented."""
    width = min(terminal_width(80), WIDEST)
    return textwrap.fill(text, width, subsequent_indent=" " * indent, break_on_hyphens=False)


@console_script
@terminable()
def main() -> int:
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print(usage(), end="")
        return OK
    if "--version" in argv:
        print(f"caspr-train {__version__}")
        return OK
    if argv[:1] == ["new"]:
        new.main(argv[1:])
        return OK
    try:
        if argv[:1] == ["help"]:
            topics.show(argv[1:])
            return OK
        named, argv = experiments(argv)
        if named:
            given = [word for word in argv if not word.startswith("plan=")]
            asked = [Experiment.read(name, given) for name in named]  # all, before any of them runs
            return one_after_the_other(partial(tables, each, argv) for each in asked)
    except (*MISTAKES, RecordDamagedError) as error:
        complain(reason(error, lambda: Composer(argv, sweeps=True).keys(), argv))
        return TERMINATED if full(error) else BAD_USAGE
    except StoppedError as stopped:
        return TERMINATED if stopped.number == signal.SIGTERM else INTERRUPTED
    return compose_and_run(argv)


def experiments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the names of the experiments, and the other words."""
    named = [word for word in argv if word.startswith("experiment=")]
    rest = [word for word in argv if word not in named]
    for word in rest if named else ():
        key, _, value = word.partition("=")
        if word.startswith("-") or "=" not in word:
            raise ConfigError(f"{word}: with experiment=NAME give keys as key=value alone (it sweeps without -m)")
        if key.startswith(("+", "~")):
            raise ConfigError(f"{word}: with experiment=NAME give keys as key=value alone, without {key[0]}")
        if key == "trial":
            raise ConfigError(f"{word}: an experiment runs all of its trials; search.trials=N says how many")
        if key == "plan" and value.lower() not in ("true", "false"):
            raise ConfigError(f"plan should be true or false but is '{value}'")
        if key == "debug" and value == "plan":
            raise ConfigError("debug=plan is for a single run; for an experiment use plan=true")
    return [name for word in named for name in word.partition("=")[2].split(",")], rest


def tables(experiment: Experiment, argv: list[str]) -> int:
    """Run one experiment: print its plan and duration, tune, run the seeds, report. Return the exit code."""
    plans = [word for word in argv if word.startswith("plan=")]
    folder = Path(experiment.output_dir)  # refuses several directories before anything is printed
    command = ["caspr-train", f"experiment={experiment.name}", *(word for word in argv if word not in plans)]
    say(f"caspr-train {__version__}  experiment={experiment.name}: {choices('experiment')[experiment.name]}")
    planned_only = plans != [] and plans[-1].lower() == "plan=true"
    table, took = rows(experiment), list[float | str]()
    if not planned_only:
        new_folder(folder, experiment.output_dir).rmdir()  # refused now and not after the timing
    for number, row in enumerate(table, 1):
        say(f"timing   row {number} of {len(table)}: {row.label}")
        try:
            took.append(seconds(row, command))
        except ConfigError as error:
            if not planned_only:
                raise ConfigError(f"{row.label}: {error}") from error
            took.append(str(error))
    for line in [*plan_of(experiment, table, took), *damaged(table)]:
        for part in wrapped(line, terminal_width()):
            say(part)
    if planned_only:
        say(f"next     {shlex.join(command)}")
        return OK
    code = one_after_the_other(partial(announced, *sweep) for sweep in sweeps(experiment, table))
    if code in (INTERRUPTED, TERMINATED):
        say(f"stopped  the same command goes on:\nnext     {shlex.join(command)}")
    elif code != BAD_USAGE:
        report(experiment)
    return code


def announced(line: str, sweep: list[str]) -> int:
    """Print what a sweep is for, and run it. Return its exit code."""
    say(f"\n{line}")
    return compose_and_run(["-m", *sweep], brief=True)


def report(experiment: Experiment) -> None:
    """Compare the runs of a table that have ended, on the terminal and in a page beside the records."""
    from caspr_cli.common.files import write_output
    from caspr_cli.report import records, terminal  # slow to import, and not needed before
    from caspr_cli.report.compare import tables
    from caspr_cli.report.page import compared

    folder = Path(experiment.output_dir)
    command, page = ["caspr-report", "compare", str(folder)], folder / "report.html"
    try:
        runs = records.find([folder]).runs
        try:
            made = tables(runs, baseline=experiment.baseline)
            command += ["--baseline", experiment.baseline] if experiment.baseline else []
        except UserError:  # the command line has left this row out
            made = tables(runs)
        say("")
        columns, bold = terminal_width(120), sys.stdout.isatty()
        for line in terminal.compared(made, runs, [folder], columns, bold=bold):
            say(line)
        write_output(page, compared(made, shlex.join([*command, "--to", str(page)])))
        say(f"wrote    {page}")
    except UserError as error:
        complain(str(error))


def one_after_the_other(commands: Iterable[Callable[[], int]]) -> int:
    """Run commands until one is interrupted or refused. Return the most severe exit code."""
    codes = []
    for command in commands:
        codes.append(command())
        if codes[-1] not in (OK, SOME_FAILED):
            break
    return max(codes, key=SEVERITY.index)


def flags_of(argv: list[str]) -> argparse.Namespace:
    """Return the flags, and the other words as ``words``; they may stand in any order. Raises UserError."""
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
    found, found_words = argparse.ArgumentParser.parse_known_args(parser, argv)
    for word in found_words:
        check_word(word, re.findall(r"--[\w-]+", parser.format_usage()))
    if found.multirun + found.run + bool(found.cfg) + bool(found.info) + found.shell_completion > 1:
        raise ConfigError("one of -m, -r, --cfg, --info and -sc at a time")
    if (found.resolve or found.package) and not found.cfg:
        raise ConfigError("--resolve and --package go with --cfg")
    if len(found.config_dir) > 1:
        raise ConfigError(f"-cd is given {len(found.config_dir)} times: one directory can be read")
    found.words = found_words
    return found


def check_word(word: str, flags: list[str]) -> None:
    """Refuse a word that is a mistyped flag, a key written as a flag, or the name of a group."""
    key, _, value = word.lstrip("-+~").partition("=")
    if word.startswith("-") and (key.partition(".")[0] in TOP_KEYS or key in ("lr", "steps", "epochs")):
        raise ConfigError(f"{word} is not a flag: keys are written key=value, as in optim=caspr optim.lr=1e-3")
    if word.startswith("-"):
        raise ConfigError(f"{word} is not a flag.{nearest(word, flags)} (caspr-train --help)")
    if key in ("task.name", "optim.name"):
        raise ConfigError(f"{word}: choose with {key.removesuffix('.name')}={value}")


def compose_and_run(argv: list[str], *, brief: bool = False) -> int:
    """Run a command line: a run, a sweep (``brief``: a line a job), or a print of the config. Return the exit code."""
    session, composer = Session(["caspr-train", *argv], brief=brief), None
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
    except (*MISTAKES, ValueError) as error:
        code = session.end(reason(error, composer.keys if composer else lambda: Composer().keys(), argv))
        return TERMINATED if full(error) else code
    except KeyboardInterrupt as stop:
        by_user = not isinstance(stop, TerminatedError)
        if session.sweep is None:
            return INTERRUPTED if by_user else TERMINATED
        session.sweep.request_stop(signal.SIGINT if by_user else signal.SIGTERM)
    except Exception as error:
        if session.here:
            raise
        chosen = session.sweep.launcher if session.sweep else ""
        return session.end(f"hydra/launcher={chosen}: {type(error).__name__}: {error}".splitlines()[0])
    return session.end()


def show(composer: Composer, flags: argparse.Namespace) -> None:
    """Print the config, Hydra's information about it, or the completions of a word."""
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


def reason(error: Exception, keys: Callable[[], DictConfig], argv: list[str]) -> str:
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return not_installed(error, argv) or explain(error, keys, argv)
    return cause(error) if isinstance(error, OSError) else str(error).splitlines()[0]


def full(error: Exception) -> bool:
    """Return whether a file did not fit on a disk, after which the command can go on. (Standard output has no name.)"""
    return isinstance(error, OSError) and error.errno in FULL and error.filename is not None


def not_installed(error: BaseException, argv: list[str]) -> str | None:
    """Return what to install: the chosen launcher, or the package that brought a task or optimizer to a record."""
    file = error.missing_cfg_file if isinstance(error, MissingConfigException) else None
    group, _, name = (file or "").rpartition("/")
    if group == "hydra/launcher" and name in EXTRAS:
        return f"hydra/launcher={name} is not installed: pip install 'caspr-cli[{EXTRAS[name]}]'"
    if group not in ("task", "optim") or not name:
        return None
    given = [word.partition("=")[2] for word in argv if word.startswith("output_dir=")]
    return provenance.missing(Path(given[-1] if given else Recipe.output_dir), group, name)


if __name__ == "__main__":
    sys.exit(main())
