"""``caspr-train``: compose a recipe, run it, say what came of it. Never imports torch."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from socket import gethostname as host
from typing import Any, cast

import hydra
import hydra._internal.hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caspr_cli import __version__
from caspr_cli.recipe import compose, search
from caspr_cli.recipe.errors import ConfigError, explain, nearest
from caspr_cli.recipe.schema import Recipe
from caspr_cli.runs import summary, trials
from caspr_cli.runs.experiment import Experiment, StoppedError, rows, seconds
from caspr_cli.runs.experiment import plan as plan_of
from caspr_cli.runs.launch import (
    BAD_USAGE,
    INTERRUPTED,
    OK,
    RUN_FAILED,
    SOME_FAILED,
    TERMINATED,
    Outcome,
    Place,
    plan,
    preflight,
    run,
)
from caspr_cli.runs.record import Record, RecordBusyError, RecordDamagedError
from caspr_cli.runs.sweep import ENDED, EXTRAS, LOOK, LOST, REFUSED, STARTED, WAITING, Job, Sweep, new_folder, watching

# Hydra's own flags; those with a value take the next word.
FLAGS = {"-m", "--multirun", "-r", "--run", "-c", "--cfg", "--resolve", "-p", "--package", "-i", "--info", "-cd",
         "--config-dir", "-cn", "--config-name", "-sc", "--shell-completion", "--version", "--hydra-help"}  # fmt: skip
WITH_VALUE = {"-c", "--cfg", "-p", "--package", "-cd", "--config-dir", "-cn", "--config-name", "-i", "--info", "-sc",
              "--shell-completion"}  # fmt: skip

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
         search ({searches}) trial trainer.max_steps trainer.devices optim.lr seed resume output_dir
flags    -m sweep (hydra/launcher=joblib, slurm, ray)   --cfg job   debug=fast 20 steps   debug=plan
tab      completion: eval "$(caspr-train -sc install=bash)"
exits    0 done   1 the run failed   2 bad usage   3 some jobs of a sweep failed   130, 143 interrupted
see      caspr-report --help   tensorboard --logdir outputs
"""


