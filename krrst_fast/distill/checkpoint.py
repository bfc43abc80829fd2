"""Saving a run so that it can be taken up again with the same bits, and only by the same run."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from krrst_fast.config import config_hash, to_dict
from krrst_fast.data.store import ImageStore
from krrst_fast.distill.config import DistillConfig
from krrst_fast.distill.step import State
from krrst_fast.errors import CheckpointError, NonFiniteError
from krrst_fast.files import load_state, read_jsonl, save_state, write_text
from krrst_fast.targets import FrozenTarget
from krrst_fast.targets.checkpoint import store_identity

FORMAT_VERSION = 1
FREE_SETTINGS = ("store", "target", "out", "device", "checkpoint_every", "log_every")
"""Settings that may change in the middle of a run: they say where and how often, not what.

The images and the target themselves may not change: `identity` of them is compared.
"""

Identity = Mapping[str, str]


def identity(store: ImageStore, target: FrozenTarget) -> dict[str, str]:
    """What tells the store and the target of a run from others, wherever they lie."""
    settings = [target.image_size, list(target.mean), list(target.std), to_dict(target.config)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(target.model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return {"store": store_identity(store), "target": f"sha256 {digest.hexdigest()[:16]}"}


def require_same_inputs(path: Path, saved: Identity, now: Identity) -> None:
    """Raise CheckpointError, naming which, if the run that wrote `path` saw other inputs.

    Args:
        path: to be named.
        saved: holds the `identity` of its inputs, or nothing in files of earlier versions.
        now: the `identity` of the inputs at hand.
    """
    changes = [
        f"the {name} has changed since this run began: it was {saved[name]} and is {value}"
        for name, value in now.items()
        if saved.get(name, value) != value
    ]
    if changes:
        raise CheckpointError(f"{path}: {'; '.join(changes)}")


def save_checkpoint(
    path: Path, config: DistillConfig, inputs: Identity, state: State, totals: dict[str, float]
) -> None:
    """Replace the checkpoint by one of `state`; a kill leaves the old one or the new one.

    Args:
        path: the file.
        config: of the run.
        inputs: their `identity`.
        state: everything that an outer step changes.
        totals: of the run so far: seconds, peak memory.

    Raises:
        NonFiniteError: the synthetic set holds NaN or infinity; the old checkpoint is kept.
        OSError: the file cannot be written, as on a full disk; the old checkpoint is kept.
    """
    for name, tensor in (("images", state.x_syn), ("targets", state.y_syn)):
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"distill: the {name} hold NaN or infinity at step {state.step}")
    saved = {
        "format_version": FORMAT_VERSION,
        "config": to_dict(config),
        "config_hash": config_hash(config, ignore=FREE_SETTINGS),
        "inputs": dict(inputs),
        "state": state.state_dict(),
        "totals": totals,
    }
    save_state(path, saved)


def load_checkpoint(path: Path, config: DistillConfig, inputs: Identity) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote.

    Raises:
        CheckpointError: it cannot be read, or is of a run with other settings or inputs.
    """
    saved = load_state(path)
    version = saved.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version!r}, this version of krrst_fast reads {FORMAT_VERSION}"
        )
    require_same_run(path, saved["config"], config)
    require_same_inputs(path, saved.get("inputs", {}), inputs)
    return saved


def require_same_run(path: Path, saved: Any, config: DistillConfig) -> None:
    """Raise CheckpointError, naming the settings, if `saved` is another run than `config`."""
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path}: does not hold the settings of a run")
    now, then = _flat(to_dict(config)), _flat(saved)
    names = [name for name in now | then if name not in FREE_SETTINGS]
    changes = [
        f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in names
        if now.get(name) != then.get(name)
    ]
    if changes:
        raise CheckpointError(f"{path}: of a run with other settings: {'; '.join(changes)}")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def cut_metrics(path: Path, step: int) -> None:
    """Drop the rows that a killed run wrote after the step it is taken up at."""
    rows = [row for row in read_jsonl(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
