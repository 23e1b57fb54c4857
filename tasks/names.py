"""Names: which files and folders are no data, which are unfinished, which name a split, and which split a sample is in.

Every reader uses this, whether its files lie in a directory or in an archive. Imports no torch.
"""

import hashlib
import re
from difflib import get_close_matches
from typing import Literal, get_args

from caspr_cli.tasks.errors import DataError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

# What systems, editors and file servers leave in folders, beside all that begins with a dot; in small letters.
IGNORED = {
    "__macosx", "icon\r", "network trash folder", "temporary items",  # macOS
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",  # Windows
    "@eadir", "#recycle", "@recycle", "@recently-snapshot", "lost+found",  # file servers, Linux
    "__pycache__",
}  # fmt: skip
# Ends of names that browsers and other programs give to a file while they fetch it.
UNFINISHED = (".crdownload", ".part", ".partial", ".download", ".opdownload", ".filepart", ".aria2", ".!ut", ".!qb")

SPLIT_NAMES: dict[str, Split] = {
    "train": "train", "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test",
}  # fmt: skip


def split_of(name: str, held_out: float) -> Split:
    """Return the split of a sample in data without splits of their own: it depends on the sample's name alone.

    Validation and test each have a share of ``held_out``.
    """
    part = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64  # uniform in [0, 1)
    return "validation" if part < held_out else "test" if part < 2 * held_out else "train"


def is_ignored(name: str, *, folder: bool = False) -> bool:
    """Return whether a file or folder (a ``~`` at its end means nothing) is hidden, a backup, or a program's trace."""
    if name.startswith(".") or name.lower() in IGNORED:
        return True
    return not folder and (name.endswith("~") or (len(name) > 2 and name[0] == name[-1] == "#"))


def refuse_unfinished(name: str) -> None:
    """Raise :class:`DataError` for a file whose name says that it is still being fetched."""
    if name.lower().endswith(UNFINISHED):
        raise DataError(f"{name}: is a download that was not finished; finish it, or delete the file")


def split_named(name: str) -> Split | None:
    """Return the split that a folder or a part of a file name stands for, in any case; None where it is no split."""
    return SPLIT_NAMES.get(name.lower())


def call_split(names: dict[Split, str], split: Split, name: str, where: str) -> None:
    """Enter the name of a split's folder or file. Raises :class:`DataError` where the split has another one already."""
    if names.setdefault(split, name) != name:
        raise DataError(f"{where}: {names[split]} and {name} both name the {split} split; rename or remove one")


def resembles_split(name: str) -> bool:
    """Return whether a name is no split, but near one that somebody may mean: "testing", "val2", "Train set"."""
    if split_named(name):
        return False
    words = re.findall(r"[a-z]+", name.lower())
    return any(
        word in SPLIT_NAMES
        or word.startswith(("train", "valid", "test", "eval", "holdout", "heldout"))
        or get_close_matches(word, SPLIT_NAMES, n=1, cutoff=0.8)
        for word in words
    )
