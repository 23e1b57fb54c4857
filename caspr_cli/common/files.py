"""Write files whole or not at all, and recognize errors of the disk. Standard library only."""

import errno
import os
import re
import tempfile
from collections.abc import Set
from pathlib import Path

from caspr_cli.common.errors import UserError

# What a disk does, and no file is to blame for: it is full, or does not answer.
DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE})
RUST = re.compile(r"\(os error (\d+)\)")  # libraries written in Rust name an errno so, in exceptions of any type


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: a reader sees the old or the new one. Raises OSError with the file's name."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file that the user has asked for, whole or not at all, and its directory if there is none.

    Raises UserError if nothing can be written there; its cause is the OSError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot write there: {error.strerror}") from error


def disk_error(error: BaseException | None, numbers: Set[int] = DISK) -> OSError | None:
    """Return the disk's error (of these errno values) among the causes of an error; None if there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in numbers:
            return error
        if (found := RUST.search(str(error))) and int(found[1]) in numbers:
            return OSError(int(found[1]), os.strerror(int(found[1])))
        if isinstance(error, OSError) and "Not enough disk space" in str(error):  # of `datasets`, before it downloads
            return OSError(errno.ENOSPC, str(error))
        error = error.__cause__ or error.__context__
    return None