@dataclass
class Session:
    """One command line. It goes through pickle to wherever its jobs run."""

    command: list[str]
    sweep: Sweep | None = None
    only: Job | None = None  # what came of it where it is no sweep

    @property
    def here(self) -> bool:
        """Whether jobs run in this process and may print."""
        return self.sweep is None or self.sweep.here

    def begin(self, parent: ExitStack, config: DictConfig | None = None, **other: Any) -> Callbacks:
        """In place of Hydra's callbacks: none, and a look at the config before anything of it is built."""
        if config is not None:
            refuse_code(config)
            if config.hydra.mode == hydra.types.RunMode.MULTIRUN:
                self.sweep = Sweep.begin(config)
                if not self.sweep.here:
                    parent.enter_context(self.watch(self.sweep))
        return Callbacks()

    def job(self, config: DictConfig) -> None:
        """Called by Hydra for each job, in whatever process."""
        job = Job(1, list(HydraConfig.get().overrides.task))
        if self.sweep is None:
            self.only = self.run(config, job)
        elif not self.sweep.asked():
            if self.here:
                say(f"\njob {HydraConfig.get().job.num + 1}: {' '.join(job.overrides)}")
            else:
                os.chdir(self.sweep.directory)
            self.sweep.note(self.run(config, replace(job, number=HydraConfig.get().job.num + 1)))

    def run(self, config: DictConfig, job: Job) -> Job:
        """What came of a job. In a sweep nothing is raised: one job's end is no other's."""
        try:
            recipe = compose.freeze(config, job.overrides, self.chosen(config, job))
            if recipe.debug == "plan":
                return self.plan(recipe, job)
            with self.sweep.place(recipe) if self.sweep else nullcontext(Place()) as place:
                job = replace(job, state=STARTED, record=str(Record.of(recipe).path), host=host(), process=os.getpid())
                if self.sweep:
                    self.sweep.note(job)
                outcome = self.launch(recipe, job, place)
            if self.sweep and self.here and outcome.told:
                self.sweep.ask(outcome.told)
            return replace(job, state=ENDED, exit_code=outcome.exit_code, ran=outcome.ran)
        except (ConfigError, RecordBusyError, RecordDamagedError) as error:
            why = str(error)
        except OmegaConfBaseException as error:
            why = explain(error, keys_of(self.command), self.command)
        except OSError as error:
            why = f"output_dir={config.output_dir}: cannot write there: {error}"
        except Exception as error:
            if self.sweep is None:
                raise
            traceback.print_exc()
            return replace(job, state=ENDED, exit_code=RUN_FAILED, why=f"{type(error).__name__}: {error}")
        if self.here:
            complain(why)
        return replace(job, state=REFUSED, exit_code=BAD_USAGE, why=why)

    @staticmethod
    def chosen(config: DictConfig, job: Job) -> int | None:
        """What trial=best stands for."""
        if config.trial != "best" or config.search.name is None:
            return None
        tuning = OmegaConf.merge(config, {"seed": trials.TUNING_SEED})
        return trials.best(partial(compose.freeze, cast(DictConfig, tuning), job.overrides))

    def launch(self, recipe: Recipe, job: Job, place: Place) -> Outcome:
        """Run it; where another job of the sweep does the same run, after that."""
        if self.here:
            self.announce(recipe, job.overrides)
        while True:
            try:
                outcome = run(recipe, self.command, place)
                break
            except RecordBusyError:
                if not (self.sweep and self.sweep.twin(job)) or self.sweep.asked():
                    raise
                time.sleep(LOOK)
        if self.here:
            for line in summary.footer(outcome):
                say(line)
            if outcome.exit_code == OK and self.sweep is None:
                for line in summary.next_commands(recipe, self.command):
                    say(line)
        return outcome

    @staticmethod
    def announce(recipe: Recipe, overrides: list[str]) -> None:
        record = Record.of(recipe)
        todo = {"new": "new", "continue": "continues", "skip": "done", "failed": "failed before"}[plan(recipe, record)]
        say(f"caspr-train {__version__}  task={recipe.task.name} optim={recipe.optim.name} "
            f"scale={recipe.scale} seed={recipe.seed}")  # fmt: skip
        if given := [o for o in overrides if o.partition("=")[0] not in ("task", "optim", "scale", "seed")]:
            say(f"given    {' '.join(given)}")
        if recipe.search.name:
            values = [f"{key}={value}" for key, value in search.drawn(compose.to_plain(recipe)).items()]
            say(f"search   {recipe.search.name}, trial {recipe.trial}: {' '.join(values)}")
        say(f"record   {record.path} ({todo})")
        if todo in ("new", "continues"):
            say("start    importing torch and Lightning takes some seconds")

    def plan(self, recipe: Recipe, job: Job) -> Job:
        head = (
            f"caspr-train {__version__}  task={recipe.task.name} optim={recipe.optim.name} scale={recipe.scale}  "
            "(debug=plan: nothing is trained)"
        )
        code, text = preflight(recipe)
        job = replace(job, state=ENDED, exit_code=code, text=f"{head}\n{text}".rstrip())
        if self.here:
            say(job.text)
        return job

    @contextmanager
    def watch(self, sweep: Sweep) -> Iterator[None]:
        """Report jobs that run elsewhere, a line when one starts and when it ends."""
        jobs = sweep.jobs()
        names = dict(zip((job.number for job in jobs), summary.names(jobs), strict=True))

        def name(job: Job) -> str:
            return f"job {job.number}: {names.get(job.number) or ' '.join(job.overrides)}"

        def ended(job: Job) -> None:
            state, what, where = summary.result_of(job)
            say("  ".join(part for part in (f"{state:<7}", name(job), what, where) if part))
            if job.text:
                say(job.text)

        at_once = f", {sweep.at_once} at a time" if sweep.at_once else ""
        say(f"caspr-train {__version__}  {len(jobs)} jobs{at_once} (hydra/launcher={sweep.launcher})")
        with watching(sweep, lambda job: say(f"start    {name(job)}"), ended):
            yield

    def end(self, problem: str | None = None) -> int:
        """Print what is left to say. Returns the exit code."""
        if self.sweep is None:
            if problem:
                complain(problem)
                return BAD_USAGE
            return OK if self.only is None or self.only.exit_code is None else self.only.exit_code
        asked, left = self.sweep.asked(), self.sweep.at_once is None and problem is not None
        jobs = [
            replace(job, state=LOST) if job.state == STARTED and (not left or self.sweep.lost(job)) else job
            for job in self.sweep.jobs()
        ]
        self.sweep.end(whole=bool(asked) or not left)
        began = any(job.state != WAITING for job in jobs)
        if problem:
            complain(problem)
        if began and (len(jobs) > 1 or not self.here):
            say("")
            for line in summary.table(jobs):
                say(line)
            if any(job.exit_code == OK and job.record for job in jobs):
                for line in summary.after_sweep(self.sweep.output_dir):
                    say(line)
        if asked:
            return INTERRUPTED if asked[0] == signal.SIGINT else TERMINATED
        if not began:
            return BAD_USAGE
        codes = [SOME_FAILED if job.exit_code is None else job.exit_code for job in jobs]
        return codes[0] if len(codes) == 1 else SOME_FAILED if any(codes) else OK


