"""Distilled sets that other projects, or `export_set`, have written."""

import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from krrst_fast.data.source import natural
from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.errors import ConfigError, DataError
from krrst_fast.exchange.labels import Kind, Labels, as_labels, targets_of
from krrst_fast.exchange.write import FORMAT_VERSION, SIDECAR, TARGETS
from krrst_fast.runs.files import read_json
from krrst_fast.runs.tensors import load_torch


@dataclass(frozen=True)
class Imported:
    """A set that was read, and what of its file was not taken."""

    distilled: DistilledSet
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Read:
    images: Tensor
    labels: Labels | None
    left_out: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Import:
    read: Callable[[Path, Kind], _Read]
    floats: Kind
    """What labels [M, P] of floats are in this layout."""
    unit: bool = False
    """Its images are in [0, 1] units, not normalised."""


def import_set(
    path: str | Path,
    *,
    source: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    labels: Labels | None = None,
    classes: Sequence[str] = (),
) -> Imported:
    """Read a distilled set in the layout of another project.

    Classes become one-hot targets. Where `export_set` left its `krrst.json`, that says the rest.

    Args:
        path: The file, or the folder of the files.
        source: A key of IMPORTS.
        mean: Per channel, what the images were normalised by, in [0, 1] units; needed where the
            layout holds normalised images and no record of it. ZCA: give 0s, and 1s as `std`.
        std: Like `mean`.
        labels: Labels of the images instead of those of the file.
        classes: Names of the classes in the order of the labels.

    Raises:
        ConfigError: There is no such layout, or the normalisation is not known or said twice.
        DataError: The files are missing, damaged, of another layout, or need objects unpickled.
    """
    path = Path(path)
    if source not in IMPORTS:
        raise ConfigError(f"import: there is no format {source!r}; there are {', '.join(IMPORTS)}")
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    layout = IMPORTS[source]
    got = layout.read(path, layout.floats)
    if got.images.ndim != 4 or not got.images.is_floating_point():
        raise DataError(
            f"{path}: images must be [M, C, H, W] floats, "
            f"got {tuple(got.images.shape)} {got.images.dtype}"
        )
    sidecar = (path if path.is_dir() else path.parent) / SIDECAR
    if sidecar.exists() and read_json(sidecar).get("format") == source:
        if mean is not None or std is not None or labels is not None or classes:
            raise ConfigError(f"import: {sidecar} already says mean, std, labels and classes")
        return _recorded(sidecar, got, layout)
    channels = got.images.shape[1]
    if (mean is None) != (std is None):
        raise ConfigError("import: --mean and --std must be given together")
    if mean is None or std is None:
        if not layout.unit:
            raise ConfigError(
                f"import: {source} files do not say how their images were normalised; "
                "give --mean and --std, one number a channel"
            )
        mean, std = (0.0,) * channels, (1.0,) * channels
    elif layout.unit:
        raise ConfigError(f"import: images of {source} are pixels; leave out --mean and --std")
    if max(*mean, *std) > 1 or min(mean) < 0:
        raise ConfigError(
            "import: --mean and --std must be in units of [0, 1] pixels: divide those of 0 to 255 "
            f"by 255; got {tuple(mean)} and {tuple(std)}"
        )
    found = labels or got.labels
    if found is None:
        raise DataError(f"{path}: holds no labels; give them with --labels")
    if len(found.values) != len(got.images):
        raise DataError(f"{path}: {len(got.images)} images, and {len(found.values)} labels")
    names = tuple(classes) or got.classes
    if classes and got.classes and labels is None:
        # Folders have names already: these say which number each of them gets.
        if missing := set(got.classes) - set(classes):
            raise ConfigError(f"import: --classes lacks {', '.join(sorted(missing))}")
        order = torch.tensor([names.index(name) for name in got.classes])
        found = Labels(found.kind, order[found.values]) if found else found
    meta = {"method": f"imported from {source}", "label_kind": found.kind}
    if names:
        meta["classes"] = json.dumps(names)
    distilled = DistilledSet(
        images=got.images.float(),
        targets=targets_of(found, names),
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        meta=meta,
    )
    return Imported(distilled, got.left_out)


def _recorded(sidecar: Path, got: _Read, layout: _Import) -> Imported:
    """Build the set that `export_set` wrote, and compare the files with its record."""
    about = read_json(sidecar)
    try:
        if about["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{sidecar}: format version {about['format_version']!r}, "
                f"this version of krrst_fast reads {FORMAT_VERSION}"
            )
        mean, std = tuple(about["mean"]), tuple(about["std"])
        shape, meta, recorded = about["shape"], dict(about["meta"]), about["labels"]
        kind = about["label_kind"]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{sidecar}: not a record of an export ({error!r})") from None
    if list(got.images.shape) != shape:
        raise DataError(f"{sidecar}: says images {shape}, the files hold {list(got.images.shape)}")
    if recorded is not None and (got.labels is None or got.labels.values.tolist() != recorded):
        raise DataError(f"{sidecar}: the labels in the files are not those that were exported")
    targets = torch.from_numpy(_npy(sidecar.with_name(TARGETS))).float()
    # The targets may be representations, and the soft labels a user's own.
    same = kind == "soft" == about.get("target_kind") and got.labels is not None
    if same and not torch.equal(got.labels.values, targets):  # type: ignore[union-attr]
        raise DataError(f"{sidecar}: the labels in the files are not those of {TARGETS}")
    images = got.images.double()
    if layout.unit:
        centre, spread = (torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in (mean, std))
        images = (images - centre) / spread
    built = DistilledSet(images=images.float(), targets=targets, mean=mean, std=std, meta=meta)
    return Imported(built, got.left_out)


def _npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: not a readable array ({error})") from None


def _torch(path: Path) -> Any:
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


