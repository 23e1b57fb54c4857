"""The Hugging Face hub, and what to say where it cannot be reached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from caspr_cli.common.files import disk_error
from tasks.errors import DataError


@contextmanager
def reaching(what: str, instead: str) -> Iterator[None]:
    """Around every use of the hub (also where rows are streamed from it).

    Args:
        what: "the Hugging Face hub", or whose server it is.
        instead: what a user without it can do, for the second line of the message.

    Raises:
        DataError: it cannot be reached.
        OSError: the disk is full that it is fetched to.
    """
    try:
        yield
    except OSError as error:  # ConnectionError, and every error of huggingface_hub
        if disk_error(error):
            raise
        first = str(error).partition("\n")[0]
        raise DataError(f"{what} cannot be reached ({first})\n{instead}") from error
