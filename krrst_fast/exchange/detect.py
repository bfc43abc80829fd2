"""Which layout a file or a folder has, by its names and, where these do not say, its contents."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from krrst_fast.distill.distilled_set import FILE_NAME
from krrst_fast.errors import ConfigError, DataError
from krrst_fast.exchange.layouts import (
    IMPORTS,
    STEP,
    load_arrays,
    load_plain,
    load_tensor,
    visible_images,
)
from krrst_fast.exchange.write import SIDECAR
from krrst_fast.runs.files import read_json

_FIXED = {"data.pth": "lgm", "images.pt": "ddranking", "distilled.npz": "npz"}
_STEPS = re.compile(rf"images_{STEP}\.pt")
_RESULTS = re.compile(r"res_.*\.pt")
_MOST_NAMES = 10


@dataclass(frozen=True)
class Detected:
    """What a path was taken for."""

    path: Path
    """What to read: the path, or the one file in it that matters."""
    source: str
    """A key of IMPORTS."""
    why: str


def detect(path: Path) -> Detected:
    """Return the layout of a file or folder.

    Raises:
        ConfigError: It may be more than one, and the user has to say which.
        DataError: It is none, or is damaged.
    """
    if not path.is_dir():
        return _of_file(path)
    if (path / SIDECAR).exists():
        recorded = read_json(path / SIDECAR)
        source = recorded.get("format") if isinstance(recorded, dict) else None
        if isinstance(source, str) and source in IMPORTS:
            return Detected(path, source, f"{SIDECAR} says so")
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    if FILE_NAME in names or "x_syn.pt" in names:
        raise ConfigError(f"{path}: is a distilled set already: every command reads it as it is")
    found = [name for name in names if name in _FIXED or _RESULTS.fullmatch(name)]
    found += [name for name in names if _is_archive(name) and name not in found]
    steps = [name for name in names if _STEPS.fullmatch(name)]
    if steps:
        found.append("images_best.pt" if "images_best.pt" in steps else steps[-1])
    if len(found) > 1 or (len(steps) > 1 and "images_best.pt" not in steps):
        choices = ", ".join(sorted({*found, *steps}))
        raise ConfigError(f"{path}: holds several sets; give the path of one: {choices}")
    if found:
        one = _of_file(path / found[0])
        # Readers of pairs of files see what else is in the folder.
        return Detected(path if one.source in _PAIRS else one.path, one.source, one.why)
    root = path / "train" if (path / "train").is_dir() else path
    if visible_images(root)[0]:
        return Detected(path, "imagefolder", "it holds image files")
    listed = ", ".join(names[:_MOST_NAMES]) or "no file"
    raise DataError(f"{path}: holds no distilled set of a known layout, but {listed}")


def _is_archive(name: str) -> bool:
    return name.endswith(".npz") and not name.startswith(".")


_PAIRS = ("ddranking", "mtt", "datm", "dcbench")


def _of_file(path: Path) -> Detected:
    name = path.name
    if (match := _STEPS.fullmatch(name)) is not None:
        return _of_pair(path, match[1])
    if name in _FIXED and _FIXED[name] != "npz":
        return Detected(path, _FIXED[name], f"{name} is a name of its files")
    if path.suffix == ".npz":
        keys = set(load_arrays(path))
        if {"image", "label"} <= keys:
            return Detected(path, "frepo", "it holds image and label")
        if "images" in keys and {"targets", "labels"} & keys:
            return Detected(path, "npz", "it holds images and targets or labels")
        raise DataError(
            f"{path}: must hold image and label (FRePo), or images and targets or labels (npz), "
            f"found {sorted(keys)}"
        )
    if path.suffix not in (".pt", ".pth"):
        raise DataError(f"{path}: is no .pt, .pth or .npz file, nor a folder")
    value = load_plain(path)
    if isinstance(value, dict) and "data" in value:
        method = re.match(r"res_(dc|dsa|dm)(?![a-z])", name.lower())
        source = method[1] if method else "dc"
        return Detected(path, source, "it holds the trials of DC, DSA or DM")
    if isinstance(value, dict) and {"images", "labels"} <= set(value):
        raise ConfigError(
            f"{path}: holds images and labels; give --from lgm if its images are pixels in [0, 1], "
            "else save images.pt and labels.pt and give --from ddranking"
        )
    what = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
    raise DataError(f"{path}: is no file of a known layout: it holds {what}")


def _of_pair(path: Path, step: str) -> Detected:
    beside = path.with_name(f"labels_{step}.pt")
    of_classes = "dcbench" if step == "best" else "mtt"
    if not beside.exists():
        return Detected(path, of_classes, f"of its name; there is no {beside.name}")
    labels = load_tensor(beside)
    if not labels.is_floating_point():
        return Detected(path, of_classes, f"{beside.name} holds classes")
    if labels.ndim == 2 and _sums_to_one(labels):
        return Detected(path, "datm", f"each row of {beside.name} is a distribution over classes")
    raise ConfigError(
        f"{path}: {beside.name} may hold scores of classes or representations; "
        "give --from datm or --from mkdt"
    )


def _sums_to_one(labels: Tensor) -> bool:
    sums = labels.float().sum(1)
    return bool((labels >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)


def other_files(folder: Path, read: Collection[Path]) -> tuple[str, ...]:
    """Return what lies in a folder beside the files that were read: each, or how many."""
    known = {path.resolve() for path in read}
    others = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.resolve() not in known
    )
    if len(others) <= _MOST_NAMES:
        return tuple(others)
    return (f"{len(others)} other files, such as {', '.join(others[:3])}",)
