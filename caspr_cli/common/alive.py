"""Whether a process of this machine runs, by its number and when it began."""

import os

import psutil

NO_PROCESS = (psutil.Error, OverflowError, ValueError)  # the last two: it is not a number that a process has


def birth(process: int) -> int | None:
    """Return when a process began, in clock ticks since the machine started; None if there is no such process.

    It tells a process from an earlier one with the same number. Setting the machine's clock does not change it.
    """
    try:
        boot = psutil.boot_time()  # first: older versions of psutil keep this value for create_time()
        seconds: float = psutil.Process(process).create_time() - boot
        return round(seconds * os.sysconf("SC_CLK_TCK"))
    except NO_PROCESS:
        return None


def lives(process: int, born: int | None = None) -> bool:
    """Return whether a process runs (a zombie does not), and, if ``born`` is given, began at that time."""
    try:
        running = psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:  # another user's
        return True
    except NO_PROCESS:
        return False
    return running and born in (None, birth(process))
