"""One command line of ``caspr-train``: its jobs, and what is said of them on the terminal."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from socket import gethostname as host
from typing import cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caspr_cli import __version__
from caspr_cli.common.streams import complain, say
from caspr_cli.recipe import compose, search
from caspr_cli.recipe.composer import Composer
from caspr_cli.recipe.errors import ConfigError, explain
from caspr_cli.recipe.schema import Recipe, Resume
from caspr_cli.runs import elsewhere, summary, trials
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


@dataclass
class Session:
    """One command line. It goes through pickle to wherever its jobs run."""

    command: list[str]
    sweep: Sweep | None = None
    only: Job | None = None  # what came of it where it is no sweep
    best: dict[tuple[str, ...], int] = field(default_factory=dict)  # trial of each row whose trials have ended

    @property
    def here(self) -> bool:
        """Whether jobs run in this process and may print."""
        return self.sweep is None or self.sweep.here

    def one(self, composer: Composer) -> None:
        """Run the job of a command line that is no sweep."""
        self.only = self.run(composer.config(composer.words), Job(1, composer.words))

    def all(self, composer: Composer) -> None:
        """Run the jobs of a sweep: here, one after the other, or elsewhere.

        Raises:
            ConfigError: the sweep is refused as a whole.
        """
        if not (jobs := composer.jobs()):
            raise ConfigError("a sweep over no value: there is nothing to run")
        composer.check(jobs)
        self.sweep = Sweep.begin(composer, jobs)
        if not self.sweep.here:
            ours = self.sweep.launcher == "joblib"  # its processes are this one's children
            with guarded(self.sweep.folder) if ours else nullcontext(), self.watch(self.sweep):
                elsewhere.launch(self.sweep, jobs, self.job, verbose=composer.hydra(jobs[0]).verbose)
            return
        for number, words in enumerate(jobs, 1):
            if self.sweep.asked():
                return
            say(f"\njob {number}: {' '.join(words)}")
            self.note(self.run(composer.config(words), Job(number, words)))

    def job(self, _: DictConfig) -> None:
        """Called by a launcher for each job, in whatever process."""
        assert self.sweep is not None
        if self.sweep.asked():
            return
        told = HydraConfig.get()
        number = told.job.num + 1
        os.chdir(self.sweep.directory)  # where the command was typed: all paths begin there
        self.note(self.run(self.sweep.config(number), Job(number, list(told.overrides.task))))

    def note(self, job: Job) -> None:
        """Keep what came of a job, for the table."""
        assert self.sweep is not None
        with suppress(OSError):  # a full disk: the job counts as lost, which the same command continues
            self.sweep.note(job)

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
            why = explain(error, lambda: Composer().keys(), job.overrides)
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

    def chosen(self, config: DictConfig, job: Job) -> int | None:
        """What trial=best stands for."""
        if config.trial != "best" or config.search.name is None:
            return None
        row = tuple(word for word in job.overrides if not word.startswith("seed="))
        if row not in self.best:  # once it is known it stays: all trials have ended
            tuning = cast(DictConfig, OmegaConf.merge(config, {"seed": trials.TUNING_SEED}))
            self.best[row] = trials.best(partial(compose.freeze, tuning, job.overrides))
        return self.best[row]

    def launch(self, recipe: Recipe, job: Job, place: Place) -> Outcome:
        """Run it; where another job of the sweep does the same run, after that."""
        brief = self.sweep is not None and plan(recipe, Record.of(recipe)) == "skip"
        if self.here and brief:
            say(f"record   {Record.of(recipe).path} (done)")
        elif self.here:
            self.announce(recipe, job.overrides)
        while True:
            try:
                outcome = run(recipe, self.command, place)
                break
            except RecordBusyError:
                if not (self.sweep and self.sweep.twin(job)) or self.sweep.asked():
                    raise
                time.sleep(LOOK)
        if self.here and not brief:
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