def _tensor(path: Path) -> Tensor:
    value = _torch(path)
    if not isinstance(value, Tensor):
        raise DataError(f"{path}: holds a {type(value).__name__}, not a tensor")
    return value.detach()


def _pair(images: str, labels: str) -> Callable[[Path, Kind], _Read]:
    """Return a reader of two tensor files; `*` in the names is a number or `best`."""

    def read(path: Path, floats: Kind) -> _Read:
        pattern = re.compile(re.escape(images).replace(r"\*", r"(\d+|best)"))
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
        values = _tensor(folder / name)
        beside = folder / (labels.replace("*", match[1]) if match.groups() else labels)
        given = (
            as_labels(_tensor(beside), len(values), floats, str(beside))
            if (beside.exists())
            else None
        )
        others = tuple(f"{other}, another step" for other in found if other != name)
        return _Read(values, given, others)

    return read


def _dc(path: Path, floats: Kind) -> _Read:
    data = _torch(path)
    try:
        trials = list(data["data"])
        images, values = trials[-1]
    except (KeyError, TypeError, IndexError, ValueError):
        raise DataError(f"{path}: not a res_*.pt of DC, DSA or DM: data[-1] is no pair") from None
    if not isinstance(images, Tensor) or not isinstance(values, Tensor):
        raise DataError(f"{path}: data[-1] must be a pair of tensors")
    earlier = (f"{len(trials) - 1} earlier trials of data",) if len(trials) > 1 else ()
    return _Read(images.detach(), as_labels(values, len(images), floats, str(path)), earlier)


def _dcbench(path: Path, floats: Kind) -> _Read:
    if path.is_file() and path.name.startswith("res_"):
        return _dc(path, floats)
    return _pair("images_*.pt", "labels_*.pt")(path, floats)


def _lgm(path: Path, floats: Kind) -> _Read:
    file = path / "data.pth" if path.is_dir() else path
    data = _torch(file)
    if not isinstance(data, dict) or not all(
        isinstance(data.get(key), Tensor) for key in ("images", "labels")
    ):
        raise DataError(f"{file}: must hold a dict with tensors images and labels")
    images = data["images"].detach()
    others = tuple(f"{key} of the file" for key in data if key not in ("images", "labels"))
    return _Read(images, as_labels(data["labels"], len(images), floats, str(file)), others)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        # Opened here: NumPy leaves a file open that is no archive.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable .npz of plain arrays ({error})") from None


def _frepo(path: Path, floats: Kind) -> _Read:
    arrays = _arrays(path)
    if not {"image", "label"} <= set(arrays) or arrays["image"].ndim != 4:
        raise DataError(f"{path}: must hold image [M, H, W, C] and label, found {sorted(arrays)}")
    images = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2).contiguous()
    labels = as_labels(torch.from_numpy(arrays["label"]), len(images), floats, str(path))
    others = tuple(f"{key} of the file" for key in arrays if key not in ("image", "label"))
    return _Read(images, labels, others)


def _npz(path: Path, floats: Kind) -> _Read:
    file = path / "distilled.npz" if path.is_dir() else path
    arrays = _arrays(file)
    if "images" not in arrays or not {"targets", "labels"} & set(arrays):
        raise DataError(f"{file}: must hold images, and targets or labels, found {sorted(arrays)}")
    # The labels, which may be a user's own, are what the record of an export is compared with.
    chosen = "labels" if "labels" in arrays else "targets"
    images = torch.from_numpy(arrays["images"])
    kind: Kind = "soft" if chosen == "labels" else floats
    labels = as_labels(torch.from_numpy(arrays[chosen]), len(images), kind, str(file))
    return _Read(images, labels)


def _imagefolder(path: Path, floats: Kind) -> _Read:
    from PIL import Image

    root = path / "train" if (path / "train").is_dir() else path
    if not root.is_dir():
        raise DataError(f"{path}: imagefolder is a folder, and this is a file")
    files = sorted(root.rglob("*.png"), key=lambda file: (natural(file.name), natural(str(file))))
    if not files:
        raise DataError(f"{path}: there is no .png file")
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
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    others = [x for x in root.rglob("*") if x.is_file() and x not in set(files)]
    left = tuple(str(x.relative_to(root)) for x in others if x.name != "metadata.jsonl")
    folders = [file.parent.relative_to(root).as_posix() for file in files]
    if "." in folders:
        return _Read(images, None, left)
    names = tuple(sorted(set(folders), key=natural))
    numbered = [re.match(r"(\d{4})(?:_|$)", name) for name in names]
    if (path / SIDECAR).exists() and all(numbered):
        # A class without an image has no folder: the number counts, not the place.
        index = {name: int(match[1]) for name, match in zip(names, numbered) if match}
        names = ()
    else:
        index = {name: place for place, name in enumerate(names)}
    labels = Labels("class", torch.tensor([index[folder] for folder in folders]))
    return _Read(images, labels, left, names)


IMPORTS: Mapping[str, _Import] = {
    "dc": _Import(_dc, "soft"),
    "dsa": _Import(_dc, "soft"),
    "dm": _Import(_dc, "soft"),
    "mtt": _Import(_pair("images_*.pt", "labels_*.pt"), "soft"),
    "mkdt": _Import(_pair("images_*.pt", "labels_*.pt"), "representation"),
    "frepo": _Import(_frepo, "soft"),
    "ddranking": _Import(_pair("images.pt", "labels.pt"), "soft"),
    "dcbench": _Import(_dcbench, "soft"),
    "datm": _Import(_pair("images_*.pt", "labels_*.pt"), "soft"),
    "lgm": _Import(_lgm, "soft", unit=True),
    "imagefolder": _Import(_imagefolder, "soft", unit=True),
    "npz": _Import(_npz, "representation"),
}
