"""The tensors that the KRR-ST authors released: X_tr_32.pth, Y_tr_32.pth, X_te_32.pth, ..."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy.typing as npt
import torch
from torch import Tensor

from krrst_fast.data.formats import arrays
from krrst_fast.data.source import Item, Source, Split
from krrst_fast.errors import DataError
from krrst_fast.runs.tensors import load_torch

_NAME = re.compile(r"X_(tr|te)(?:_(\d+))?\.pth")
_SPLIT = {"tr": "train", "te": "test"}


def find(path: Path, size: int) -> list[Path]:
    """Return the image tensors at `path`: of several sizes those of `size`; of a file, its set."""
    by_size = find_all(path if path.is_dir() else path.parent)
    if match := _NAME.fullmatch(path.name):
        return by_size.get(match[2] or "", [])
    if len(by_size) > 1 and str(size) not in by_size:
        raise DataError(f"{path}: has image tensors of sizes {sorted(by_size)}, none of {size}")
    return by_size.get(str(size), next(iter(by_size.values()), []))


def find_all(folder: Path) -> dict[str, list[Path]]:
    """Return the image tensors in a folder by the size in their names."""
    by_size: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("X_t*.pth")):
        if (match := _NAME.fullmatch(file.name)) and file.is_file():
            by_size.setdefault(match[2] or "", []).append(file)
    return by_size


def files(images: list[Path]) -> set[Path]:
    """Return the files that are read: the image tensors, and their labels where they exist."""
    return {*images, *(labels for path in images if (labels := _labels_of(path)))}


def _labels_of(path: Path) -> Path | None:
    names = (path.name.replace("X", "Y", 1), re.sub(r"X_(t.).*", r"Y_\1.pth", path.name))
    return next((path.parent / name for name in names if (path.parent / name).is_file()), None)


def read(files: list[Path]) -> Source:
    """Read images [N, C, H, W], uint8 or floats in [0, 1], and integer labels if Y_* exists.

    The released floats are pixels over 255, so the nearest of 256 levels is the pixel itself;
    normalised floats do not say what they were, and are refused.
    """
    splits = []
    for path in files:
        match = _NAME.fullmatch(path.name)
        assert match is not None
        splits.append(Split(_SPLIT[match[1]], _items(path)))
    return Source("released tensors", tuple(splits))


def _items(path: Path) -> Iterator[Item]:
    images = load(path)  # [N, C, H, W]
    labels = None
    if beside := _labels_of(path):
        labels = arrays.as_labels(str(beside), load(beside).numpy(), len(images))
    yield from arrays.items(str(path), _blocks(images), tuple(images.shape), labels)


def _blocks(images: Tensor) -> Iterator[npt.NDArray]:
    for block in images.split(arrays.BLOCK):
        yield (block.float() if block.dtype == torch.bfloat16 else block).numpy()


def load(path: Path) -> Tensor:
    """Read the tensor in a file, memory-mapped if possible; nothing else is unpickled.

    Raises:
        DataError: Damaged, or holds something else.
    """
    value = load_torch(path, what="tensor file", failure=DataError, mmap=True)
    if not isinstance(value, Tensor) or value.ndim == 0:
        raise DataError(f"{path}: holds a {type(value).__name__}, need one tensor of rows")
    stored = value.untyped_storage().nbytes()
    if value.numel() * value.element_size() > stored:
        raise DataError(f"{path}: repeats {stored} bytes as a tensor of {list(value.shape)}")
    return value.detach()
