"""The folder of a run, taken up with the same bits after a kill, and only by the same run."""

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from krrst_fast.errors import CheckpointError, DataError
from krrst_fast.runs.config import to_dict
from krrst_fast.runs.files import read_jsonl, write_text
from krrst_fast.runs.folder import require_same_run
from krrst_fast.runs.interrupt import Interrupts
from krrst_fast.runs.log import due
from krrst_fast.runs.seal import row_line
from krrst_fast.runs.tensors import load_state, save_state

FORMAT_VERSION = 1


def save_checkpoint(path: Path, config: Any, contents: Mapping[str, Any]) -> None:
    """Replace the checkpoint; a kill leaves the old one or the new one, whole.

    Raises:
        OSError: The file cannot be written, as on a full disk; the old checkpoint is kept.
    """
    about = {"format_version": FORMAT_VERSION, "config": to_dict(config)}
    save_state(path, {**about, **contents})


def load_checkpoint(path: Path, config: Any, free: Collection[str]) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote.

    Raises:
        CheckpointError: It cannot be read, or is of a run with other settings.
    """
    saved = load_state(path, sealed=True)
    version = saved.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version!r}, this version of krrst_fast reads {FORMAT_VERSION}"
        )
    require_same_run(path, saved["config"], config, free)
    return saved


def require_same_inputs(path: Path, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise CheckpointError, naming which, if the run that wrote `path` read other inputs.

    Args:
        path: Named in the message.
        saved: Identities of the inputs of that run, by name.
        now: Identities of the current inputs.
    """
    changes = [
        f"the {name} has changed since this run began: it was {saved.get(name)} and is {value}"
        for name, value in now.items()
        if saved.get(name) != value
    ]
    if changes:
        raise CheckpointError(f"{path}: {'; '.join(changes)}")


def cut_metrics(path: Path, step: int) -> None:
    """Drop the rows that a killed run wrote after the step at which it is taken up.

    Raises:
        DataError: The log is damaged.
    """
    rows = read_jsonl(path)
    if any(not isinstance(row.get("step"), int) for row in rows):
        raise DataError(f"{path}: a row has no step")
    write_text(path, b"".join(row_line(row) for row in rows if row["step"] <= step).decode())


class Saves:
    """When a run saves: every so many steps, every so many minutes, at the end, and on a signal.

    Args:
        every: Steps.
        minutes: Minutes since the last save.
        last: The step that is the last.
        interrupts: The signals that came.
    """

    def __init__(self, *, every: int, minutes: float, last: int, interrupts: Interrupts) -> None:
        self._every, self._seconds, self._last = every, 60 * minutes, last
        self._interrupts = interrupts
        self._saved = time.monotonic()

    def due(self, step: int) -> bool:
        """Return whether the state after this step is to be saved."""
        return due(step, self._every, self._last) or self.hurry()

    def hurry(self) -> bool:
        """Return whether the state is to be saved at any step: by the clock, or on a signal."""
        late = time.monotonic() - self._saved >= self._seconds
        return late or self._interrupts.signum is not None

    def done(self, what: str) -> None:
        """Note that `what` was saved; raise Interrupted if a signal asked for it."""
        self._saved = time.monotonic()
        self._interrupts.end(f"after {what}, which is saved")
