"""One command line of ``caspr-train``: its jobs, and what is said of them on the terminal."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from socket import gethostname as host
from typing import Any, cast

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caspr_cli import __version__
from caspr_cli.recipe import compose, search
from caspr_cli.recipe.errors import ConfigError, explain
from caspr_cli.recipe.schema import Recipe, Resume
from caspr_cli.runs import summary, trials
from caspr_cli.runs.guardian import guarded
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
from caspr_cli.runs.record import FULL, Record, RecordBusyError, RecordDamagedError, memory_error
from caspr_cli.runs.sweep import ENDED, LOOK, LOST, REFUSED, STARTED, WAITING, Job, Sweep, watching
from caspr_cli.streams import complain, say


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
                    if self.sweep.launcher == "joblib":  # whose processes are this one's
                        parent.enter_context(guarded(self.sweep.folder))
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
            done = self.run(config, replace(job, number=HydraConfig.get().job.num + 1))
            with suppress(OSError):  # a full disk: the job counts as lost, which the same command continues
                self.sweep.note(done)

    def run(self, config: DictConfig, job: Job) -> Job:
        """What came of a job. In a sweep nothing is raised: one job's end is no other's."""
        exit_code = BAD_USAGE
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
            if memory := memory_error(error):
                why = f"too little memory: {memory}"
            if memory or error.errno in FULL:
                exit_code, why = TERMINATED, f"{why}; the same command continues"
        except Exception as error:
            if self.sweep is None:
                raise
            traceback.print_exc()
            return replace(job, state=ENDED, exit_code=RUN_FAILED, why=f"{type(error).__name__}: {error}")
        if self.here:
            complain(why)
        return replace(job, state=REFUSED, exit_code=exit_code, why=why)

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
            for line in summary.footer(outcome, anew=recipe.resume == Resume.never):
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
            if not problem:
                complain("a sweep over no value: there is nothing to run")
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
