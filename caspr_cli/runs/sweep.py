"""The jobs of one command line, wherever they run: in this process, beside it, or on a cluster.

Launchers run jobs in other processes and drop their results. So each job writes its progress into a file of its own, in
a folder that all of them see (``<output_dir>/.sweep/<id>/``), from which the command line reads what to print. The
folder also holds the requests to stop, and the slots by which the jobs of one machine share it.
"""

from __future__ import annotations

import _thread
import fcntl
import json
import math
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from caspr_cli.common.alive import lives
from caspr_cli.common.streams import say
from caspr_cli.recipe.composer import Composer
from caspr_cli.recipe.errors import ConfigError
from caspr_cli.recipe.schema import Accelerator, Recipe
from caspr_cli.runs.launch import STOP, Allocation
from caspr_cli.runs.processes import cores
from caspr_cli.runs.record import FULL, clear_left, own

WAITING, STARTED, ENDED, REFUSED, LOST = "waiting", "started", "ended", "refused", "lost"

# The extra of the package that installs each launcher.
EXTRAS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray"}
# A user or a launcher may set these; the jobs of one machine get a share each.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
LOOK = 0.5  # seconds between two looks at the files of the jobs
PATIENCE = 10  # seconds that a launcher has to return after the request to stop


@dataclass(frozen=True)
class Job:
    """How far a job is."""

    number: int
    overrides: list[str]
    state: str = WAITING
    record: str | None = None
    exit_code: int | None = None
    ran: bool = True
    why: str | None = None  # of a job that was refused
    text: str = ""  # printed by debug=plan
    host: str = ""
    process: int = 0


def new_folder(above: Path, output_dir: str) -> Path:
    """Return a new empty folder, named by the time. Raises OSError for a full disk, else ConfigError."""
    try:
        above.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=above, prefix=time.strftime("%Y%m%d-%H%M%S-")))
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ConfigError(f"output_dir={output_dir}: cannot write there: {error}") from error


@dataclass(frozen=True)
class Sweep:
    """What every job of a command line knows; launchers pickle it for their processes."""

    folder: Path
    launcher: str
    here: bool  # this process runs the jobs itself, one after the other
    at_once: int | None  # how many jobs share this machine; None: a scheduler gives each what it needs
    settings: Mapping[str, Any] = field(default_factory=dict)  # the launcher's
    directory: str = field(default_factory=os.getcwd)
    gpus: tuple[str, ...] = field(default_factory=lambda: visible_gpus(os.environ, Path("/dev").glob("nvidia[0-9]*")))
    threads: Mapping[str, str] = field(default_factory=lambda: {k: os.environ[k] for k in THREADS if k in os.environ})

    @classmethod
    def begin(cls, composer: Composer, jobs: list[list[str]]) -> Sweep:
        """Return a sweep with its folder, which has a file for each job. Raises ConfigError if the sweep cannot be."""
        output_dir = composer.config(jobs[0]).output_dir
        above = Path(output_dir, ".sweep").absolute()
        clear_left(above, "[0-9]*")
        launcher = composer.launcher(jobs[0], str(above))
        here = launcher["_target_"].endswith(".BasicLauncher")
        for job in () if here else jobs:
            for key, value in composer.launcher(job, str(above)).items():
                if value != launcher[key]:
                    raise ConfigError(
                        f"hydra.launcher.{key} would be {launcher[key]} for one job and {value} for another: give one "
                        f"for all, as in hydra.launcher.{key}={value}"
                    )
        choice = str(composer.hydra(jobs[0]).runtime.choices["hydra/launcher"])
        made = cls(new_folder(above, output_dir), choice, here, jobs_at_once(launcher, len(jobs), cores()), launcher)
        if made.at_once is not None:  # else its jobs may outlive this process
            own(made.folder)
        for number, words in enumerate(jobs, 1):
            made.note(Job(number, words))
            if not here:
                plain = OmegaConf.to_container(composer.config(words), resolve=True, enum_to_str=True)
                (made.folder / f"config{number}.json").write_text(json.dumps(plain), encoding="utf8")
        return made

    def config(self, number: int) -> DictConfig:
        """Return the config of a job that runs elsewhere, composed where the command was typed."""
        text = (self.folder / f"config{number}.json").read_text(encoding="utf8")
        return cast(DictConfig, OmegaConf.create(json.loads(text)))

    @property
    def output_dir(self) -> str:
        return os.path.relpath(self.folder.parent.parent, self.directory)

    def note(self, job: Job) -> None:
        """Write how far a job is."""
        with suppress(FileNotFoundError):  # the sweep is over, and its folder is gone
            file = self.folder / f"job{job.number}.json"
            part = file.with_suffix(f".{os.getpid()}")  # not forced to the disk: hundreds of jobs may be done already
            part.write_text(json.dumps(asdict(job)), encoding="utf8")
            part.replace(file)

    def jobs(self) -> list[Job]:
        found = [Job(**json.loads(file.read_text(encoding="utf8"))) for file in self.folder.glob("job*.json")]
        return sorted(found, key=lambda job: job.number)

    def request_stop(self, number: int) -> None:
        """Ask all jobs to stop, as by a signal of this number: those that run save and end, others do not start."""
        with suppress(FileNotFoundError), (self.folder / "stop").open("a", encoding="utf8") as file:
            file.write(f"{number}\n")

    def stop_requests(self) -> list[int]:
        """Return the signals by which jobs were asked to stop; a sweep whose folder is gone is over."""
        try:
            return [int(line) for line in (self.folder / "stop").read_text(encoding="utf8").splitlines()]
        except FileNotFoundError:
            return [] if self.folder.exists() else [signal.SIGTERM]

    def twin(self, job: Job) -> bool:
        """Return whether another job, which runs, has the same record."""
        others = [j for j in self.jobs() if j.record == job.record and j.number != job.number]
        return any(j.state == STARTED and not self.lost(j) for j in others)

    def lost(self, job: Job) -> bool:
        """Return whether the process of a job is known to be gone."""
        return job.host == socket.gethostname() and not lives(job.process)

    @contextmanager
    def allocation(self, recipe: Recipe) -> Iterator[Allocation]:
        """Wait until a job has its share of the machine, and hold it. Raises ConfigError if that has too few GPUs."""
        if self.here:
            yield Allocation()  # signals come to this very process
            return
        parent = os.getppid()

        def stop_requests() -> list[int]:
            return self.stop_requests() or ([] if os.getppid() == parent else [signal.SIGTERM])

        if self.at_once is None:
            yield Allocation(quiet=True, stop_requests=stop_requests)
            return
        with self._slot(self.at_once) as slot:
            environment = share(recipe, slot, self.at_once, cores(), self.gpus)
            environment |= {name: self.threads.get(name, environment.get(name)) for name in THREADS}
            yield Allocation(environment, quiet=True, stop_requests=stop_requests)

    @contextmanager
    def _slot(self, slots: int) -> Iterator[int]:
        """Wait for one of the slots, and hold it: a lock, which is free again when its process dies."""
        while True:
            for slot in range(slots):
                with (self.folder / f"slot{slot}").open("w") as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue
                    yield slot
                    return
            time.sleep(LOOK)

    def end(self, *, whole: bool) -> None:
        """Remove the folder, unless jobs of a cluster may yet start (not ``whole``): they outlive this process."""
        if whole or self.at_once is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def jobs_at_once(launcher: Mapping[str, Any], jobs: int, cores: int) -> int | None:
    """Return how many jobs share this machine; None where a scheduler gives each its part."""
    kind = launcher["_target_"].rpartition(".")[2]
    if kind == "BasicLauncher":
        return 1
    if kind == "LocalLauncher":  # submitit starts all at once
        return jobs
    if kind == "JoblibLauncher":  # a negative number counts back from all cores
        n: int = launcher["n_jobs"]
        return min(n if n > 0 else max(1, cores + 1 + n), jobs)
    return None


