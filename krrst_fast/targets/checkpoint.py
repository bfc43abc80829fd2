"""The folder of a training run: what a resumed run must agree with, and its saved state."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from krrst_fast.config import to_dict
from krrst_fast.data.store import ImageStore
from krrst_fast.errors import CheckpointError, ConfigError
from krrst_fast.files import (
    load_state,
    read_json,
    read_jsonl,
    refuse_existing,
    save_state,
    write_text,
)
from krrst_fast.targets.config import TargetConfig

FORMAT_VERSION = 1
FREE_SETTINGS = ("store", "out", "device", "checkpoint_every", "log_every")
"""Settings that may change in the middle of a run: they say where and how often, not what.

The images themselves may not change: `store_identity` of them is compared.
"""


def store_identity(store: ImageStore) -> str:
    """What tells one set of pixels from another, wherever its folder lies."""
    crc = read_json(store.path / "index.json")["crc32"]["images.u8"]
    return f"{store.count('train')}x{store.channels}x{store.size}x{store.size}, crc32 {crc:08x}"


def check_folder(config: TargetConfig, *, resume: bool) -> None:
    """Refuse a folder in use, or one that holds something else than the run to resume.

    Raises:
        ConfigError: it holds files, and `resume` is false or they are no run.
        CheckpointError: the run in it has other settings.
    """
    if not resume:
        refuse_existing(config.out)
        return
    path = config.out / "config.json"
    if path.exists():
        _require_same(path, read_json(path), config)
    elif config.out.exists():
        if not config.out.is_dir():
            refuse_existing(config.out)
        # Temporary files of a run that was killed at once start with a dot.
        if any(not file.name.startswith(".") for file in config.out.iterdir()):
            raise ConfigError(f"{config.out}: holds files but no config.json: no run to resume")


def save_checkpoint(
    path: Path, config: TargetConfig, identity: str, state: Mapping[str, Any]
) -> None:
    """Replace the checkpoint; a kill leaves the old one or the new one, whole."""
    about = {"format_version": FORMAT_VERSION, "config": to_dict(config), "store": identity}
    save_state(path, {**about, "state": dict(state)})


def load_checkpoint(path: Path, config: TargetConfig, identity: str) -> dict[str, Any]:
    """The state that `save_checkpoint` was given.

    Raises:
        CheckpointError: it cannot be read, or is of other settings or other images.
    """
    saved = load_state(path)
    if saved.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: is of format {saved.get('format_version')!r}, this version reads "
            f"{FORMAT_VERSION}"
        )
    _require_same(path, saved["config"], config)
    require_same_images(path, saved["store"], identity)
    return saved["state"]


def require_same_images(path: Path, saved: str, identity: str) -> None:
    """Raise CheckpointError if the run that wrote `path` saw another set of images."""
    if saved != identity:
        raise CheckpointError(f"{path}: of a run on other images: {saved}; now {identity}")


def cut_metrics(path: Path, step: int) -> None:
    """Drop the rows that a killed run wrote after the step it is taken up at."""
    rows = [row for row in read_jsonl(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _require_same(path: Path, saved: Mapping[str, Any], config: TargetConfig) -> None:
    then, now = dict(_flat(saved)), dict(_flat(to_dict(config)))
    changes = [
        f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in {**now, **then}
        if name not in FREE_SETTINGS and now.get(name) != then.get(name)
    ]
    if changes:
        raise CheckpointError(f"{path}: of a run with other settings: {'; '.join(changes)}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
