"""Standard input, output and error of a command, also where they are closed, full or gone."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType

from caspr_cli.common.errors import UserError, not_installed
from caspr_cli.common.exits import BAD_USAGE, INTERRUPTED, OK, RUN_FAILED, TERMINATED

STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


class TerminatedError(KeyboardInterrupt):
    """The user or the system ended the command by SIGTERM or SIGHUP."""


@contextmanager
def terminable() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise TerminatedError, so that a command can say how it goes on, as after Ctrl-C.

    A signal that is ignored, as SIGHUP under nohup, stays so.
    """

    def terminated(_: int, __: FrameType | None) -> None:
        raise TerminatedError

    if threading.current_thread() is not threading.main_thread():  # no other may set handlers
        yield
        return
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    ours = [each for each, handler in before.items() if handler != signal.SIG_IGN]
    for each in ours:
        signal.signal(each, terminated)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, before[each])


def console_script(main: Callable[[], int]) -> Callable[[], int]:
    """Return a console script from a function that returns the exit code.

    It starts with any standard streams and does not end because of them. A user's mistake is one line and exit code 2.
    """

    @wraps(main)
    def started() -> int:
        open_closed()
        keep_imports_out_of_the_working_directory()
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        try:
            os.getcwd()
        except OSError as error:
            complain(f"the working directory cannot be used, and may have been deleted ({error.strerror}): change it")
            return BAD_USAGE
        code = OK
        try:
            code = _exit_code(main)
            sys.stdout.flush()
        except MemoryError:
            complain("too little memory")
            return RUN_FAILED
        except OSError as error:  # a reader that has seen enough, as | head, is no error
            silence(error)
            return code or (0 if isinstance(error, BrokenPipeError) else BAD_USAGE)
        return code

    return started


def _exit_code(main: Callable[[], int]) -> int:
    try:
        return main()
    except SystemExit as stop:  # of --help and --version
        return int(stop.code or OK)
    except (UserError, ModuleNotFoundError) as error:
        message = str(error) if isinstance(error, UserError) else not_installed(error)
        if message is None:
            raise
        complain(message)
        return BAD_USAGE
    except KeyboardInterrupt as stop:
        return TERMINATED if isinstance(stop, TerminatedError) else INTERRUPTED


def keep_imports_out_of_the_working_directory() -> None:
    """Have the processes that this one starts import nothing from there: a ``utils.py`` of the user would be taken."""
    os.environ["PYTHONSAFEPATH"] = "1"
    if given := os.environ.get("PYTHONPATH"):  # an empty part means the working directory, too
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, given.split(os.pathsep)))


def open_closed() -> None:
    """Open closed streams on the null device, so that no file of a record gets the number of a standard stream."""
    for number, (name, mode) in enumerate(STREAMS):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.dup2(opened, number)  # inheritable
            if opened > 2:
                os.close(opened)
        os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf8", closefd=False))  # noqa: SIM115


def say(line: str) -> None:
    """Print a line. A reader that is gone, or a full disk behind standard output, does not end a run."""
    try:
        print(line, flush=True)
    except OSError as error:
        silence(error)


def complain(message: str) -> None:
    """Print an error, if there is still somewhere to print it."""
    try:
        print(f"error: {message}", file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w", encoding="utf8")  # noqa: SIM115


def silence(error: OSError) -> None:
    """Replace standard output and say why: what it still holds would fail once more when Python ends."""
    sys.stdout = open(os.devnull, "w", encoding="utf8")  # noqa: SIM115
    if not isinstance(error, BrokenPipeError):
        complain(cause(error))


def cause(error: OSError) -> str:
    """Return the file and what went wrong with it; an error without a file is of standard output."""
    return f"{error.filename or 'standard output'}: {error.strerror or error}"