def visible_gpus(environment: Mapping[str, str], present: Iterable[Path]) -> tuple[str, ...]:
    """Return the names in ``CUDA_VISIBLE_DEVICES``, up to the first that is none; if it is not set, all GPUs."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return tuple(str(k) for k, _ in enumerate(present))
    return tuple(takewhile(lambda name: name and not name.startswith("-"), map(str.strip, given.split(","))))


def share(recipe: Recipe, slot: int, slots: int, cores: int, gpus: tuple[str, ...]) -> dict[str, str | None]:
    """Return the environment variables of a job in one of ``slots`` equal parts of the machine.

    Raises ConfigError if the part has too few GPUs.
    """
    wanted, part = recipe.trainer.devices, len(gpus) // slots
    environment: dict[str, str | None] = {"OMP_NUM_THREADS": str(max(1, cores // slots // wanted))}
    if not gpus or recipe.trainer.accelerator == Accelerator.cpu:
        return environment
    if wanted > part:
        raise ConfigError(
            f"trainer.devices={wanted}, but {slots} jobs at a time share {len(gpus)} GPUs, {part} each: "
            "lower hydra.launcher.n_jobs, or take trainer.accelerator=cpu"
        )
    return environment | {"CUDA_VISIBLE_DEVICES": ",".join(gpus[slot * part : (slot + 1) * part])}


@contextmanager
def watching(sweep: Sweep, began: Callable[[Job], None], ended: Callable[[Job], None]) -> Iterator[None]:
    """While jobs run elsewhere: report each that starts and ends, and turn signals into requests to stop.

    The signals are blocked, in this process and, by inheritance, in those that a launcher starts: Ctrl-C in the
    terminal goes to all of them, and would end them before their jobs have saved.
    """
    over, interrupted = threading.Event(), threading.Event()
    reported: dict[int, str] = {}

    def received(number: int, _: FrameType | None = None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        sweep.request_stop(number)

    def report() -> list[Job]:
        jobs = sweep.jobs()
        for job in jobs:
            if job.state not in (WAITING, reported.get(job.number)):
                reported[job.number] = job.state
                (began if job.state == STARTED else ended)(job)
        return jobs

    def watch() -> None:
        deadline = math.inf
        while not over.is_set():
            if (caught := signal.sigtimedwait(STOP, LOOK)) is not None:
                received(caught.si_signo)
            running = [job for job in report() if job.state == STARTED and not sweep.lost(job)]
            if requests := sweep.stop_requests():
                if deadline == math.inf:
                    say("stop     jobs that run save and end, others do not start; Ctrl-C twice more ends them at once")
                deadline = min(deadline, time.monotonic() + PATIENCE)
            if time.monotonic() > deadline and (not running or len(requests) >= 3) and not interrupted.is_set():
                interrupted.set()
                _thread.interrupt_main()  # the launcher waits for jobs in a queue, which need not start any more
        report()

    resource_tracker.ensure_running()  # a launcher that starts it would unblock the signals again
    handlers = {number: signal.signal(number, received) for number in STOP}  # if a library unblocks them all the same
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
