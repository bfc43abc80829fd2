"""Pre-trained networks that more than one row of a suite begins with."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from krrst_fast.errors import CheckpointError
from krrst_fast.evaluate.materials import Materials
from krrst_fast.models import Network
from krrst_fast.runs.config import to_dict
from krrst_fast.runs.tensors import load_state, save_state
from krrst_fast.runs.version import version


class Ready(NamedTuple):
    """The state of a network after its pre-training, and the loss of the last step."""

    state: dict[str, Tensor]
    loss: float


class Networks:
    """Pre-trained networks in a folder; without one, none is kept.

    Pre-training depends on the images that a method takes and on the student, and not on the
    labelled store: the cells of a suite that differ by the store share it.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def take(self, key: str) -> Ready | None:
        """Return what is kept under `key`, None if nothing is."""
        if self.folder is None or not (path := self._path(key)).exists():
            return None
        try:
            kept = load_state(path)
            return Ready(kept["state"], kept["loss"])
        except (CheckpointError, KeyError):
            return None  # it is damaged, or was removed meanwhile: trained once more

    def keep(self, key: str, net: Network, loss: float) -> None:
        """Keep a network as it is now."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_state(self._path(key), {"state": dict(net.state_dict()), "loss": loss})

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.pt"


NONE_KEPT = Networks(None)


def pretraining_key(materials: Materials, method: str, seed: int) -> str:
    """Return a digest of all that a network depends on when its pre-training ends."""
    config = materials.config
    parts: list[Any] = [version(), to_dict(config.model), to_dict(config.pretrain), seed]
    parts += [materials.device.type, torch.get_num_threads()]
    if config.model.is_own:
        parts.append(config.model.identity())
    if (number := materials.set_index(method, seed)) is not None:
        parts += [materials.digests[method], number]
    else:
        # random_early is random_target, stopped at its best.
        chosen = "random_target" if method == "random_early" else method
        parts += [chosen, materials.count(method), materials.digests["source"]]
        parts += [materials.digests["target"], materials.mean, materials.std]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
