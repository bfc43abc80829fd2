"""The files of other projects' distilled sets: one reader a layout."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from krrst_fast.data.source import natural
from krrst_fast.errors import DataError
from krrst_fast.exchange.labels import Kind, Labels, as_labels, tensor_of
from krrst_fast.exchange.write import SIDECAR
from krrst_fast.runs.tensors import load_torch

STEP = r"(\d+|best)"
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Read:
    """What a reader found."""

    images: Tensor
    labels: Labels | None
    left_out: tuple[str, ...] = ()
    """What of its own files it did not take."""
    unrecorded: tuple[str, ...] = ()
    """What it did not take, unless the record of an export has it."""
    classes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    """The files it read or has named in `left_out`."""
    scale: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and std a channel, where the files hold them."""
    names: tuple[str, ...] = ()
    """The file of each image, in their order, where each is a file of its own."""
    meta: Mapping[str, str] = field(default_factory=dict)
    """What else the files say."""


@dataclass(frozen=True)
class Import:
    """A layout that is read."""

    read: Callable[[Path, Kind], Read]
    floats: Kind
    """What labels [M, P] of floats are in this layout."""
    unit: bool = False
    """Its images are in [0, 1] units, not normalised."""


def load_plain(path: Path) -> Any:
    """Load what torch.save wrote: tensors, plain values, and NumPy's numbers among accuracies."""
    # Built by hand, for a file may name the module of an older NumPy. Neither runs any code.
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    allowed: list[Any] = [np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
    allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(allowed):
            return load_torch(path, what="tensor file", failure=DataError)
    except DataError as error:
        if "holds more than tensors" not in str(error):
            raise
        raise DataError(
            f"{path}: holds Python objects, which could run code and are not unpickled; load it "
            "where you trust it, and torch.save its tensors of images and labels alone"
        ) from None


def load_tensor(path: Path) -> Tensor:
    """Load a file that holds one tensor."""
    value = load_plain(path)
    if not isinstance(value, Tensor):
        raise DataError(f"{path}: holds a {type(value).__name__}, not a tensor")
    return value.detach()


def _pair(images: str, labels: str) -> Callable[[Path, Kind], Read]:
    """Return a reader of two tensor files; `*` in the names is a number or `best`."""

    def read(path: Path, floats: Kind) -> Read:
        pattern = re.compile(re.escape(images).replace(r"\*", STEP))
        folder = path if path.is_dir() else path.parent
        found = sorted(x.name for x in folder.iterdir() if pattern.fullmatch(x.name))
        name = path.name if not path.is_dir() else images.replace("*", "best")
        if path.is_dir() and name not in found and len(found) == 1:
            name = found[0]
        match = pattern.fullmatch(name)
        if match is None or name not in found:
            raise DataError(
                f"{path}: must be a file {images} or a folder of one, found {found or 'none'}"
            )
        values = load_tensor(folder / name)

        def beside(pattern: str) -> Path:
            return folder / (pattern.replace("*", match[1]) if match.groups() else pattern)

        at, given = beside(labels), None
        if at.exists():
            given = as_labels(load_tensor(at), len(values), floats, str(at))
        rate = beside(images.replace("images", "lr"))
        meta, odd = _learned_rate(rate)
        others = tuple(f"{other}, another step" for other in found if other != name)
        files = (*(folder / name for name in found), at, rate)
        return Read(values, given, others + odd, files=files, meta=meta)

    return read


def _mkdt(path: Path, floats: Kind) -> Read:
    got = _pair("images_*.pt", "labels_*.pt")(path, floats)
    if got.labels is not None and got.labels.kind != floats:
        raise DataError(
            f"{path}: its labels are classes, and those of MKDT are representations [M, P]; "
            "read a set with classes by --from mtt"
        )
    return got


def _learned_rate(path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return a learned learning rate as metadata; what the file holds instead is left out."""
    if not path.exists():
        return {}, ()
    value = load_plain(path)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return {"learning_rate": repr(float(value))}, ()
    return {}, (f"{path.name}: holds no single number",)


def _dc(path: Path, floats: Kind) -> Read:
    data = load_plain(path)
    try:
        trials = list(data["data"])
        images, values = trials[-1]
    except (KeyError, TypeError, IndexError, ValueError):
        raise DataError(f"{path}: not a res_*.pt of DC, DSA or DM: data[-1] is no pair") from None
    if not isinstance(images, Tensor) or not isinstance(values, Tensor):
        raise DataError(f"{path}: data[-1] must be a pair of tensors")
    earlier = (f"{len(trials) - 1} earlier trials of data",) if len(trials) > 1 else ()
    labels = as_labels(values.detach(), len(images), floats, str(path))
    others = tuple(f"{key} of the file" for key in data if key != "data")
    return Read(images.detach(), labels, earlier + others, files=(path,))


def _dcbench(path: Path, floats: Kind) -> Read:
    if path.is_file() and path.name.startswith("res_"):
        return _dc(path, floats)
    return _pair("images_*.pt", "labels_*.pt")(path, floats)


def _lgm(path: Path, floats: Kind) -> Read:
    file = path / "data.pth" if path.is_dir() else path
    data = load_plain(file)
    if not isinstance(data, dict) or not all(
        isinstance(data.get(key), Tensor) for key in ("images", "labels")
    ):
        raise DataError(f"{file}: must hold a dict with tensors images and labels")
    images = data["images"].detach()
    others = tuple(f"{key} of the file" for key in data if key not in ("images", "labels"))
    labels = as_labels(data["labels"].detach(), len(images), floats, str(file))
    return Read(images, labels, others, files=(file,))


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Load an .npz of plain arrays."""
    try:
        # Opened here: NumPy leaves a file open that is no archive.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except Exception as error:  # damaged bytes lead NumPy to errors of any type
        raise DataError(f"{path}: not a readable .npz of plain arrays ({error})") from None


def _as_tensor(array: np.ndarray, where: str) -> Tensor:
    try:
        return tensor_of(array)
    except TypeError:
        raise DataError(f"{where}: must hold numbers, found {array.dtype}") from None


def _frepo(path: Path, floats: Kind) -> Read:
    arrays = load_arrays(path)
    if not {"image", "label"} <= set(arrays) or arrays["image"].ndim != 4:
        raise DataError(f"{path}: must hold image [M, H, W, C] and label, found {sorted(arrays)}")
    images = _as_tensor(arrays["image"], f"{path}: image").permute(0, 3, 1, 2).contiguous()
    label = _as_tensor(arrays["label"], f"{path}: label")
    labels = as_labels(label, len(images), floats, str(path))
    others = tuple(f"{key} of the file" for key in arrays if key not in ("image", "label"))
    return Read(images, labels, others, files=(path,))


def _npz(path: Path, floats: Kind) -> Read:
    file = path / "distilled.npz" if path.is_dir() else path
    arrays = load_arrays(file)
    if "images" not in arrays or not {"targets", "labels"} & set(arrays):
        raise DataError(f"{file}: must hold images, and targets or labels, found {sorted(arrays)}")
    # The labels, which may be a user's own, are what the record of an export is compared with.
    chosen = "labels" if "labels" in arrays else "targets"
    images = _as_tensor(arrays["images"], f"{file}: images")
    kind: Kind = "soft" if chosen == "labels" else floats
    values = _as_tensor(arrays[chosen], f"{file}: {chosen}")
    labels = as_labels(values, len(images), kind, str(file))
    dropped: tuple[str, ...] = ()
    if chosen == "labels" and "targets" in arrays:
        shape = "x".join(map(str, arrays["targets"].shape))
        dropped = (f"targets of the file ({shape}): its labels are the targets of the set",)
    known = {"images", "labels", "targets"}
    scale = None
    if {"mean", "std"} <= set(arrays):
        scale = _channels(arrays["mean"], file), _channels(arrays["std"], file)
        known |= {"mean", "std"}
    others = tuple(f"{key} of the file" for key in arrays if key not in known)
    return Read(images, labels, others, dropped, files=(file,), scale=scale)


def _channels(values: np.ndarray, file: Path) -> tuple[float, ...]:
    if values.ndim != 1 or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise DataError(f"{file}: mean and std must be a number a channel")
    return tuple(map(float, values))


def visible_images(root: Path) -> tuple[list[Path], list[Path]]:
    """List the image files below a folder; second those that are hidden or in a hidden folder."""
    shown: list[Path] = []
    hidden: list[Path] = []
    for file in root.rglob("*"):
        if file.suffix.lower() in IMAGE_ENDINGS and file.is_file():
            parts = file.relative_to(root).parts
            (hidden if any(part.startswith(".") for part in parts) else shown).append(file)
    return shown, hidden


def _imagefolder(path: Path, floats: Kind) -> Read:
    root = path / "train" if (path / "train").is_dir() else path
    if not root.is_dir():
        raise DataError(f"{path}: imagefolder is a folder, and this is a file")
    found, hidden = visible_images(root)
    if not found:
        raise DataError(f"{path}: there is no {' or '.join(IMAGE_ENDINGS)} file")
    recorded = (path / SIDECAR).exists()

    def order(file: Path) -> list[Any]:
        # An export numbers its images through all class folders.
        parts = file.relative_to(root).parts
        return [natural(part) for part in ((file.name, *parts) if recorded else parts)]

    files = sorted(found, key=order)
    images = _pixels(path, files)
    left: tuple[str, ...] = ()
    if hidden:
        first = min(hidden).relative_to(root).as_posix()
        left = (f"{len(hidden)} hidden images, such as {first}",)
    took = tuple(files) + tuple(hidden)
    names = tuple(file.relative_to(root).as_posix() for file in files)
    folders = [file.parent.relative_to(root).as_posix() for file in files]
    if "." in folders:
        return Read(images, None, left, files=took, names=names)
    classes = tuple(sorted(set(folders), key=natural))
    numbered = [re.match(r"(\d{4,})(?:_|$)", name) for name in classes]
    if recorded and all(numbered):
        # A class without an image has no folder: the number counts, not the place.
        index = {name: int(match[1]) for name, match in zip(classes, numbered) if match}
        classes = ()
    else:
        index = {name: place for place, name in enumerate(classes)}
    labels = Labels("class", torch.tensor([index[folder] for folder in folders]))
    return Read(images, labels, left, classes=classes, files=took, names=names)


def _pixels(path: Path, files: Sequence[Path]) -> Tensor:
    """Read image files of one size as [M, C, H, W] floats in [0, 1]."""
    from PIL import Image

    pixels = []
    for file in files:
        try:
            with Image.open(file) as image:
                if image.mode not in ("L", "RGB"):
                    raise DataError(f"{file}: must be a grey or RGB image, got {image.mode}")
                pixels.append(np.atleast_3d(np.array(image)))
        except OSError as error:
            raise DataError(f"{file}: not a readable image ({error})") from None
    if len({(array.shape, array.dtype) for array in pixels}) > 1 or pixels[0].dtype != np.uint8:
        raise DataError(f"{path}: the images must be of 8 bits and of one size")
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255


IMPORTS: Mapping[str, Import] = {
    "dc": Import(_dc, "soft"),
    "dsa": Import(_dc, "soft"),
    "dm": Import(_dc, "soft"),
    "mtt": Import(_pair("images_*.pt", "labels_*.pt"), "soft"),
    "mkdt": Import(_mkdt, "representation"),
    "frepo": Import(_frepo, "soft"),
    "ddranking": Import(_pair("images.pt", "labels.pt"), "soft"),
    "dcbench": Import(_dcbench, "soft"),
    "datm": Import(_pair("images_*.pt", "labels_*.pt"), "soft"),
    "lgm": Import(_lgm, "soft", unit=True),
    "imagefolder": Import(_imagefolder, "soft", unit=True),
    "npz": Import(_npz, "representation"),
}
