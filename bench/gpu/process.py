"""Commands that end: by themselves, at a time limit, or with the process that started them."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_POLL = 0.05


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        code: its exit code; None if it was ended.
        why: why it was ended, or how it ended.
        seconds: how long it took.
    """

    code: int | None
    why: str
    seconds: float


def spawn(
    command: Sequence[str],
    *,
    log: Path,
    cwd: Path,
    env: Mapping[str, str],
    seconds: float,
    ended: Callable[[], str | None] = lambda: None,
) -> Ended:
    """Run a command, its words into `log`, and end it with all it started if it takes too long.

    Args:
        command: the program and its arguments.
        log: a file; what was in it stays.
        cwd: where it runs.
        env: the whole environment.
        seconds: the time limit.
        ended: asked all the time; the reason to end it now, or None.
    """
    begin = time.monotonic()
    with log.open("ab") as words:
        child = subprocess.Popen(
            command,
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        why = None
        try:
            while why is None and child.poll() is None:
                time.sleep(_POLL)
                if time.monotonic() - begin > seconds:
                    why = f"took longer than {seconds:g} s"
                else:
                    why = ended()
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            code = child.wait()
    told = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
    return Ended(code if why is None else None, why or told, time.monotonic() - begin)


def last_lines(log: Path, count: int = 20) -> list[str]:
    """The end of what a command said."""
    if not log.exists():
        return []
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
