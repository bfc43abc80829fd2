"""The target g_phi: frozen, and in one file with all that is needed to call it."""

import hashlib
import itertools
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from krrst_fast.data.augment import plain_views
from krrst_fast.data.store import ImageStore
from krrst_fast.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from krrst_fast.models import ModelConfig, Network, build
from krrst_fast.runs.config import from_dict, to_dict
from krrst_fast.runs.files import atomic_path
from krrst_fast.runs.seal import KEY, warn_unsealed
from krrst_fast.runs.tensors import save_tensors
from krrst_fast.targets.encoder import Encoder, EncoderInfo, FeatureTable
from krrst_fast.targets.open_encoder import digest_of_file, file_of, open_encoder
from krrst_fast.targets.weights import check_finite, read_safetensors

TARGET_FILE = "target.safetensors"
FORMAT_VERSION = 1
ENCODER_VERSION = 2
"""Format of the file of an encoder, which the first versions of the library do not read."""
CHUNK = 256
_PROBED = 2
_PROBE_TOLERANCE = 2e-2
"""Of the largest output: processors and devices differ by far less, another encoder by far more."""


@dataclass(frozen=True, kw_only=True)
class FrozenTarget:
    """A network in evaluation mode whose parameters take no gradient, or a table of its outputs.

    `target(x)` maps normalised images [B, C, H, H] to representations [B, dim], without a graph.
    `encoder_target` makes one of any module.
    """

    model: Network | FeatureTable = field(kw_only=False)
    config: ModelConfig | EncoderInfo
    num_outputs: int
    """Outputs of the linear head; 0 where the representation is the network's features."""
    mean: tuple[float, ...]
    """What the images are to be normalised by, a channel each, in units of [0, 1]."""
    std: tuple[float, ...]
    image_size: int
    meta: dict[str, str] = field(default_factory=dict)
    """How the network came about: loss, steps and the like, for people to read."""
    file: Path | None = None
    """The file of the encoder's network, where it has one."""

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

    @property
    def table(self) -> FeatureTable | None:
        """Return the table, where the target is one and not a network."""
        return self.model if isinstance(self.model, FeatureTable) else None

    @property
    def device(self) -> torch.device:
        """Return where the target computes."""
        return next(itertools.chain(self.model.parameters(), self.model.buffers())).device

    def check_store(self, store: ImageStore) -> None:
        """Raise DataError where the target cannot represent the images of `store`."""
        need, got = (self.channels, self.image_size), (store.channels, store.size)
        if need != got:
            raise DataError(
                f"{store.path}: the images are {store.size} px, and the target network was "
                f"trained on {self.image_size} px"
            )
        if self.table is not None and self.meta.get("store") != store.identity():
            raise DataError(
                f"{store.path}: the target is a table of features of other images "
                f"({self.meta.get('store')}), these are {store.identity()}"
            )

    def plain(self, store: ImageStore, index: Tensor) -> Tensor:
        """Compute representations [B, dim] of images `index` [B] of the train split, un-augmented.

        They are on the CPU.

        Raises:
            DataError: The target does not fit the store.
        """
        self.check_store(store)
        if self.table is not None:
            return self.table.rows(index).cpu()
        images, device = store.images("train"), self.device
        chunks = [
            self(plain_views(images, part, self.mean, self.std).to(device)).cpu().float()
            for part in index.split(CHUNK)
        ]
        return torch.cat(chunks)

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
        if self.table is None and (x.dim() != 4 or x.shape[1:] != need):
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
        """Write weights and settings as one safetensors file, atomically.

        Of an encoder the file has the head and what opens the encoder again; a file of a network is
        copied beside it first.

        Raises:
            ConfigError: The encoder is a module that no SPEC names.
        """
        tensors, config, version = self.model.state_dict(), to_dict(self.config), FORMAT_VERSION
        if isinstance(self.config, EncoderInfo):
            version = ENCODER_VERSION
            if isinstance(self.model, Encoder):
                self._copy_file(path)
                tensors = {f"fc.{key}": value for key, value in self.model.fc.state_dict().items()}
                tensors["probe"] = self._probe()
        info = {
            "format_version": version,
            "model" if version == FORMAT_VERSION else "encoder": config,
            "num_outputs": self.num_outputs,
            "channels": self.channels,
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "meta": self.meta,
        }
        metadata = {"krrst_fast.target": json.dumps(info)}
        save_tensors(path, tensors, metadata)

    def _copy_file(self, path: Path) -> None:
        """Copy the encoder's file into the folder of `path`."""
        assert isinstance(self.config, EncoderInfo)
        if not self.config.spec:
            raise ConfigError(
                "FrozenTarget: a target of a module cannot be saved, because nothing says how to "
                "make the module again; give encoder_target a SPEC such as file.py:callable"
            )
        if self.file is None:
            return
        copy = path.parent / self.config.spec
        if not copy.exists() or digest_of_file(copy) != self.config.digest:
            with atomic_path(copy) as temporary:
                shutil.copyfile(self.file, temporary)

    def _probe(self) -> Tensor:
        """Compute outputs on images of noise, by which a changed encoder is found out."""
        shape = (_PROBED, self.channels, self.image_size, self.image_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return self(noise.to(self.device)).cpu()


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
    info = target_info(path, metadata)
    try:
        if KEY not in metadata:
            warn_unsealed(path, "target")
        if "encoder" in info:
            return _encoder(path, info, state)
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
        return FrozenTarget(
            model=model,
            config=config,
            num_outputs=info["num_outputs"],
            mean=tuple(info["mean"]),
            std=tuple(info["std"]),
            image_size=info["image_size"],
            meta=info["meta"],
        ).to("cpu")
    except NonFiniteError as error:
        raise NonFiniteError(f"{path}: {error}") from None
    except (CheckpointError, DataError):
        raise
    except (KeyError, TypeError, ConfigError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: damaged target file ({reason})") from error


def _encoder(path: Path, info: dict[str, Any], state: dict[str, Tensor]) -> FrozenTarget:
    """Open the encoder of a target file again, and compare it with the one that was saved."""
    config = from_dict(EncoderInfo, info["encoder"])
    shared: dict[str, Any] = {
        name: info[name] for name in ("num_outputs", "image_size", "mean", "std", "meta")
    }
    shared |= {"config": config, "mean": tuple(shared["mean"]), "std": tuple(shared["std"])}
    if "outputs" in state:
        return FrozenTarget(FeatureTable(state["outputs"], channels=info["channels"]), **shared)
    file = file_of(config.spec)
    if file:
        # Compared before it is opened, which may run its code.
        file = path.parent / file.name
        _require_same(path, config, digest_of_file(file))
    try:
        opened = open_encoder(str(file or config.spec))
    except ConfigError as error:
        raise CheckpointError(f"{path}: its encoder cannot be made again: {error}") from error
    _require_same(path, config, opened.digest)
    model = Encoder(
        opened.module,
        dim=config.dim,
        image_size=info["image_size"],
        channels=info["channels"],
        mean=shared["mean"],
        std=shared["std"],
        input_size=config.input_size,
        input_mean=config.mean,
        input_std=config.std,
    )
    model.set_head(info["num_outputs"])
    probe = state.pop("probe")
    model.fc.load_state_dict({key.removeprefix("fc."): value for key, value in state.items()})
    target = FrozenTarget(model, file=file, **shared).to("cpu")
    allowed = _PROBE_TOLERANCE * float(probe.abs().max())
    now = target._probe()
    if now.shape != probe.shape or not torch.allclose(now, probe, rtol=0, atol=allowed):
        raise CheckpointError(
            f"{path}: the encoder {config.spec} has changed: it has the same weights and gives "
            "other outputs"
        )
    return target


def _require_same(path: Path, config: EncoderInfo, digest: str) -> None:
    if digest != config.digest:
        raise CheckpointError(
            f"{path}: the encoder {config.spec} has changed: its weights were {config.digest} and "
            f"are {digest}"
        )


def target_info(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """Return the settings in the metadata of a target file.

    Raises:
        CheckpointError: There are none, or they are damaged or of another format.
    """
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
    if version not in (FORMAT_VERSION, ENCODER_VERSION):
        raise CheckpointError(
            f"{path}: is of target format {version}, and this version reads {FORMAT_VERSION} and "
            f"{ENCODER_VERSION}"
        )
    return info
