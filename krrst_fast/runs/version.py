"""The version of this library; torch is not needed to say it."""

from importlib import metadata


def version() -> str:
    """Return the installed version of this library."""
    try:
        return metadata.version("krrst-fast")
    except metadata.PackageNotFoundError:  # a checkout that is on the path without being installed
        return "not installed"
