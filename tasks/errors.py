"""What is said of data that cannot be used. Imports no torch."""

from __future__ import annotations


class DataError(Exception):
    """What a user can mend: one to three lines that name the key, or the file and line."""