def refuse_code(config: DictConfig) -> None:
    """Hydra builds callbacks, launchers and sweepers from ``_target_``: a config would run code of its choosing.

    Jobs in other processes are composed from the same files by Hydra, which builds none of these there.
    """
    if config.hydra.callbacks:
        raise ConfigError("hydra.callbacks would run code that a config chooses: not allowed")
    for part in ("launcher", "sweeper"):
        target = config.hydra[part]._target_
        if not target.startswith(("hydra._internal.", "hydra_plugins.")):
            raise ConfigError(f"hydra.{part}._target_={target} is none of Hydra's own: not allowed")


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
    compose.register_schemas()
    try:
        named, argv = experiments(argv)
        if named:
            told = [Experiment.read(name, [word for word in argv if not word.startswith("plan=")]) for name in named]
            return one_after_the_other(partial(tables, each, argv) for each in told)
    except (HydraException, OmegaConfBaseException) as error:
        complain(not_installed(error) or explain(error, keys_of(argv), argv))
        return BAD_USAGE
    except (ConfigError, RecordDamagedError, OSError) as error:
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
    command = ["caspr-train", f"experiment={told.name}", *(word for word in argv if word not in plans)]
    say(f"caspr-train {__version__}  experiment={told.name}: {compose.choices('experiment')[told.name]}")
    planned_only = plans[-1:] == ["plan=true"]
    table, took = rows(told), []
    if not planned_only:
        new_folder(Path(told.output_dir), told.output_dir).rmdir()  # better to know now than after the timing
    for number, row in enumerate(table, 1):
        say(f"timing   row {number} of {len(table)}: {row.label}")
        took.append(seconds(row, command))
    for line in plan_of(told, table, took):
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
    from caspr_cli.report import records, terminal  # slow to import, and not needed before
    from caspr_cli.report.errors import ReportError
    from caspr_cli.report.files import write_whole
    from caspr_cli.report.page import compared
    from caspr_cli.report.tables import tables

    folder = Path(told.output_dir)
    command, page = ["caspr-report", "compare", str(folder)], folder / "report.html"
    try:
        runs = records.find([folder]).runs
        try:
            made = tables(runs, baseline=told.baseline)
            command += ["--baseline", told.baseline] if told.baseline else []
        except ReportError:  # the command line has left this row out
            made = tables(runs)
        say("")
        for line in terminal.compared(made, runs, [folder], shutil.get_terminal_size((120, 24)).columns):
            say(line)
        write_whole(page, compared(made, shlex.join([*command, "--to", str(page)])))
        say(f"wrote    {page}")
    except ReportError as error:
        complain(str(error))


def one_after_the_other(commands: Iterable[Callable[[], int]]) -> int:
    """Run them until one is interrupted or refused. Returns the exit code that says most."""
    codes = []
    for command in commands:
        codes.append(command())
        if codes[-1] not in (OK, SOME_FAILED):
            break
    return max(codes, key=SEVERITY.index)


def compose_and_run(argv: list[str]) -> int:
    """What Hydra makes of a command line: one run, or a sweep. Returns the exit code."""
    session = Session(["caspr-train", *argv])
    decorated: Any = hydra.main(version_base="1.3", config_path=str(compose.CONF), config_name="train")
    try:
        sys.argv[1:] = arrange(argv)
        with ExitStack() as parent:
            hydra._internal.hydra.Callbacks = partial(session.begin, parent)  # type: ignore
            decorated(session.job)()
    except (HydraException, OmegaConfBaseException) as error:
        return session.end(not_installed(error) or explain(error, keys_of(argv), argv))
    except (ConfigError, ValueError, OSError) as error:
        return session.end(str(error).splitlines()[0])
    except KeyboardInterrupt:
        if session.sweep is None:
            return INTERRUPTED
        session.sweep.ask(signal.SIGINT)
    except Exception as error:
        if session.here:
            raise
        chosen = session.sweep.launcher if session.sweep else ""
        return session.end(f"hydra/launcher={chosen}: {type(error).__name__}: {error}".splitlines()[0])
    return session.end()


def not_installed(error: BaseException) -> str | None:
    """How to get the launcher that was chosen, if that is what is missing."""
    missing = error.missing_cfg_file if isinstance(error, MissingConfigException) else None
    name = (missing or "").removeprefix("hydra/launcher/")
    return (
        f"hydra/launcher={name} is not installed: pip install 'caspr-cli[{EXTRAS[name]}]'" if name in EXTRAS else None
    )


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
