"""The checksums of a store that is read by a long run, compared beside it."""

import threading

from krrst_fast.data.store import ImageStore, checksum, checksums
from krrst_fast.errors import DataError

_AT_ONCE = 1 << 26
"""Bytes that are read at once, before anything else: a twentieth of a second."""


class Verification:
    """A thread that reads a store once and compares its checksums.

    A small store is read at once, so that a damaged one is refused before anything is written.

    Raises:
        DataError: A small store is damaged.
    """

    def __init__(self, store: ImageStore) -> None:
        self._store = store
        self._error: Exception | None = None
        # A daemon: an interrupted run does not wait for the rest of the store.
        self._thread = threading.Thread(target=self._compare, name="verify", daemon=True)
        self._thread.start()
        sizes = [(store.path / name).stat().st_size for name in checksums(store.path)]
        if sum(sizes) <= _AT_ONCE:
            self.finish()

    def _compare(self) -> None:
        try:
            for name, expected in checksums(self._store.path).items():
                if checksum(self._store.path / name) != expected:
                    raise DataError(
                        f"{self._store.path / name}: the checksum is wrong, the file is damaged; "
                        "prepare it again"
                    )
        except Exception as error:  # raised where the run waits for it
            self._error = error

    def finish(self) -> None:
        """Wait until all is read; to be called before anything that depends on it is saved.

        Raises:
            DataError: A file is damaged.
            OSError: A file cannot be read.
        """
        # In short waits: a second Ctrl-C is to end the first.
        while self._thread.is_alive():
            self._thread.join(0.2)
        if self._error is not None:
            raise self._error
