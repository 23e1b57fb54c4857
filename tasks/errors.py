"""The error of data that cannot be used. Imports no torch."""


class DataError(Exception):
    """An error that a user can correct: one to three lines that name the key, or the file and line."""
