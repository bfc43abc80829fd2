"""Signals that ask a run to end: it saves what it has, says so, and ends."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal ended the work. The message says what is saved.

    Attributes:
        signum: The signal.
    """

    def __init__(self, signum: int, saved: str = "") -> None:
        self.signum = signum
        name = signal.Signals(signum).name
        super().__init__(f"interrupted by {name}" + (f" {saved}" if saved else ""))


def _raise(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handler` for each of SIGNALS that nobody else handles or ignores."""
    before: dict[int, Any] = {}
    # Python lets only the main thread set handlers, and runs them in it.
    if threading.current_thread() is threading.main_thread():
        ours = (signal.SIG_DFL, signal.default_int_handler, _raise)
        # A signal that is ignored, as by nohup, stays so; a caller's own handler, too.
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: found for number, found in before.items() if found in ours}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, found in before.items():
            signal.signal(number, found)


@contextmanager
def raised_signals() -> Iterator[None]:
    """Make every one of SIGNALS raise Interrupted, so that temporary files are removed."""
    with _handled(_raise):
        yield


class Interrupts:
    """The first signal is noted, for a loop to save what it has and end; a second one raises.

    Attributes:
        signum: The signal that was noted, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            # A terminal that is closed sends SIGHUP twice, by the kernel and by the shell.
            if signum == self.signum == signal.SIGHUP:
                return
            raise Interrupted(signum)
        self.signum = signum
        if os.isatty(2):
            # Not print: its buffer may be in use where the signal came.
            os.write(2, b"\nkrrst: saving; a second signal ends at once, without\n")

    @contextmanager
    def noted(
        self, saved: str = "at the end of the steps, which are saved"
    ) -> Iterator["Interrupts"]:
        """Note signals until the block ends; raise one that came after the last look at it.

        Args:
            saved: What is saved at the end of the block, for the message.
        """
        with _handled(self._note):
            yield self
        self.end(saved)

    def end(self, saved: str) -> None:
        """Raise Interrupted if a signal was noted, once everything is saved."""
        if self.signum is not None:
            raise Interrupted(self.signum, saved)
