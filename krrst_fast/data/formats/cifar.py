"""CIFAR-10 and CIFAR-100 as their authors distribute them: python pickles."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from krrst_fast.data.formats import arrays
from krrst_fast.data.source import Item, Source, Split
from krrst_fast.errors import DataError

_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
_FOLDERS = ("cifar-100-python", "cifar-10-batches-py")
_MARKS = ("meta", "batches.meta", "data_batch_1")
NAMES = frozenset((*_FOLDERS, *_MARKS))
"""Names of files and folders of which one lies in every folder of CIFAR pickles."""


def find(path: Path) -> Path | None:
    """Return the folder of pickles at `path`, or directly below it under its usual name."""
    found = [f for f in (path, *(path / name for name in _FOLDERS)) if _holds_pickles(f)]
    if len(found) > 1:
        raise DataError(f"{path}: holds both {found[0].name} and {found[1].name}; name one of them")
    return found[0] if found else None


def _holds_pickles(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _MARKS)


def read(folder: Path) -> Source:
    """Return the images of a folder of CIFAR pickles, labelled by the fine classes."""
    hundred = not any((folder / name).is_file() for name in ("batches.meta", *_BATCHES))
    train, test = (["train"], "test") if hundred else (_BATCHES, "test_batch")
    splits = [Split("train", _items(folder, train))]
    if (folder / test).exists():
        splits.append(Split("test", _items(folder, [test])))
    return Source("CIFAR pickles", tuple(splits), _class_names(folder, hundred))


def files(folder: Path) -> set[Path]:
    """Return the files in the folder that belong to the format."""
    names = ("meta", "batches.meta", "train", "test", "test_batch", *_BATCHES)
    return {folder / name for name in names if (folder / name).is_file()}


def _class_names(folder: Path, hundred: bool) -> tuple[str, ...]:
    path = folder / ("meta" if hundred else "batches.meta")
    names = _entry(load(path), path, ("fine_label_names", "label_names"))
    if not isinstance(names, list):
        raise DataError(f"{path}: the names of the classes must be a list")
    return tuple(_text(name) for name in names)


def _items(folder: Path, files: list[str]) -> Iterator[Item]:
    for file in files:
        path = folder / file
        batch = load(path)
        images = _entry(batch, path, ("data",))
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim < 2:
            raise DataError(f"{path}: data must be a uint8 array of rows")
        values = _entry(batch, path, ("fine_labels", "labels"))
        labels = arrays.as_labels(str(path), values, len(images))
        yield from arrays.items(str(path), arrays.blocks_of(images), images.shape, labels)


def _entry(batch: dict[str, Any], path: Path, names: tuple[str, ...]) -> Any:
    for name in names:
        if name in batch:
            return batch[name]
    raise DataError(f"{path}: the pickle has no entry {' or '.join(names)}")


def load(path: Path) -> dict[str, Any]:
    """Read the dict in a pickle of arrays, lists, numbers and strings; refuse everything else.

    Raises:
        DataError: Missing, damaged, not a dict, or it asks for code to be run (none is).
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: not a regular file")
    try:
        with path.open("rb") as file:
            value = _ArraysOnly(file, encoding="bytes").load()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except OSError:
        raise
    except Exception as error:
        # Damaged bytes lead the unpickler to errors of any type.
        reason = str(error) or type(error).__name__
        raise DataError(f"{path}: not a readable pickle ({reason})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: the pickle holds a {type(value).__name__}, need a dict")
    return {_text(key): _plain(entry) for key, entry in value.items()}


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, _Array) else value


class _DType:
    """A dtype while it is unpickled: of its state only the byte order is taken.

    NumPy's own `__setstate__` would also take flags, with which a file could make it follow
    numbers as pointers.
    """

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = _text(state[1])
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder("<" if order == "<" else ">")


class _Array(np.ndarray):
    """An array while it is unpickled."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, fortran, data = state
        super().__setstate__((version, shape, dtype.dtype, fortran, data))


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds numeric arrays with functions of its own; no name in the pickle is imported."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy", "ndarray"): None,
            ("numpy", "dtype"): self._dtype,
            ("numpy.core.multiarray", "_reconstruct"): self._array,
            ("numpy._core.multiarray", "_reconstruct"): self._array,
            ("numpy.core.multiarray", "scalar"): self._scalar,
            ("numpy._core.multiarray", "scalar"): self._scalar,
            ("_codecs", "encode"): self._encode,
        }
        if (module, name) not in known:
            raise DataError(f"the pickle asks for {module}.{name}; refused, nothing was run")
        return known[module, name]

    def _dtype(self, spec: str | bytes, *_: object) -> _DType:
        dtype = np.dtype(_text(spec))
        if dtype.kind not in "biuf":
            raise DataError(f"the pickle holds an array of {dtype}, need numbers")
        return _DType(dtype)

    def _array(self, *_: object) -> _Array:
        """Return an empty array; the pickle's next instruction gives it its state."""
        return np.empty(0, np.uint8).view(_Array)

    def _scalar(self, dtype: _DType, data: bytes) -> Any:
        return np.frombuffer(data, dtype.dtype, count=1)[0]

    def _encode(self, text: str, encoding: str) -> bytes:
        """Decode bytes as Python 3 writes them into a pickle of protocol 2."""
        return text.encode("latin1")
