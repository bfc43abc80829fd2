"""Distilled sets that other projects, or `export_set`, have written."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from krrst_fast.distill.distilled_set import DistilledSet, is_finite, refuse_bytes, require_unit
from krrst_fast.errors import ConfigError, DataError
from krrst_fast.exchange.detect import detect, other_files
from krrst_fast.exchange.labels import KINDS, Labels, load_npy, targets_of
from krrst_fast.exchange.layouts import IMPORTS, Import, Read
from krrst_fast.exchange.write import FORMAT_VERSION, SIDECAR, TARGETS
from krrst_fast.runs.files import read_json


@dataclass(frozen=True)
class Imported:
    """A set that was read, and what of its file was not taken."""

    distilled: DistilledSet
    left_out: tuple[str, ...]
    source: str
    """The layout: a key of IMPORTS."""
    why: str = ""
    """What told the layout, if it was not given."""
    names: tuple[str, ...] = ()
    """The file of each image, in their order, where each is a file of its own."""


def import_set(
    path: str | Path,
    *,
    source: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    labels: Labels | None = None,
    classes: Sequence[str] = (),
) -> Imported:
    """Read a distilled set in the layout of another project.

    Classes become one-hot targets. Where `export_set` left its `krrst.json`, that says the rest.

    Args:
        path: The file, or the folder of the files.
        source: A key of IMPORTS; told by the names and contents of the files if left out.
        mean: Per channel, what the images were normalised by, in [0, 1] units; needed where the
            layout holds normalised images and no record of it. ZCA: give 0s, and 1s as `std`.
        std: Like `mean`.
        labels: Labels of the images instead of those of the file; in image folders, in the order
            of `Imported.names`. The names of class folders are not theirs.
        classes: Names of the classes in the order of the labels.

    Raises:
        ConfigError: There is no such layout, or it is not clear which it is, or the normalisation
            is not known or said twice.
        DataError: The files are missing, damaged, of another layout, or need objects unpickled.
    """
    path = Path(path)
    if source is not None and source not in IMPORTS:
        raise ConfigError(f"import: there is no format {source!r}; there are {', '.join(IMPORTS)}")
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    folder, why = path, ""
    if source is None:
        found = detect(path)
        path, source, why = found.path, found.source, found.why
    layout = IMPORTS[source]
    got = layout.read(path, layout.floats)
    try:
        built, read = _import(path, source, layout, got, mean, std, labels, classes)
    except DataError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise DataError(f"{where}{error}") from None
    others = other_files(folder, {*got.files, *read}) if folder.is_dir() else ()
    left = got.left_out if read else got.left_out + got.unrecorded
    if labels is not None and got.classes and not classes:
        left += (f"{len(got.classes)} names of folders: the labels that are given have no names",)
    return Imported(built, (*left, *others), source, why, got.names)


def _import(
    path: Path,
    source: str,
    layout: Import,
    got: Read,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    labels: Labels | None,
    classes: Sequence[str],
) -> tuple[DistilledSet, tuple[Path, ...]]:
    """Build the set of what was read; returns the files that it took beside."""
    if got.images.ndim != 4 or not got.images.is_floating_point():
        raise DataError(
            f"{path}: images must be [M, C, H, W] floats, "
            f"got {tuple(got.images.shape)} {got.images.dtype}"
        )
    sidecar = (path if path.is_dir() else path.parent) / SIDECAR
    if sidecar.exists() and _format_of(sidecar) == source:
        if mean is not None or std is not None or labels is not None or classes:
            raise ConfigError(f"import: {sidecar} already says mean, std, labels and classes")
        ours = (sidecar, *(sidecar.parent / name for name in _BESIDE))
        return _recorded(sidecar, got, layout), ours
    channels = got.images.shape[1]
    if (mean is None) != (std is None):
        raise ConfigError("import: --mean and --std must be given together")
    if got.scale is not None:
        if mean is not None:
            raise ConfigError(f"import: {path} already says mean and std")
        mean, std = got.scale
    elif mean is None or std is None:
        if not layout.unit:
            raise ConfigError(
                f"import: {source} files do not say how their images were normalised; "
                "give --mean and --std, one number a channel"
            )
        mean, std = (0.0,) * channels, (1.0,) * channels
    elif layout.unit:
        raise ConfigError(f"import: images of {source} are pixels; leave out --mean and --std")
    if not mean or not std:
        raise ConfigError("import: --mean and --std must be a number a channel")
    if max(*mean, *std) > 1 or min(mean) < 0:
        raise ConfigError(
            "import: --mean and --std must be in units of [0, 1] pixels: divide those of 0 to 255 "
            f"by 255; got {tuple(mean)} and {tuple(std)}"
        )
    (require_unit if layout.unit else refuse_bytes)(got.images, str(path))
    found = labels or got.labels
    if found is None:
        raise DataError(f"{path}: holds no labels; give them with --labels")
    if len(found.values) != len(got.images):
        raise DataError(f"{path}: {len(got.images)} images, and {len(found.values)} labels")
    # Names that the files have belong to the labels of the files, not to a user's.
    names = tuple(classes) or (got.classes if labels is None else ())
    if classes and got.classes and labels is None:
        # Folders have names already: these say which number each of them gets.
        if missing := set(got.classes) - set(classes):
            raise ConfigError(f"import: --classes lacks {', '.join(sorted(missing))}")
        order = torch.tensor([names.index(name) for name in got.classes])
        found = Labels(found.kind, order[found.values]) if found else found
    meta = {"method": f"imported from {source}", "label_kind": found.kind, **got.meta}
    if names:
        meta["classes"] = json.dumps(names)
    built = DistilledSet(
        images=got.images.float(),
        targets=targets_of(found, names),
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        meta=meta,
    )
    return built, ()


def _a_channel(values: object, name: str) -> tuple[float, ...]:
    """Return what a record says of each channel as floats."""
    if not isinstance(values, list) or not all(map(is_finite, values)):
        raise ValueError(f"{name} must be a list of numbers, got {values!r:.60}")
    return tuple(map(float, values))


_BESIDE = (TARGETS, "README.md", "train/metadata.jsonl")
"""What `export_set` writes beside the record and the files of a layout."""


def _format_of(sidecar: Path) -> object:
    about = read_json(sidecar)
    return about.get("format") if isinstance(about, Mapping) else None


def _recorded(sidecar: Path, got: Read, layout: Import) -> DistilledSet:
    """Build the set that `export_set` wrote, and compare the files with its record."""
    about = read_json(sidecar)
    try:
        if about["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{sidecar}: format version {about['format_version']!r}, "
                f"this version of krrst_fast reads {FORMAT_VERSION}"
            )
        mean, std = (_a_channel(about[name], name) for name in ("mean", "std"))
        shape, meta, recorded = about["shape"], dict(about["meta"]), about["labels"]
        kind = about["label_kind"]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{sidecar}: not a record of an export ({error!r})") from None
    if kind not in KINDS:
        raise DataError(f"{sidecar}: label_kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if {len(mean), len(std)} != {got.images.shape[1]}:
        raise DataError(f"{sidecar}: must say mean and std a channel, got {mean} and {std}")
    if list(got.images.shape) != shape:
        raise DataError(f"{sidecar}: says images {shape}, the files hold {list(got.images.shape)}")
    if recorded is not None and (got.labels is None or got.labels.values.tolist() != recorded):
        raise DataError(f"{sidecar}: the labels in the files are not those that were exported")
    at = sidecar.with_name(TARGETS)
    targets = load_npy(at)
    if targets.is_complex():
        raise DataError(f"{at}: must hold real numbers, got {targets.dtype}")
    targets = targets.float()
    # The targets may be representations, and the soft labels a user's own.
    same = kind == "soft" == about.get("target_kind") and got.labels is not None
    if same and not torch.equal(got.labels.values, targets):  # type: ignore[union-attr]
        raise DataError(f"{sidecar}: the labels in the files are not those of {TARGETS}")
    images = got.images.double()
    if layout.unit:
        centre, spread = (torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in (mean, std))
        images = (images - centre) / spread
    return DistilledSet(images=images.float(), targets=targets, mean=mean, std=std, meta=meta)
