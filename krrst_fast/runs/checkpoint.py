"""The folder of a run, taken up with the same bits after a kill, and only by the same run."""

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from krrst_fast.errors import CheckpointError, ConfigError, DataError
from krrst_fast.runs.config import flat, to_dict
from krrst_fast.runs.files import (
    load_state,
    read_json,
    read_jsonl,
    refuse_existing,
    save_state,
    write_text,
)
from krrst_fast.runs.interrupt import Interrupts
from krrst_fast.runs.log import due
from krrst_fast.runs.seal import row_line

FORMAT_VERSION = 1


def check_folder(out: Path, config: Any, *, resume: bool, free: Collection[str]) -> None:
    """Refuse a folder in use, or one that holds something else than the run to resume.

    Args:
        out: The run folder.
        config: The settings of the run.
        resume: Whether a run in the folder goes on.
        free: Settings that may change in the middle of a run.

    Raises:
        ConfigError: It holds files, and `resume` is false or they are no run.
        CheckpointError: The run in it has other settings.
    """
    path = out / "config.json"
    if not resume or (out.exists() and not out.is_dir()):
        try:
            refuse_existing(out)
        except ConfigError as error:
            way = "; --resume goes on with the run in it" if path.exists() else ""
            raise ConfigError(f"{error}{way}") from None
    elif path.exists():
        require_same_run(path, read_json(path), config, free)
    # Temporary files of a run that was killed at once start with a dot.
    elif out.exists() and any(not file.name.startswith(".") for file in out.iterdir()):
        raise ConfigError(f"{out}: holds files but no config.json: no run to resume")


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


def require_same_run(path: Path, saved: Any, config: Any, free: Collection[str]) -> None:
    """Raise CheckpointError, naming the settings, if `saved` is another run than `config`."""
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path}: does not hold the settings of a run")
    now, then = flat(to_dict(config)), flat(saved)
    changes = [
        f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in now | then
        if name not in free and now.get(name) != then.get(name)
    ]
    if changes:
        raise CheckpointError(f"{path}: of a run with other settings: {'; '.join(changes)}")


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
