"""The result of a distillation: a few images and their target representations."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from krrst_fast.distill.shipped import file_of_set, nothing_at
from krrst_fast.errors import DataError
from krrst_fast.runs.config import flat
from krrst_fast.runs.files import read_json
from krrst_fast.runs.seal import check_safetensors, warn_unsealed
from krrst_fast.runs.tensors import load_torch, save_tensors

FORMAT_VERSION = 1
FILE_NAME = "distilled.safetensors"
_METADATA_KEY = "krrst_fast"
_RELEASED = ("x_syn.pt", "y_syn.pt")
FAR = 8.0
"""Pixels of 0 to 255 are beyond it; those in [0, 1] are not, even where distillation moved them."""


def is_finite(value: object) -> bool:
    """Return whether a value, perhaps of a file, is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def refuse_bytes(images: Tensor, where: str) -> None:
    """Raise DataError where images look like pixels of 0 to 255.

    Args:
        images: [M, C, H, W] of floats, pixels in [0, 1] or normalised ones, which are on both sides
            of 0; a distillation may move either out of range.
        where: The file, for the message.
    """
    if images.numel() and images.min() >= 0 and images.max() > FAR:
        raise DataError(
            f"{where}: the images must be pixels in [0, 1], or such pixels normalised, got "
            f"{images.min():.4g} to {images.max():.4g}; divide pixels of 0 to 255 by 255"
        )


