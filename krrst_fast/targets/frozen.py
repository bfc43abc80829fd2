"""The target network g_phi: frozen, and in one file with all that is needed to call it."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from krrst_fast.errors import CheckpointError, ConfigError, NonFiniteError
from krrst_fast.models import ModelConfig, Network, build
from krrst_fast.runs.config import from_dict, to_dict
from krrst_fast.runs.files import save_tensors
from krrst_fast.runs.seal import KEY, warn_unsealed
from krrst_fast.targets.weights import check_finite, read_safetensors

TARGET_FILE = "target.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class FrozenTarget:
    """A network in evaluation mode whose parameters take no gradient.

    `target(x)` maps normalised images [B, C, H, H] to representations [B, dim], without a graph.
    """

    model: Network
    config: ModelConfig
    num_outputs: int
    """Outputs of the linear head; 0 where the representation is the network's features."""
    mean: tuple[float, ...]
    """What the images are to be normalised by, a channel each, in units of [0, 1]."""
    std: tuple[float, ...]
    image_size: int
    meta: dict[str, str] = field(default_factory=dict)
    """How the network came about: loss, steps and the like, for people to read."""

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.channels or min(self.std) <= 0:
            raise ConfigError(
                f"FrozenTarget: mean and std must be {self.channels} numbers each, std positive, "
                f"got {list(self.mean)} and {list(self.std)}"
            )
        check_finite(self.model.state_dict(), "FrozenTarget")
        self.model.eval().requires_grad_(False)

    @property
    def dim(self) -> int:
        """Return the length of a representation."""
        return self.num_outputs or self.model.feature_dim

    @property
    def channels(self) -> int:
        """Return the channels of the images."""
        return self.model.channels

    def identity(self) -> str:
        """Return what tells this target from another, wherever its file lies."""
        # Without what is unset: a setting that came later leaves older targets their identity.
        network = {name: value for name, value in to_dict(self.config).items() if value is not None}
        settings = [self.image_size, list(self.mean), list(self.std), network]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy())
        return f"sha256 {digest.hexdigest()[:16]}"

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Compute representations of normalised images: [B, C, H, H] -> [B, dim]."""
        need = (self.channels, self.image_size, self.image_size)
        if x.dim() != 4 or x.shape[1:] != need:
            raise ValueError(
                f"FrozenTarget: x must be [B, {', '.join(map(str, need))}], got {tuple(x.shape)}"
            )
        return self.model(x)

    def to(self, device: torch.device | str) -> "FrozenTarget":
        """Move the network to `device`, in place as torch modules do; returns itself."""
        # No gradient passes through it: channels innermost is faster on GPUs too.
        on_mps = torch.device(device).type == "mps"  # whose convolutions want rows innermost
        layout = torch.contiguous_format if on_mps else torch.channels_last
        self.model.to(device, memory_format=layout)  # type: ignore[call-overload]
        return self

    def save(self, path: Path) -> None:
        """Write weights and settings as one safetensors file, atomically."""
        info = {
            "format_version": FORMAT_VERSION,
            "model": to_dict(self.config),
            "num_outputs": self.num_outputs,
            "channels": self.channels,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "meta": self.meta,
        }
        metadata = {"krrst_fast.target": json.dumps(info)}
        save_tensors(path, self.model.state_dict(), metadata)


def load_target(path: Path) -> FrozenTarget:
    """Read a target from its file, or from the folder of the run that trained it.

    Raises:
        CheckpointError: There is none, or it cannot be read.
        NonFiniteError: A weight is NaN or infinite.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "distilled.safetensors").exists() or (path / "initial.safetensors").exists():
            raise CheckpointError(
                f"{path}: is the folder of a distillation run, not of a target; name what "
                "krrst target wrote"
            )
        if (path / "index.json").exists():
            raise CheckpointError(f"{path}: is an image store, not a target")
        if not (path / TARGET_FILE).exists() and (path / "checkpoint.pt").exists():
            raise CheckpointError(f"{path}: the training of this target is unfinished; resume it")
        path = path / TARGET_FILE
    state, metadata = read_safetensors(path)
    info = _info(path, metadata)
    try:
        config = from_dict(ModelConfig, info["model"])
        if config.is_own:
            raise CheckpointError(
                f"{path}: names {config.kind}, code that loading the target would run; only "
                "networks that are built in are loaded"
            )
        model = build(
            config,
            image_size=info["image_size"],
            num_outputs=info["num_outputs"],
            channels=info["channels"],
            seed=0,
        )
        model.load_state_dict(state)
        target = FrozenTarget(
            model=model,
            config=config,
            num_outputs=info["num_outputs"],
            mean=tuple(info["mean"]),
            std=tuple(info["std"]),
            image_size=info["image_size"],
            meta=info["meta"],
        ).to("cpu")
        if KEY not in metadata:
            warn_unsealed(path, "target")
        return target
    except NonFiniteError as error:
        raise NonFiniteError(f"{path}: {error}") from None
    except (KeyError, TypeError, ConfigError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: damaged target file ({reason})") from error


def _info(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if "krrst_fast" in metadata:
        raise CheckpointError(f"{path}: is a distilled set, not a target")
    if "krrst_fast.target" not in metadata:
        raise CheckpointError(
            f"{path}: holds weights and not a target; make one of them with the setting `weights`"
        )
    try:
        info = json.loads(metadata["krrst_fast.target"])
        version = info["format_version"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise CheckpointError(f"{path}: damaged target file (its settings are not JSON)") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: is of target format {version}, and this version reads {FORMAT_VERSION}"
        )
    return info
