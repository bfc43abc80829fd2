"""NumPy archives: `images` or `data`, with `labels` and `class_names` where they are known."""

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from krrst_fast.data.formats import arrays
from krrst_fast.data.source import Item, Source, Split, by_split, natural
from krrst_fast.errors import DataError

_IMAGES, _LABELS = ("images", "image", "data"), ("labels", "label")


def read(files: list[Path]) -> Source:
    """Read archives of which each is a split, or a part of one, as its name says; train by default.

    ImageNet-64's archives (flat rows, labels from 1) come out with labels from 0.
    """
    files = sorted(files, key=lambda path: natural(path.name))
    labels = {path: _labels(path) for path in files}
    if all(_counts_from_one(path, labels[path]) for path in files):
        labels = {path: values - 1 for path, values in labels.items() if values is not None}
    splits = by_split(files, lambda path: path.stem)
    return Source(
        "npz",
        tuple(Split(name, _items(parts, labels)) for name, parts in splits.items()),
        _class_names(files[0]),
    )


def _items(files: list[Path], labels: dict[Path, npt.NDArray[np.int64] | None]) -> Iterator[Item]:
    for path in files:
        yield from arrays.items(str(path), _rows(path), _shape(path), labels[path])


@contextmanager
def _member(path: Path, names: tuple[str, ...]) -> Iterator[tuple[IO[bytes], int] | None]:
    """Open the first of the arrays `names` with its length in bytes; None where there is none.

    Damage found while it is read becomes a DataError that names the archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            key = next((f"{name}.npy" for name in names if f"{name}.npy" in members), None)
            if key is None:
                yield None
            else:
                with archive.open(key) as file:
                    yield file, archive.getinfo(key).file_size
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: not a readable npz archive ({error})") from error


@contextmanager
def _images(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """Open the image array as a file behind its header, with its shape and dtype."""
    with _member(path, _IMAGES) as member:
        if member is None:
            raise DataError(f"{path}: need an array called images or data")
        file, length = member
        shape, dtype = _array_header(path, file)
        if length != file.tell() + math.prod(shape) * dtype.itemsize:
            raise DataError(f"{path}: {file.name} does not have the length its header says")
        yield file, shape, dtype


def _array_header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    formats = np.lib.format
    try:
        version = formats.read_magic(file)
        read_header = (
            formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
        )
        shape, fortran, dtype = read_header(file)
    except ValueError as error:
        raise DataError(f"{path}: the images are not a readable array ({error})") from error
    if dtype.hasobject or fortran or not shape:
        raise DataError(f"{path}: images must be a C-ordered array of numbers, got {dtype}")
    return shape, dtype


def _shape(path: Path) -> tuple[int, ...]:
    with _images(path) as (_, shape, _):
        return shape


def _rows(path: Path) -> Iterator[npt.NDArray]:
    """Yield the image array a block of rows at a time: an archive may be larger than the memory."""
    with _images(path) as (file, shape, dtype):
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        for start in range(0, shape[0], arrays.BLOCK):
            count = min(arrays.BLOCK, shape[0] - start)
            data = file.read(count * row_bytes)
            yield np.frombuffer(data, dtype).reshape(count, *shape[1:])


def _array(path: Path, names: tuple[str, ...]) -> npt.NDArray | None:
    with _member(path, names) as member:
        if member is None:
            return None
        file, _ = member
        try:
            return np.lib.format.read_array(file, allow_pickle=False)
        except ValueError as error:
            raise DataError(f"{path}: {file.name} is not a readable array ({error})") from error


def _labels(path: Path) -> npt.NDArray[np.int64] | None:
    labels = _array(path, _LABELS)
    return None if labels is None else arrays.as_labels(str(path), labels, _shape(path)[0])


def _counts_from_one(path: Path, labels: npt.NDArray[np.int64] | None) -> bool:
    flat = len(_shape(path)) == 2
    return flat and labels is not None and len(labels) > 0 and int(labels.min()) >= 1


def _class_names(path: Path) -> tuple[str, ...] | None:
    names = _array(path, ("class_names",))
    return None if names is None else tuple(str(name) for name in names)
