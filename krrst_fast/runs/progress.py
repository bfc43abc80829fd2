"""The progress of everything that takes long: a bar, or lines where nothing can be redrawn."""

import sys
import time
from collections.abc import Mapping
from typing import Any

LINE_SECONDS = 30.0
"""Seconds between two lines, where there is no terminal."""


class _NoBar:
    """A progress bar that shows nothing, for environments without tqdm."""

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        pass

    def set_description(self, desc: str) -> None:
        pass

    def set_postfix(self, shown: Any, refresh: bool = True) -> None:
        pass


class _Lines(_NoBar):
    """Prints a line to standard error at most every `LINE_SECONDS`: for logs of batch jobs."""

    def __init__(
        self, total: int | None, initial: int = 0, desc: str = "", unit: str = "it"
    ) -> None:
        self._total, self._initial, self._done = total, initial, initial
        self._desc, self._unit = desc, unit
        self._shown: Mapping[str, Any] = {}
        self._began = self._printed = time.monotonic()

    def update(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._printed >= LINE_SECONDS:
            self._printed = now
            print(self._line(now - self._began), file=sys.stderr, flush=True)

    def set_description(self, desc: str) -> None:
        self._desc = desc

    def set_postfix(self, shown: Any, refresh: bool = True) -> None:
        self._shown = shown

    def _line(self, seconds: float) -> str:
        values = [f"{name} {value}" for name, value in self._shown.items()]
        about = f"{self._desc}: " if self._desc else ""
        parts = [f"{about}{self._unit} {self._done}", *values]
        if self._total is not None:
            left = (self._total - self._done) * seconds / max(self._done - self._initial, 1)
            parts[0] += f" of {self._total}"
            parts.append(_remaining(left))
        return ", ".join(parts)


def _remaining(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} left"


def progress_bar(show: bool, **options: Any) -> Any:
    """Return a context manager that shows progress on standard error.

    It is a bar on a terminal and in a notebook; elsewhere a line is printed every 30 seconds.

    Args:
        show: False draws nothing anywhere.
        options: Options of tqdm: `total`, `initial`, `desc`, `unit`.
    """
    if not show or sys.stderr is None:  # it is None where a shell has closed it
        return _NoBar()
    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        return _Lines(**options)
    try:
        # A widget in a notebook, where standard error is no terminal.
        from tqdm.auto import tqdm
    except ModuleNotFoundError:
        return _Lines(**options)
    return tqdm(dynamic_ncols=True, **options)
