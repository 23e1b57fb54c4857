"""Files are written whole or not at all: as ``runs.record.write_whole`` does, but bytes too, and without Hydra."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from caspr_cli.report.errors import ReportError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, and its directory if there is none.

    Raises:
        ReportError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ReportError(f"{path}: cannot write there: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise ReportError(f"{path}: cannot write there: {error.strerror}") from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
