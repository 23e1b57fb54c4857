"""The installed packages."""

from importlib.metadata import PackageNotFoundError, version


def installed(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed by this name."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
