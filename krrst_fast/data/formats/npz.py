"""NumPy archives: `images` or `data`, with `labels` and `class_names` where they are known."""

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from krrst_fast.data.formats import arrays
from krrst_fast.data.source import Item, LeftOut, Source, Split, by_split, natural
from krrst_fast.errors import DataError

_DAMAGE = (zipfile.BadZipFile, zlib.error, LZMAError, EOFError, RuntimeError)
_NAMES = "class_names"
_MOST_EXPANSION = 200
"""Photos compress about 1.1 times, MNIST 7 times, and zeros 1000 times."""
_ALWAYS_EXPANDED = 256 << 20
"""Bytes up to which an array may be compressed by any factor."""
_MOST_BLOCK = 64 << 20
"""Bytes that are read at a time, unless one image has more."""
_IMAGES, _LABELS = ("images", "image", "data"), ("labels", "label")


def read(files: list[Path]) -> Source:
    """Read archives of which each is a split, or a part of one, as its name says; train by default.

    ImageNet-64's archives (flat rows, labels from 1) come out with labels from 0.
    """
    files = sorted(files, key=lambda path: natural(path.name))
    labels = {path: _labels(path) for path in files}
    named = {names: path for path in files if (names := _class_names(path)) is not None}
    if len(named) > 1:
        first, other, *_ = named.values()
        raise DataError(f"{other}: its class_names are not those of {first}")
    classes = next(iter(named), None)
    # With a name for 0 and for the largest label they count from 0.
    known = [values.max() for values in labels.values() if values is not None and len(values)]
    named_all = classes is not None and all(largest < len(classes) for largest in known)
    if not named_all and all(_counts_from_one(path, labels[path]) for path in files):
        labels = {path: values - 1 for path, values in labels.items() if values is not None}
    splits = by_split(files, lambda path: path.stem)
    return Source(
        "npz",
        tuple(Split(name, _items(parts, labels)) for name, parts in splits.items()),
        classes,
        tuple(entry for path in files for entry in _other_arrays(path)),
    )


def _other_arrays(path: Path) -> list[LeftOut]:
    with _archive(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    read = {next((name for name in group if name in names), "") for group in (_IMAGES, _LABELS)}
    others = [name for name in names if name not in {*read, _NAMES}]
    return [LeftOut(f"{path}:{name}", "an array of another name in an npz") for name in others]


def _items(files: list[Path], labels: dict[Path, npt.NDArray[np.int64] | None]) -> Iterator[Item]:
    for path in files:
        yield from arrays.items(str(path), _rows(path), _shape(path), labels[path])


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive; damage found while it is read becomes a DataError that names it."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _DAMAGE as error:
        raise DataError(f"{path}: not a readable npz archive ({error})") from error


@contextmanager
def _member(path: Path, names: tuple[str, ...]) -> Iterator[tuple[IO[bytes], int] | None]:
    """Open the first of the arrays `names` with its length in bytes; None where there is none."""
    with _archive(path) as archive:
        members = archive.namelist()
        key = next((f"{name}.npy" for name in names if f"{name}.npy" in members), None)
        if key is None:
            yield None
        else:
            info = archive.getinfo(key)
            _refuse_bomb(path, info)
            with archive.open(info) as file:
                yield file, info.file_size


def _refuse_bomb(path: Path, info: zipfile.ZipInfo) -> None:
    # The directory may lie about the compressed length, too; the file's is known.
    held = min(info.compress_size, path.stat().st_size)
    expansion = info.file_size / max(held, 1)
    if info.file_size > _ALWAYS_EXPANDED and expansion > _MOST_EXPANSION:
        raise DataError(
            f"{path}: {info.filename} expands {held} bytes to {info.file_size}, "
            f"{expansion:.0f} times; above {_ALWAYS_EXPANDED} bytes at most {_MOST_EXPANSION} "
            "times is read: save it with numpy.savez if it really is so"
        )


@contextmanager
def _images(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """Open the image array as a file behind its header, with its shape and dtype."""
    with _member(path, _IMAGES) as member:
        if member is None:
            raise DataError(f"{path}: need an array called images or data")
        file, length = member
        shape, dtype = _array_header(path, file, length)
        if dtype.kind not in "biuf":
            raise DataError(f"{path}: images must be an array of numbers, got {dtype}")
        yield file, shape, dtype


def _array_header(path: Path, file: IO[bytes], length: int) -> tuple[tuple[int, ...], np.dtype]:
    """Read the header of an array, whose member of the archive has `length` bytes."""
    formats = np.lib.format
    try:
        version = formats.read_magic(file)
        read_header = (
            formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
        )
        shape, fortran, dtype = read_header(file)
    except ValueError as error:
        raise DataError(f"{path}: {file.name} is not a readable array ({error})") from error
    if dtype.hasobject or fortran or not shape:
        raise DataError(f"{path}: {file.name} must be a C-ordered array of numbers, got {dtype}")
    if shape[0] > 0 and math.prod(shape) * dtype.itemsize <= 0:
        raise DataError(f"{path}: {file.name} has {shape[0]} rows of no bytes, {list(shape)}")
    if length != file.tell() + math.prod(shape) * dtype.itemsize:
        raise DataError(f"{path}: {file.name} does not have the length its header says")
    return shape, dtype


def _shape(path: Path) -> tuple[int, ...]:
    with _images(path) as (_, shape, _):
        return shape


def _rows(path: Path) -> Iterator[npt.NDArray]:
    """Yield the image array a block of rows at a time: an archive may be larger than the memory."""
    with _images(path) as (file, shape, dtype):
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        step = max(1, min(arrays.BLOCK, _MOST_BLOCK // max(row_bytes, 1)))
        for start in range(0, shape[0], step):
            count = min(step, shape[0] - start)
            data = _exactly(path, file, count * row_bytes)
            yield np.frombuffer(data, dtype).reshape(count, *shape[1:])


def _exactly(path: Path, file: IO[bytes], count: int) -> bytes:
    """Read `count` bytes; a member may hold fewer than the archive's directory says."""
    data = file.read(count)
    if len(data) != count:
        raise DataError(f"{path}: {file.name} is shorter than the archive says")
    return data


def _array(path: Path, names: tuple[str, ...]) -> npt.NDArray | None:
    with _member(path, names) as member:
        if member is None:
            return None
        file, length = member
        shape, dtype = _array_header(path, file, length)
        data = _exactly(path, file, math.prod(shape) * dtype.itemsize)
        return np.frombuffer(data, dtype).reshape(shape)


def _labels(path: Path) -> npt.NDArray[np.int64] | None:
    labels = _array(path, _LABELS)
    return None if labels is None else arrays.as_labels(str(path), labels, _shape(path)[0])


def _counts_from_one(path: Path, labels: npt.NDArray[np.int64] | None) -> bool:
    flat = len(_shape(path)) == 2
    return flat and labels is not None and len(labels) > 0 and int(labels.min()) >= 1


def _class_names(path: Path) -> tuple[str, ...] | None:
    names = _array(path, (_NAMES,))
    return None if names is None else tuple(_text(name) for name in names)


def _text(name: object) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)
