"""The packed image store: raw uint8 pixels that are memory-mapped, labels, and an index."""

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from krrst_fast.data.config import INDEX
from krrst_fast.data.source import MOST_CLASSES, UNLABELLED
from krrst_fast.errors import DataError
from krrst_fast.runs.files import read_json, recover_folder, write_json

FORMAT_VERSION = 1
CHANNELS = 3
IMAGES, LABELS = "images.u8", "labels.i64"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class ImageStore:
    """A folder of decoded images, opened for reading."""

    path: Path
    size: int
    channels: int
    classes: tuple[str, ...]
    """Class names by label; empty where nothing is labelled."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of each channel of the train split, in units where a pixel is in [0, 1]."""
    splits: dict[str, tuple[int, int]]
    """First image, and the one after the last, of each split."""
    skipped: tuple[dict[str, str], ...]
    """Name and reason of each image that was left out."""
    has_labels: bool
    left_out: dict[str, int]
    """Reasons for what lay in the source and was not prepared, and how often each held."""

    def count(self, split: str = "train") -> int:
        """Return how many images a split has."""
        start, stop = self._range(split)
        return stop - start

    def images(self, split: str = "train") -> Tensor:
        """Map the pixels of a split: uint8 [N, channels, size, size], not copied.

        The pages are private to the process: writing to the tensor never changes the file.
        """
        start, stop = self._range(split)
        shape = (stop - start, self.channels, self.size, self.size)
        if start == stop:
            return torch.empty(shape, dtype=torch.uint8)
        offset = start * math.prod(shape[1:])
        mapped = np.memmap(self.path / IMAGES, np.uint8, mode="c", offset=offset, shape=shape)
        return torch.from_numpy(mapped)

    def labels(self, split: str = "train", *, partly: bool = False) -> Tensor:
        """Read the labels of a split: int64 [N], -1 where `partly` and an image has none.

        Raises:
            DataError: An image of the split is not labelled, or its label is no class.
        """
        start, stop = self._range(split)
        if self.has_labels:
            labels = np.fromfile(self.path / LABELS, "<i8", stop - start, offset=8 * start)
            odd = labels[(labels < UNLABELLED) | (labels >= len(self.classes))]
            if len(odd):
                raise DataError(
                    f"{self.path / LABELS}: label {odd[0]} is not among {len(self.classes)} "
                    "classes, counted from 0; prepare the store again"
                )
            if partly or not (labels == UNLABELLED).any():
                return torch.from_numpy(labels.astype(np.int64, copy=False))
        raise DataError(
            f"{self.path}: labels are needed, and the images of split {split!r} have none"
        )

    def identity(self) -> str:
        """Return what tells this set of pixels from another, wherever its folder lies."""
        crc = read_json(self.path / INDEX)["crc32"][IMAGES]
        shape = f"{self.count('train')}x{self.channels}x{self.size}x{self.size}"
        return f"{shape}, crc32 {crc:08x}"

    def _range(self, split: str) -> tuple[int, int]:
        if split not in self.splits:
            raise DataError(f"{self.path}: has no split {split!r}, only {sorted(self.splits)}")
        return self.splits[split]


