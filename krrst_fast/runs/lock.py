"""One process at a time writes a run: a lock that the kernel drops with the process."""

import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from krrst_fast.errors import ConfigError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a folder or file; nothing is written for it, and a kill leaves nothing.

    On a file system that locks no folders, as NFS, the file `.lock` in it is locked; where neither
    can be locked a warning says so.

    Raises:
        ConfigError: Another process holds it.
    """
    descriptor = _locked_descriptor(path)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked_descriptor(path: Path) -> int | None:
    try:
        return _lock(path, path, os.O_RDONLY)
    except OSError as error:
        reason = error
    if path.is_dir():
        try:
            return _lock(path / ".lock", path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            reason = error
    warnings.warn(
        f"{path}: cannot be locked ({reason.strerror}), as on some network file systems: see to it "
        "that no other process writes it",
        stacklevel=4,
    )
    return None


def _lock(file: Path, path: Path, flags: int) -> int:
    descriptor = os.open(file, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"{path}: another process is writing here; wait for it, or stop it and resume"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    # The last writer may have removed it meanwhile: a lock on what has no name holds nobody off.
    if not file.exists() or not os.path.samestat(os.fstat(descriptor), file.stat()):
        os.close(descriptor)
        raise ConfigError(f"{path}: another process has just ended writing here; try again")
    return descriptor