def require_unit(images: Tensor, where: str) -> None:
    """Raise DataError where images [M, C, H, W] are far outside of [0, 1]; `where` is the file.

    Far are values beyond `FAR`, and a quarter of all below -0.25 or above 1.25, as where images are
    normalised.
    """
    if not images.numel():
        return
    low, high = images.min().item(), images.max().item()
    outside = ((images < -0.25) | (images > 1.25)).float().mean().item()
    if max(-low, high) > FAR or outside > 0.25:
        raise DataError(
            f"{where}: the images must be pixels in [0, 1], got {low:.4g} to {high:.4g}, "
            f"{outside:.0%} of them below -0.25 or above 1.25"
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DistilledSet(Dataset[tuple[Tensor, Tensor]]):
    """Synthetic images with the outputs a network is to give on them: a dataset of pairs.

    `distilled[i]` is image i [C, H, W] with its target [P]; `loader` gives batches of them.

    Raises:
        DataError: The shapes do not fit each other, or a value is not finite.
    """

    images: Tensor
    """[M, C, H, W] float32, in the space the networks see: usually (pixel - mean) / std."""
    targets: Tensor
    """[M, P] float32, the target representations."""
    mean: tuple[float, ...]
    """Per channel, in [0, 1] units: `images * std + mean` are pixels."""
    std: tuple[float, ...]
    meta: Mapping[str, str] = field(default_factory=dict)
    """Where the set comes from; whatever the maker wrote."""

    def __post_init__(self) -> None:
        images, targets = tuple(self.images.shape), tuple(self.targets.shape)
        if len(images) != 4 or len(targets) != 2 or images[0] != targets[0]:
            raise DataError(
                "DistilledSet: images and targets must be [M, C, H, W] and [M, P], "
                f"got {images} and {targets}"
            )
        if not len(self.mean) == len(self.std) == images[1]:
            raise DataError(
                f"DistilledSet: mean and std must have {images[1]} items, one a channel, "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if not all(map(is_finite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise DataError(
                "DistilledSet: mean must be finite and std positive, "
                f"got {self.mean} and {self.std}"
            )
        for name, tensor in (("images", self.images), ("targets", self.targets)):
            if not torch.isfinite(tensor).all():
                raise DataError(f"DistilledSet: {name} hold NaN or infinity")
        texts = (*self.meta, *self.meta.values()) if isinstance(self.meta, Mapping) else (None,)
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"DistilledSet: meta must be texts by name, got {self.meta!r:.80}")

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.targets[index]

    def __repr__(self) -> str:
        size = "x".join(map(str, self.images.shape[1:]))
        maker = f", method={self.meta['method']!r}" if "method" in self.meta else ""
        return f"DistilledSet({len(self)} images of {size}, {self.targets.shape[1]} targets{maker})"

    def loader(
        self, batch_size: int, *, shuffle: bool = True, seed: int = 0, drop_last: bool = False
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return batches of (images [B, C, H, W], targets [B, P]), in an order that `seed` draws.

        Args:
            batch_size: How many images a batch holds.
            shuffle: Draw a new order for each epoch; the order of the set otherwise.
            seed: Of the orders: the same seed gives the same batches.
            drop_last: Leave out a last batch that is smaller.
        """
        return DataLoader(
            self,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            generator=torch.Generator().manual_seed(seed),
        )

    @classmethod
    def load(cls, path: str | Path) -> "DistilledSet":
        """Read a set from whatever `load_distilled` reads."""
        return load_distilled(path)

    def pixels(self) -> Tensor:
        """Return the images for display: [M, H, W, C] uint8, clipped to the range of a screen."""
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        scaled = (self.images.cpu() * std + mean) * 255
        return scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; the same set gives the same bytes."""
        header = {
            "format_version": FORMAT_VERSION,
            "mean": list(self.mean),
            "std": list(self.std),
            "meta": dict(self.meta),
        }
        tensors = {"images": self.images.float(), "targets": self.targets.float()}
        # One key, because safetensors writes several in an order that changes from run to run.
        save_tensors(Path(path), tensors, {_METADATA_KEY: json.dumps(header, sort_keys=True)})


def load_distilled(path: str | Path) -> DistilledSet:
    """Read a distilled set from a run folder, a file or released tensors, or a shipped one.

    Args:
        path: A `.safetensors` file, the folder of a distillation run, a folder with the released
            `x_syn.pt` and `y_syn.pt` (whose images are taken as pixels in [0, 1]), or the name of a
            set that comes with the package, "digits-30". A file or folder of that name in the
            current directory is taken instead, with a warning.

    Raises:
        DataError: There is no set there, or it is damaged.
    """
    path = file_of_set(path)
    if not path.is_dir():
        return _load_file(path)
    if (path / FILE_NAME).exists():
        found = _load_file(path / FILE_NAME)
        require_its_run(path, found, path / FILE_NAME)
        return found
    if all((path / name).exists() for name in _RELEASED):
        return _load_released(path)
    for name, what in (("target.safetensors", "target"), ("index.json", "store of images")):
        if (path / name).exists():
            raise DataError(f"{path}: is a {what}, not a distilled set")
    if (path / "checkpoint.pt").exists():
        raise DataError(f"{path}: the run is unfinished, and has no {FILE_NAME} yet; resume it")
    raise DataError(f"{path}: holds neither {FILE_NAME} nor {' and '.join(_RELEASED)}")


def require_its_run(folder: Path, found: DistilledSet, path: Path) -> None:
    """Raise DataError if a set, read from `path`, was made with other settings than a run folder's.

    A set that does not say its settings, or a folder without any, is taken.
    """
    if "config" not in found.meta or not (folder / "config.json").exists():
        return
    now = read_json(folder / "config.json")
    try:
        made = json.loads(found.meta["config"])
    except json.JSONDecodeError:
        made = None
    if not isinstance(made, dict) or not isinstance(now, dict):
        raise DataError(f"{path}: does not hold the settings of a run")
    made, now = flat(made), flat(now)
    changes = [
        f"{name} is {value!r} there and {now.get(name)!r} in config.json"
        for name, value in made.items()
        if now.get(name) != value
    ]
    if changes:
        raise DataError(f"{path}: is the set of another run: {'; '.join(changes)}")


def _load_file(path: Path) -> DistilledSet:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise DataError(f"{path}: {nothing_at(path)}")
    try:
        sealed = check_safetensors(path, failure=DataError)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if "krrst_fast.target" in metadata:
            raise DataError(f"{path}: is a target, not a distilled set")
        header = json.loads(metadata[_METADATA_KEY])
        if header["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{path}: format version {header['format_version']!r}, "
                f"this version of krrst_fast reads {FORMAT_VERSION}"
            )
        found = _build(path, tensors["images"], tensors["targets"], header)
        if not sealed:
            warn_unsealed(path, "distilled set")
        return found
    except SafetensorError as error:
        raise DataError(f"{path}: not a readable safetensors file ({error})") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a distilled set ({error!r})") from None


def _load_released(folder: Path) -> DistilledSet:
    """Read released tensors, which may require gradients and lie on a GPU."""
    tensors = []
    for name in _RELEASED:
        path = folder / name
        tensor = load_torch(path, what="tensor file", failure=DataError)
        if not isinstance(tensor, Tensor):
            raise DataError(f"{path}: holds a {type(tensor).__name__}, not a tensor")
        tensors.append(tensor.detach().float())
    images, targets = tensors
    refuse_bytes(images, str(folder / _RELEASED[0]))
    channels = images.shape[1] if images.ndim == 4 else 3
    unit = {"mean": [0.0] * channels, "std": [1.0] * channels, "meta": {"format": "released"}}
    return _build(folder, images, targets, unit)


def _build(path: Path, images: Tensor, targets: Tensor, header: dict[str, Any]) -> DistilledSet:
    try:
        return DistilledSet(
            images=images.float(),
            targets=targets.float(),
            mean=tuple(header["mean"]),
            std=tuple(header["std"]),
            meta=header["meta"],
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