def open_store(path: Path, verify: bool = False) -> ImageStore:
    """Open the store that `prepare` wrote; one that a kill left moved aside is moved back.

    Args:
        path: Folder of the store.
        verify: Read every file once and compare its checksum; the lengths are always compared.

    Raises:
        DataError: Not a store, of a newer format, or damaged.
    """
    path = Path(path)
    recover_folder(path)
    if not (path / INDEX).is_file():
        raise DataError(f"{path}: not an image store (it has no {INDEX}); krrst prepare makes one")
    index = read_json(path / INDEX, sealed="index")
    try:
        store = _from_index(path, index)
        sums = _sums(index)
        count = int(index["count"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path / INDEX}: not the index of an image store ({error!r})") from error
    _check_length(path / IMAGES, count * store.channels * store.size**2)
    if store.has_labels:
        _check_length(path / LABELS, 8 * count)
    if verify:
        for name, crc in sums.items():
            if checksum(path / name) != crc:
                raise DataError(f"{path / name}: the checksum is wrong, the file is damaged")
    return store


def _from_index(path: Path, index: dict[str, Any]) -> ImageStore:
    if int(index["format_version"]) > FORMAT_VERSION:
        raise DataError(
            f"{path}: the store has format {index['format_version']}, "
            f"this version reads up to {FORMAT_VERSION}"
        )
    splits = {str(k): (int(start), int(stop)) for k, (start, stop) in index["splits"].items()}
    if any(not 0 <= start <= stop <= int(index["count"]) for start, stop in splits.values()):
        raise DataError(f"{path / INDEX}: the splits {splits} exceed the number of images")
    return ImageStore(
        path=path,
        size=int(index["size"]),
        channels=int(index["channels"]),
        classes=tuple(str(name) for name in index["classes"]),
        mean=tuple(float(value) for value in index["mean"]),
        std=tuple(float(value) for value in index["std"]),
        splits=splits,
        skipped=tuple(index["skipped"]),
        has_labels=LABELS in index["crc32"],
        left_out={str(k): int(v) for k, v in index.get("left_out", {}).items()},
    )


def checksums(path: Path) -> dict[str, int]:
    """Return the CRC-32 of each file of a store, by name, as its index has them."""
    return _sums(read_json(path / INDEX))


def _sums(index: dict[str, Any]) -> dict[str, int]:
    return {str(name): int(crc) for name, crc in index["crc32"].items()}


def _check_length(path: Path, expected: int) -> None:
    actual = path.stat().st_size if path.is_file() else None
    if actual != expected:
        found = "is missing" if actual is None else f"has {actual} bytes"
        raise DataError(f"{path}: {found}, the index says {expected} bytes; prepare it again")


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


class StoreWriter:
    """Writes a store into a folder, a block of images at a time."""

    def __init__(self, folder: Path, size: int, classes: tuple[str, ...] | None) -> None:
        self.folder, self.size, self.classes = folder, size, classes
        self.count = 0
        self._crc = 0
        self._labels: list[int] = []
        self._splits: dict[str, list[int]] = {}
        self._histograms: dict[str, npt.NDArray[np.int64]] = {}

    def add(self, split: str, images: list[tuple[npt.NDArray[np.uint8], int]]) -> None:
        """Append images [3, size, size] and labels to a split; finish one split before the next."""
        if not images:
            return
        block = np.stack([pixels for pixels, _ in images])
        with (self.folder / IMAGES).open("ab") as file:
            file.write(block.data)
        self._crc = zlib.crc32(block.data, self._crc)
        self._labels.extend(self._known(label) for _, label in images)
        histogram = self._histograms.setdefault(split, np.zeros((CHANNELS, 256), np.int64))
        for channel in range(CHANNELS):
            histogram[channel] += np.bincount(block[:, channel].ravel(), minlength=256)
        first_last = self._splits.setdefault(split, [self.count, self.count])
        self.count += len(block)
        first_last[1] = self.count

    def _known(self, label: int) -> int:
        most = MOST_CLASSES if self.classes is None else len(self.classes)
        if not UNLABELLED <= label < most:
            known = "integers from 0" if self.classes is None else f"{len(self.classes)} classes"
            raise DataError(f"prepare: an image has the label {label}, and there are {known}")
        return label

    def finish(self, about: dict[str, Any]) -> None:
        """Write the labels and the index; `about` is added to the index as it is."""
        checksums, classes = {IMAGES: self._crc}, self.classes or ()
        labels = np.array(self._labels, "<i8")
        if (labels != UNLABELLED).any():
            (self.folder / LABELS).write_bytes(labels.tobytes())
            checksums[LABELS] = zlib.crc32(labels.tobytes())
            classes = classes or tuple(str(label) for label in range(int(labels.max()) + 1))
        first = next(iter(self._histograms))
        mean, std = _moments(self._histograms.get("train", self._histograms[first]))
        index = {
            "format_version": FORMAT_VERSION,
            "count": self.count,
            "channels": CHANNELS,
            "size": self.size,
            "splits": self._splits,
            "classes": list(classes),
            "mean": mean,
            "std": std,
            "crc32": checksums,
        }
        write_json(self.folder / INDEX, index | about, sealed=True)


def _moments(histogram: npt.NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Return mean and deviation of each channel from counts [channels, 256], in [0, 1] units.

    The counts are exact, so the result does not depend on the order of the images. A channel
    that is constant gets the deviation of one level: it is divided by.
    """
    levels = np.arange(256) / 255
    total = histogram.sum(1)
    mean = histogram @ levels / total
    variance = (histogram * (levels - mean[:, None]) ** 2).sum(1) / total
    return mean.tolist(), np.maximum(np.sqrt(variance), 1 / 255).tolist()
