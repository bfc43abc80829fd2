"""Whether a folder is free for a run, or holds the run to go on with. Without torch: at once."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from krrst_fast.errors import CheckpointError, ConfigError
from krrst_fast.runs.config import flat, to_dict
from krrst_fast.runs.files import read_json, refuse_existing


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
