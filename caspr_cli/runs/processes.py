"""The processes of a run, seen from outside, and what is known of a machine whose memory ran out."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

# Environment variable of a worker: the process that launched it.
LAUNCHER = "CASPR_LAUNCHER"


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_gpu() -> bool:
    """Return whether this machine may have a GPU; on Linux, whether there is a device file of NVIDIA, AMD or WSL."""
    return sys.platform != "linux" or any(any(Path("/dev").glob(name)) for name in ("nvidia[0-9]*", "kfd", "dxg"))


def workers(record: Path, launcher: int) -> dict[int, int | None]:
    """Return the processes that a launcher has at work on a record, each with its rank; None: torch's own launcher."""
    found: dict[int, int | None] = {}
    for process in with_variable(LAUNCHER, str(launcher)):
        with suppress(psutil.Error):
            if str(record.resolve()) in process.cmdline():
                rank = process.environ().get("RANK")
                found[process.pid] = None if rank is None else int(rank)
    return found


def with_variable(name: str, value: str | None = None) -> Iterator[psutil.Process]:
    """Yield this user's processes that were started with an environment variable, of any value if ``value`` is None."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or is another user's
            found = process.environ().get(name)
            if found is not None and value in (None, found):
                yield process


def memory_kills() -> int:
    """Return how many processes the system has ended because memory ran out; 0 where it does not count them."""
    groups = Path("/sys/fs/cgroup")
    files = [Path("/proc/vmstat"), groups / "memory.events", groups / "memory/memory.oom_control"]
    with suppress(OSError, ValueError):  # of this process's own group
        group = Path("/proc/self/cgroup").read_text(encoding="utf8").splitlines()[-1].rpartition(":")[2]
        files.append(Path(f"{groups}{group}/memory.events"))
    count = 0
    for file in files:
        with suppress(OSError, ValueError):
            words = [line.split() for line in file.read_text(encoding="utf8").splitlines()]
            count += sum(int(line[1]) for line in words if line[:1] == ["oom_kill"])
    return count


# Messages of Python, C++ and the system's loader, which share no exception for it.
MEMORY = re.compile(
    r"can.?t allocate memory|cannot allocate memory|out of memory|std::bad_alloc|failed to map segment"
    r"|can't start new thread|MemoryError",
    re.IGNORECASE,
)


# What CUDA (cudaGetErrorString of release 13) and NVIDIA's driver say of a GPU that is broken or taken away. An illegal
# access, a failed launch or an assertion may be the program's own fault, so they are not here.
DEVICE = re.compile(
    r"uncorrectable (ECC|NVLink) error|devices?(\(s\))? is/are busy or unavailable|MPS client has been terminated"
    r"|fallen off the bus|NVRM: Xid",
    re.IGNORECASE,
)


def memory_error(error: BaseException | None) -> str | None:
    """Return what an error says about too little memory, itself or in its causes; None if it has another cause."""
    for cause in _causes(error):
        text = str(cause).partition("\n")[0]
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            return text or "there is not enough"
        if isinstance(cause, (RuntimeError, ImportError)) and MEMORY.search(text):
            return text
    return None


def device_error(error: BaseException | None) -> str | None:
    """Return the line that says that a GPU is broken, of an error or its causes; None if it has another cause."""
    texts = [str(cause) for cause in _causes(error) if isinstance(cause, RuntimeError)]
    return next((line for text in texts for line in text.splitlines() if DEVICE.search(line)), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
