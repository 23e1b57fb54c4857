"""One command line of ``caspr-train``: its jobs, and what is printed about them."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from socket import gethostname as host

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from caspr_cli import __version__
from caspr_cli.common.exits import BAD_USAGE, INTERRUPTED, OK, RUN_FAILED, SOME_FAILED, TERMINATED
from caspr_cli.common.format import Progress, terminal_width
from caspr_cli.common.streams import complain, keep_imports_out_of_the_working_directory, say
from caspr_cli.recipe import compose, search
from caspr_cli.recipe.composer import Composer
from caspr_cli.recipe.errors import ConfigError, explain
from caspr_cli.recipe.schema import Recipe, Resume, Source
from caspr_cli.runs import elsewhere, summary, trials
from caspr_cli.runs.guardian import guarded
from caspr_cli.runs.here import refuse_here
from caspr_cli.runs.launch import Allocation, Outcome, plan, preflight, run
from caspr_cli.runs.processes import memory_error
from caspr_cli.runs.record import FULL, Record, RecordBusyError, RecordDamagedError
from caspr_cli.runs.sweep import ENDED, LOOK, LOST, REFUSED, STARTED, WAITING, Job, Sweep, watching


@dataclass
class Session:
    """One command line; launchers pickle it for the processes in which they run its jobs."""

    command: list[str]
    sweep: Sweep | None = None
    only: Job | None = None  # the job of a command line that is no sweep, when it has ended
    brief: bool = False  # one line a job, when it has ended
    began: float = field(default_factory=time.monotonic)
    searches: dict[tuple[str, ...], trials.Tuning] = field(default_factory=dict)  # that its jobs have asked for

    @property
    def here(self) -> bool:
        """Whether jobs run in this process and may print."""
        return self.sweep is None or self.sweep.here

    def one(self, composer: Composer) -> None:
        """Run the job of a command line that is no sweep."""
        self.only = self.run(composer.config(composer.words), Job(1, composer.words))

    def all(self, composer: Composer) -> None:
        """Run the jobs of a sweep: here, one after the other, or elsewhere. Raises ConfigError if all are refused."""
        if not (jobs := composer.jobs()):
            raise ConfigError("a sweep over no value: there is nothing to run")
        composer.check(jobs)
        self.sweep = Sweep.begin(composer, jobs)
        if not self.sweep.here:
            children = self.sweep.launcher == "joblib"  # its processes are children of this one
            with guarded(self.sweep.folder) if children else nullcontext(), self.watch(self.sweep):
                elsewhere.launch(self.sweep, jobs, self.job, verbose=composer.hydra(jobs[0]).verbose)
            return
        names = summary.names(self.sweep.jobs())
        for number, words in enumerate(jobs, 1):
            if self.sweep.stop_requests():
                return
            left = summary.left(self.sweep.jobs(), time.monotonic() - self.began)
            if self.brief:
                self.waiting.say(f"job {number} of {len(jobs)}{left}  {names[number - 1]}")
            else:
                say(f"\njob {number} of {len(jobs)}{left}: {' '.join(words)}")
            self.note(job := self.run(composer.config(words), Job(number, words)))
            if self.brief and self.sweep.folder.exists():
                self.ended(job, names[number - 1])

    @property
    def waiting(self) -> Progress:
        """The line of a job that runs, on a terminal."""
        return Progress(sys.stdout)

    def ended(self, job: Job, name: str) -> None:
        """Print the only line of a job, when it has ended."""
        assert self.sweep is not None
        jobs = self.sweep.jobs()
        left = summary.left(jobs, time.monotonic() - self.began)
        self.waiting.clear()
        say("  ".join(filter(None, [f"job {job.number} of {len(jobs)}{left}", name, *summary.brief(job)])))

    def job(self, _: DictConfig) -> None:
        """Run one job of a sweep; a launcher calls this in a process of its own."""
        assert self.sweep is not None
        if self.sweep.stop_requests():
            return
        keep_imports_out_of_the_working_directory()  # a cluster may not have handed the environment on
        hydra = HydraConfig.get()
        number = hydra.job.num + 1
        os.chdir(self.sweep.directory)  # where the command was typed: all paths begin there
        self.note(self.run(self.sweep.config(number), Job(number, list(hydra.overrides.task))))

    def note(self, job: Job) -> None:
        """Keep how a job ended, for the table."""
        assert self.sweep is not None
        with suppress(OSError):  # a full disk: the job counts as lost, which the same command continues
            self.sweep.note(job)

    def run(self, config: DictConfig, job: Job) -> Job:
        """Run a job and return how it ended. In a sweep nothing is raised: a job that fails ends no other."""
        exit_code = BAD_USAGE
        try:
            recipe = compose.freeze(trials.resolve(config, job.overrides, self.searches), job.overrides)
            if recipe.debug == "plan":
                return self.plan(recipe, job)
            with self.sweep.allocation(recipe) if self.sweep else nullcontext(Allocation()) as allocation:
                job = replace(job, state=STARTED, record=str(Record.of(recipe).path), host=host(), process=os.getpid())
                if self.sweep:
                    self.sweep.note(job)
                outcome = self.launch(recipe, job, allocation)
            if self.sweep and self.here and outcome.signal:
                self.sweep.request_stop(outcome.signal)
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
        if self.here and not self.brief:
            complain(why)
        return replace(job, state=REFUSED, exit_code=exit_code, why=why)

    def launch(self, recipe: Recipe, job: Job, allocation: Allocation) -> Outcome:
        """Run a recipe, after another job of the sweep that does the same run; print its header and footer."""
        brief = self.brief or (self.sweep is not None and plan(recipe, Record.of(recipe)) == "skip")
        if self.brief and self.sweep:
            allocation = replace(allocation, brief=f"job {job.number} of {len(self.sweep.jobs())}")
        elif self.here:
            say(f"record   {Record.of(recipe).path} (done)") if brief else self.announce(recipe, job.overrides)
        while True:
            try:
                outcome = run(recipe, self.command, allocation)
                break
            except RecordBusyError:
                if not (self.sweep and self.sweep.twin(job)) or self.sweep.stop_requests():
                    raise
                time.sleep(LOOK)
        if self.here and not brief:
            lines = summary.footer(outcome, anew=recipe.resume == Resume.never)
            if outcome.exit_code == OK and self.sweep is None:
                lines += summary.next_commands(recipe, self.command)
            for line in lines:
                say(line)
        return outcome

    @staticmethod
    def announce(recipe: Recipe, overrides: list[str]) -> None:
        """Print what will be run, and where its record is."""
        record = Record.of(recipe)
        todo = {"new": "new", "continue": "continues", "skip": "done", "failed": "failed before"}[plan(recipe, record)]
        say(f"{_title(recipe)} seed={recipe.seed}")
        if given := [o for o in overrides if o.partition("=")[0] not in ("task", "optim", "scale", "seed")]:
            say(f"given    {' '.join(given)}")
        if recipe.search.name:
            values = [f"{key}={value}" for key, value in search.drawn(compose.to_plain(recipe)).items()]
            say(f"search   {recipe.search.name}, trial {recipe.trial}: {' '.join(values)}")
        elif recipe.task.data == Source.files and not any(o.startswith("optim.lr=") for o in overrides):
            rate = f"optim.lr={recipe.optim.lr:g}"
            say(f"untuned  {rate} was not tuned for these data: try -m search=lr trial='range(6)'")
        say(f"record   {record.path} ({todo})")
        if todo in ("new", "continues"):
            refuse_here(recipe)
            say("start    importing torch takes some seconds")

    def plan(self, recipe: Recipe, job: Job) -> Job:
        """Return a job of ``debug=plan``, with its table."""
        title = f"{_title(recipe)}  (debug=plan: nothing is trained)"
        if self.here:
            say(title)
            say("start    importing torch takes some seconds")
        code, text = preflight(recipe)
        if self.here:
            say(text.rstrip())
        return replace(job, state=ENDED, exit_code=code, text=f"{title}\n{text}".rstrip())

    @contextmanager
    def watch(self, sweep: Sweep) -> Iterator[None]:
        """Print a line when a job that runs elsewhere starts, and when it ends."""
        jobs = sweep.jobs()
        names = dict(zip((job.number for job in jobs), summary.names(jobs), strict=True))

        def name(job: Job) -> str:
            return f"job {job.number} of {len(jobs)}: {names.get(job.number) or ' '.join(job.overrides)}"

        def started(job: Job) -> None:
            if not self.brief:
                say(f"start    {name(job)}")

        def ended(job: Job) -> None:
            if self.brief:
                return self.ended(job, names.get(job.number, ""))
            state, result, where = summary.result_of(job)
            say("  ".join(part for part in (f"{state:<7}", name(job), result, where) if part))
            if job.text:
                say(job.text)

        at_once = f", {sweep.at_once} at a time" if sweep.at_once else ""
        say(f"caspr-train {__version__}  {len(jobs)} jobs{at_once} (hydra/launcher={sweep.launcher})")
        with watching(sweep, started, ended):
            yield

    def end(self, problem: str | None = None) -> int:
        """Print the problem, if any, and the table of a sweep; return the exit code."""
        if problem:
            complain(problem)
        if self.sweep is None:
            if problem:
                return BAD_USAGE
            return OK if self.only is None or self.only.exit_code is None else self.only.exit_code
        if not self.sweep.folder.exists():  # and with it how the jobs ended
            if not problem:
                complain(f"{self.sweep.output_dir} was removed while jobs ran; the same command begins anew")
            return TERMINATED
        requests, left_alone = self.sweep.stop_requests(), self.sweep.at_once is None and problem is not None
        jobs = [
            replace(job, state=LOST) if job.state == STARTED and (not left_alone or self.sweep.lost(job)) else job
            for job in self.sweep.jobs()
        ]
        self.sweep.end(whole=bool(requests) or not left_alone)
        began = any(job.state != WAITING for job in jobs)
        if began and (len(jobs) > 1 or not self.here):
            lines = summary.table(jobs)[:1] if self.brief else ["", *summary.table(jobs, terminal_width())]
            if not self.brief and any(job.exit_code == OK and job.record for job in jobs):
                lines += summary.after_sweep(self.sweep.output_dir)
            for line in lines:
                say(line)
        if requests:
            return INTERRUPTED if requests[0] == signal.SIGINT else TERMINATED
        if not began:
            if not problem:
                complain("a sweep over no value: there is nothing to run")
            return BAD_USAGE
        codes = [SOME_FAILED if job.exit_code is None else job.exit_code for job in jobs]
        return codes[0] if len(codes) == 1 else SOME_FAILED if any(codes) else OK


def _title(recipe: Recipe) -> str:
    return f"caspr-train {__version__}  task={recipe.task.name} optim={recipe.optim.name} scale={recipe.scale}"
